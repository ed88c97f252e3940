"""Proves that `unimodal data check` opens what lies at a path, finds each kind of fault by name, and says what to do about it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from unimodal import cli
from unimodal.data import Scenes, audit, open_splits, scenes_tokenizer, write_karpathy, write_webdataset


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `unimodal data check ...`."""
    status = cli.main(["data", "check", *map(str, arguments)])
    return status, *capsys.readouterr()


def faulty(folder: Path) -> Path:
    """Two splits with one fault of each kind."""
    path = write_karpathy({"train": Scenes("train", count=6), "val": Scenes("val", count=3)}, folder)
    data = json.loads(path.read_text())
    images = {image["filename"].removesuffix(".png"): image for image in data["images"]}
    pictures = folder / "images"
    (pictures / "train-000000.png").write_bytes(b"no picture")
    (pictures / "train-000001.png").write_bytes((pictures / "train-000001.png").read_bytes()[:100])
    Image.new("1", (9000, 9000)).save(pictures / "val-000000.png")
    Image.open(pictures / "train-000003.png").save(pictures / "train-000002.png", compress_level=1)
    Image.open(pictures / "train-000004.png").convert("RGBA").save(pictures / "val-000001.png")
    images["train-000005"]["sentences"] = []
    images["val-000002"]["sentences"][0]["raw"] = " "
    images["train-000002"]["sentences"][0]["raw"] = "A red  circle is here."
    images["val-000001"]["sentences"][1]["raw"] = "a red circle is here."
    images["val-000001"]["sentences"][0]["raw"] = "red " * 50
    path.write_text(json.dumps(data))
    return path


def test_each_kind_of_fault_is_found(tmp_path: Path) -> None:
    _, splits = open_splits(faulty(tmp_path / "new"))
    found = {finding.kind: finding for finding in audit(splits, tokenizer=scenes_tokenizer(), max_length=40)}
    assert {kind: finding.count for kind, finding in found.items()} == {
        "captions": 1,
        "no captions": 1,
        "pictures": 3,
        "repeated pictures": 1,
        "shared pictures": 1,
        "shared captions": 1,
        "cut captions": 1,
    }
    assert found["captions"].cases == ["val/val-000002.png: caption 0 is empty; give it words"]
    assert found["no captions"].cases == ["train/train-000005.png"]
    for case, (name, reason) in zip(
        found["pictures"].cases,
        [("train-000000.png", "is no image"), ("train-000001.png", "truncated"), ("val-000000.png", "9000 x 9000")],
    ):
        assert name in case and reason in case
    assert found["repeated pictures"].cases == ["train/train-000002.png = train/train-000003.png"]
    assert found["shared pictures"].cases == ["train/train-000004.png = val/val-000001.png"]
    assert found["shared captions"].cases == ["'a red circle is here.': train/train-000002.png, val/val-000001.png"]
    assert found["cut captions"].cases[0].startswith("val/val-000001.png: 52 tokens, 'red red")
    assert "max_length to 52" in found["cut captions"].advice
    assert all(len(finding.cases) == finding.count and finding.advice for finding in found.values())
    exact = audit(splits, tokenizer=scenes_tokenizer(), max_length=52)
    assert "cut captions" not in {finding.kind for finding in exact}


def test_one_picture_listed_twice_is_no_repetition(tmp_path: Path) -> None:
    path = write_karpathy({"train": Scenes("train", count=2)}, tmp_path / "new")
    data = json.loads(path.read_text())
    data["images"].append(data["images"][0] | {"sentences": [{"raw": "another"}]})
    path.write_text(json.dumps(data))
    _, splits = open_splits(path)
    assert len(splits["train"]) == 2 and splits["train"].captions(0)[-1] == "another" and audit(splits) == []


def test_check_prints_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = faulty(tmp_path / "new")
    status, output, error = run(capsys, path, "--tokenizer", "scenes", "--max_length", 40, "--show", 2)
    assert (status, error) == (1, "")
    for line in (
        f"{path}: read by unimodal.data.KarpathyJson",
        "  train: 6 images, 25 captions",
        "pictures that cannot be read: 3",
        "  ... and 1 more; --show 3 prints all",
        "captions of more than 40 tokens, whose end would be cut: 1 of 39, the longest of 52 tokens",
        "  What to do: Put sound files in their place, or leave these images out with on_error: skip.",
        "7 kinds of fault found.",
    ):
        assert line in output.splitlines(), output
    status, output, _ = run(capsys, path, "--split", "val")
    assert status == 1 and "train" not in output and "length of captions: not checked; give --tokenizer" in output


def test_sound_data_is_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_karpathy({"train": Scenes("train", count=3), "test": Scenes("test", count=2)}, tmp_path / "new")
    status, output, _ = run(capsys, path.parent, "--tokenizer", "scenes", "--max_length", 40)
    assert (status, output.splitlines()[-1]) == (0, "Nothing wrong found.")
    assert "  test: 2 images, 10 captions" in output


# What lies at a path.


def pictures(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Scenes("val", count=len(names)).image(i).save(folder / name)
    return folder


def test_a_gallery_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = run(capsys, pictures(tmp_path / "photos", "a.png", "b/c.png"))
    assert status == 0 and "read by unimodal.data.ImageFolder" in output
    assert "  all: 2 images without captions, a gallery: enough to search and to caption, not to train" in output


def test_folders_tables_and_shards(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "split", "train/a.png", "val/b.png")
    name, splits = open_splits(folder)
    assert name == "ImageFolder" and [splits[split].key(0) for split in ("train", "val")] == ["a.png", "b.png"]

    (folder / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
    name, splits = open_splits(folder / "train")
    assert name == "JsonLines" and splits["all"].captions(0) == ["one"]

    table = tmp_path / "table.tsv"
    table.write_text("photo\twords\tsplit\ntrain/a.png\tone\ttrain\nval/b.png\ttwo\tval\n")
    name, splits = open_splits(table, folder, image="photo", captions=["words"])
    assert name == "CsvTable" and {split: pairs.captions(0) for split, pairs in splits.items()} == {
        "train": ["one"],
        "val": ["two"],
    }
    assert splits["val"].image(0).size == (32, 32)

    for split in ("train", "val"):
        for shard in write_webdataset(Scenes(split, count=3), tmp_path / split, 2):
            shard.rename(tmp_path / shard.name)
    (tmp_path / "train-00000_stats.json").write_text("{}")  # as img2dataset leaves beside its shards
    table.unlink()
    for path, lengths in (
        (tmp_path, {"train": 3, "val": 3}),
        (tmp_path / "*.tar", {"train": 3, "val": 3}),
        (tmp_path / "val-00001.tar", {"val": 1}),
    ):
        name, splits = open_splits(path)
        assert name == "WebDatasetTars" and {split: len(pairs) for split, pairs in splits.items()} == lengths


def test_labelled_sets_and_saved_datasets(tmp_path: Path) -> None:
    pascal = pictures(tmp_path / "pascal", *(f"dataset/cat/{i}.jpg" for i in range(10)))
    (pascal / "sentence").mkdir()
    name, splits = open_splits(pascal)
    assert name == "PascalSentence" and [len(splits[split]) for split in ("train", "val", "test")] == [8, 1, 1]
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"image": [Scenes("val", count=1).image(0)], "caption": ["one"]})
    made = made.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "saved"))
    for path, split in ((tmp_path / "saved", "train"), (tmp_path / "saved" / "train", "all")):
        name, splits = open_splits(path)
        assert name == "HuggingFaceDataset" and list(splits) == [split] and audit(splits) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone.json",), "there is nothing at 'gone.json'; check the path"),
        (("gone-*.tar",), "no file fits 'gone-*.tar'"),
        (("notes.md",), "notes.md has no known format; expected a folder, .json, .jsonl"),
        (("two",), "two holds a.csv, b.jsonl; name one of them"),
        (("photos", "--root", "x"), "photos is read by ImageFolder, which has no root; leave it out"),
        (("photos", "--split", "dev"), "photos has no split 'dev'; it has: all"),
        (("photos", "--max_length", "3"), "--max_length counts the tokens of a tokenizer; give --tokenizer too"),
        (("photos", "--tokenizer", "scenes"), "this tokenizer names no limit of its own; give max_length"),
        (("two/a.csv",), "none of the columns ['x', 'y'] is called image"),
        (("empty.json",), "expected an object with a list 'images'"),
    ],
)
def test_bad_input_is_one_line(
    arguments, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", "a.png")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "two" / "b.jsonl").write_text("")
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "empty.json").write_text("[]")
    status, output, error = run(capsys, *arguments)
    assert status == 1 and "found" not in output and error.startswith("unimodal data: ") and message in error, error
