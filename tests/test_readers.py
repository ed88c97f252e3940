"""Proves that pairs survive writing and reading to the last pixel, that every bad sample is named and left out or raised,
never replaced, and that no file can point outside its root."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy import toy_processor

from unimodal.data import (
    ImageFolder,
    JsonLines,
    KarpathyJson,
    Problem,
    Scenes,
    WebDatasetTars,
    check,
    write_karpathy,
    write_webdataset,
)
from unimodal.data.module import PairData

PICTURE = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(PICTURE, "PNG")
PNG = PICTURE.getvalue()


def same(a, b) -> bool:
    """Equal captions and pixels."""
    rows = range(len(a))
    captions = [a.captions(i) for i in rows] == [b.captions(i) for i in range(len(b))]
    return captions and all((np.asarray(a.image(i)) == np.asarray(b.image(i))).all() for i in rows)


def karpathy(folder: Path, captions: list[Any], **entry: Any) -> Path:
    """A data set with one picture per list of captions, `0.png` and so on."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for i, texts in enumerate(captions):
        (folder / "images" / f"{i}.png").write_bytes(PNG)
        sentences = [{"raw": text} for text in texts] if isinstance(texts, list) else texts
        images.append({"filename": f"{i}.png", "split": "train", "sentences": sentences} | entry)
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "toy", "images": images}))
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


# Round trips.


def test_karpathy_round_trip(tmp_path: Path) -> None:
    splits = {"train": Scenes("train", count=4), "val": Scenes("val", count=3)}
    path = write_karpathy(splits, tmp_path / "new")
    for split, scenes in splits.items():
        back = KarpathyJson(path, split=split)
        assert same(scenes, back)
        assert (back.name, back.split, back.problems, check(back)) == ("scenes", split, [], [])
        assert back.key(2) == f"{split}-000002.png"
    both = KarpathyJson(path, split="train+val")
    assert len(both) == 7
    assert [both.image_id(i) for i in range(7)] == list(range(7))
    again = write_karpathy({"train": KarpathyJson(path, split="train")}, tmp_path / "again")
    assert KarpathyJson(again, split="train").fingerprint() == KarpathyJson(path, split="train").fingerprint()


@pytest.mark.parametrize("shard_size", [2, 5, 100])
def test_shards_round_trip(tmp_path: Path, shard_size: int) -> None:
    scenes = Scenes("test", count=5)
    paths = write_webdataset(scenes, tmp_path, shard_size)
    assert [path.name for path in paths] == [f"test-{i:05d}.tar" for i in range(-(-5 // shard_size))]
    back = WebDatasetTars(tmp_path / "*.tar", split="test")
    assert same(scenes, back)
    assert same(pickle.loads(pickle.dumps(back)), back)  # as a loader's worker gets it
    assert back.key(4) == f"{paths[-1].name}/000004"
    assert len({back.image_id(i) for i in range(5)}) == 5
    assert back.negatives(0, 0) == []


def test_fingerprints_follow_captions(tmp_path: Path) -> None:
    prints = [
        KarpathyJson(karpathy(tmp_path, captions), split="train").fingerprint()
        for captions in ([["a", "b"]], [["a", "c"]], [["ab"]], [["a"], ["b"]], [["a", "b"]])
    ]
    assert len(set(prints)) == 4
    assert prints[0] == prints[-1]


def test_any_script_and_any_length_is_a_caption(tmp_path: Path) -> None:
    texts = ["一只红色的猫", "قطة حمراء", "кот 🐈", "line\u2028separator", "word " * 5000]
    path = karpathy(tmp_path, [texts])
    reader = KarpathyJson(path, split="train", on_error="skip")
    assert reader.captions(0) == texts
    write_webdataset(reader, tmp_path / "tars")
    assert WebDatasetTars(tmp_path / "tars" / "*", split="train").captions(0) == texts


# Formats found elsewhere.


def test_karpathy_keeps_the_ids_of_coco(tmp_path: Path) -> None:
    sentences = [{"raw": text, "sentid": 70 + i} for i, text in enumerate("abc")]
    path = karpathy(tmp_path, [["a"]], cocoid=9, sentences=sentences)
    assert KarpathyJson(path, split="train").coco_ids(0) == (9, [70, 71, 72])
    with pytest.warns(UserWarning, match="left out"):
        assert KarpathyJson(path, split="train", captions_per_image=2).coco_ids(0) == (9, [70, 71])
    for broken in ({"sentences": sentences}, {"cocoid": 9}, {"cocoid": "9", "sentences": sentences}):
        reader = KarpathyJson(karpathy(tmp_path, [["a"]], **broken), split="train")
        with pytest.raises(ValueError, match="0.png of toy train lacks COCO's ids, a `cocoid` and a `sentid`"):
            reader.coco_ids(0)


def test_karpathy_with_filepath_and_root(tmp_path: Path) -> None:
    path = karpathy(tmp_path, [["a"]], filepath="val2014", split="restval")
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    (tmp_path / "images" / "0.png").rename(tmp_path / "coco" / "val2014" / "0.png")
    reader = KarpathyJson(path, tmp_path / "coco", split="restval")
    assert reader.key(0) == "val2014/0.png"
    assert reader.image(0).size == (4, 4)


def test_one_picture_listed_twice_is_one_image(tmp_path: Path) -> None:
    path = karpathy(tmp_path, [["a", "b"], ["c"], ["d"]], filename="0.png")
    reader = KarpathyJson(path, split="train")
    assert (len(reader), reader.captions(0), reader.image_id(0)) == (1, ["a", "b", "c", "d"], 0)
    with pytest.warns(UserWarning, match="1 captions of 1 images of toy train come after the first 3"):
        assert KarpathyJson(path, split="train", captions_per_image=3).captions(0) == ["a", "b", "c"]


def test_folder_with_texts_beside(tmp_path: Path) -> None:
    for name, text in (("b", "one\ntwo\r\n\n"), ("sub/a", "three")):
        path = tmp_path / "train" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
        path.with_suffix(".txt").write_text(text)
    reader = ImageFolder(tmp_path, split="train")
    assert [(reader.key(i), reader.captions(i)) for i in range(2)] == [
        ("b.png", ["one", "two"]),
        ("sub/a.png", ["three"]),
    ]
    assert reader.image(1).size == (4, 4)
    assert reader.name == tmp_path.name


def test_a_folder_without_texts_is_a_gallery(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.TIF"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "blue").save(tmp_path / "photos" / name)
    reader = ImageFolder(tmp_path / "photos")
    assert (reader.name, reader.split, len(reader)) == ("photos", "all", 2)
    assert [(reader.key(i), reader.captions(i)) for i in range(2)] == [("b.png", []), ("sub/a.TIF", [])]
    assert reader.image(1).getpixel((0, 0)) == (0, 0, 255)
    assert check(reader) == [] and ImageFolder(tmp_path / "photos", on_error="skip").problems == []
    (tmp_path / "photos" / "b.txt").write_text("a blue square")
    with pytest.raises(ValueError, match=r"sub/a.TIF: expected a list of at least one caption, got \[\]"):
        ImageFolder(tmp_path / "photos")


def test_a_gallery_embeds_and_does_not_train(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "b.png")
    reader = ImageFolder(tmp_path)
    data = PairData(train=reader, val=reader, test=reader, batch_size=1)
    data.processor = toy_processor()
    for loader, purpose in (("train", "training"), ("val", "validation"), ("test", "testing")):
        message = f"{tmp_path.name} all holds 1 pictures and no caption, and {purpose} reads captions; write one caption a line"
        with pytest.raises(ValueError, match=message):
            getattr(data, f"{loader}_dataloader")()
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["image", "image_id"]


def test_a_gallery_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "b.png").write_bytes(PNG)
    reader = ImageFolder(tmp_path / "photos")
    with pytest.raises(ValueError, match="no caption, and write_karpathy reads captions"):
        write_karpathy({"all": reader}, tmp_path / "a")
    with pytest.raises(ValueError, match="no caption, and write_webdataset reads captions"):
        write_webdataset(reader, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_captions_are_cut_to_five_and_counted(tmp_path: Path) -> None:
    path = karpathy(tmp_path, [list("abcdefg"), list("abcde"), list("abcdef"), list("abc")])
    with pytest.warns(
        UserWarning, match="^3 captions of 2 images of toy train come after the first 5 and are left out$"
    ):
        reader = KarpathyJson(path, split="train", captions_per_image=5)
    assert ["".join(reader.captions(i)) for i in range(4)] == ["abcde", "abcde", "abcde", "abc"]
    assert len(KarpathyJson(path, split="train").captions(0)) == 7
    with pytest.raises(ValueError, match="captions_per_image: expected at least 1, got 0"):
        KarpathyJson(path, split="train", captions_per_image=0)


def test_folds_are_blocks_in_file_order(tmp_path: Path) -> None:
    path = karpathy(tmp_path, [[str(i)] for i in range(10)])
    folds = [KarpathyJson(path, split="train", fold=(f, 5)) for f in range(5)]
    assert [[fold.captions(i)[0] for i in range(2)] for fold in folds] == [
        [str(2 * f), str(2 * f + 1)] for f in range(5)
    ]
    assert {fold.split for fold in folds} == {"train"} and len({fold.fingerprint() for fold in folds}) == 5
    for wrong in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(ValueError, match=r"fold: expected \(f, n\) with f from 0 to n - 1, got"):
            KarpathyJson(path, split="train", fold=wrong)
    with pytest.raises(ValueError, match="fold: 10 images do not make 3 blocks of one size"):
        KarpathyJson(path, split="train", fold=(0, 3))


def test_remote_sensing_with_tiff_pictures(tmp_path: Path) -> None:
    """The form of dataset_RSITMD.json: pictures in TIFF, tokens and numbers beside each sentence."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (256, 256), "green").save(tmp_path / "images" / "airport_1.tif", compression="tiff_lzw")
    sentences = [{"raw": f"many planes {i} .", "tokens": ["many"], "imgid": 0, "sentid": i} for i in range(5)]
    image = {
        "filename": "airport_1.tif",
        "split": "test",
        "imgid": 0,
        "sentids": list(range(5)),
        "sentences": sentences,
    }
    path = tmp_path / "dataset_RSITMD.json"
    path.write_text(json.dumps({"images": [image], "dataset": "RSITMD"}))
    reader = KarpathyJson(path, split="test", captions_per_image=5)
    assert (reader.name, reader.key(0), len(reader.captions(0))) == ("RSITMD", "airport_1.tif", 5)
    assert reader.image(0).getpixel((9, 9)) == (0, 128, 0)


def test_samples_are_kept_as_they_are_when_asked(tmp_path: Path) -> None:
    reader = KarpathyJson(karpathy(tmp_path, [["a"], [""], []]), split="train", on_error="keep")
    assert [reader.captions(i) for i in range(3)] == [["a"], [""], []] and reader.problems == []


def test_shards_of_other_writers(tmp_path: Path) -> None:
    members = {"./a/1.txt": b"one\ntwo\n", "./a/1.JPG": PNG, "a/1.cls": b"7", "README": b"no sample", "a/.hidden": b""}
    members |= {"2.png": PNG, "2.json": b'{"caption": "three", "url": ""}', "2.txt": b"not read"}
    tar(tmp_path / "x.tar", members)
    reader = WebDatasetTars(tmp_path / "x.tar", split="train")
    assert [(reader.key(i), reader.captions(i)) for i in range(2)] == [
        ("x.tar/a/1", ["one", "two"]),
        ("x.tar/2", ["three"]),
    ]
    assert check(reader) == []


# Bad samples.


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], r"expected a list of at least one caption, got \[\]"),
        (None, "expected a list of at least one caption, got None"),
        ("a cat", "expected a list of at least one caption, got 'a cat'"),
        (["a", ""], "caption 1 is empty; give it words"),
        ([" \n\t"], "caption 0 is empty"),
        ([3], "caption 0 is int 3; expected a string"),
        ([None], "caption 0 is NoneType None"),
        (["\ud800"], "caption 0 is .*, which is no valid Unicode"),
    ],
)
def test_bad_captions_raise_or_are_left_out(tmp_path: Path, captions: Any, message: str) -> None:
    path = karpathy(tmp_path, [["fine"], captions, ["good"]])
    with pytest.raises(ValueError, match=f"^1.png: {message}.* pass on_error='skip'"):
        KarpathyJson(path, split="train")
    with pytest.warns(
        UserWarning, match=f"1 of 3 samples of toy train are bad and left out: 1.png: {message}"
    ) as caught:
        reader = KarpathyJson(path, split="train", on_error="skip")
    assert caught[0].filename == __file__
    assert [reader.captions(i) for i in range(len(reader))] == [["fine"], ["good"]]
    assert [reader.key(i) for i in range(len(reader))] == ["0.png", "2.png"]
    assert [(p.index, p.key) for p in reader.problems] == [(1, "1.png")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no image file"),
        (b"", "is no image"),
        (b"no picture", "is no image"),
        (PNG[:50], "is truncated or corrupt"),
    ],
)
def test_bad_pictures_raise_or_are_left_out(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = karpathy(tmp_path, [["fine"], ["bad"]])
    picture = tmp_path / "images" / "1.png"
    picture.unlink() if content is None else picture.write_bytes(content)
    reader = KarpathyJson(path, split="train")
    reader.image(0)
    with pytest.raises((ValueError, FileNotFoundError), match=str(picture)):
        reader.image(1)
    problems = check(reader)
    assert [(problem.index, problem.key) for problem in problems] == [(1, "1.png")]
    assert message in problems[0].reason
    with pytest.warns(UserWarning, match="1 of 2 samples"):
        assert KarpathyJson(path, split="train", on_error="skip").problems == problems
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(ValueError, match="2 of 2 samples .* no sample remains, check the files"):
        KarpathyJson(path, split="train", on_error="skip")


def test_check_lists_every_problem() -> None:
    class Broken(Scenes):
        def captions(self, i: int) -> list[str]:
            return [""]

        def image(self, i: int) -> Image.Image:
            raise OSError("the disk is gone")

    key = "scenes/val/000000"
    expected = [Problem(0, key, "caption 0 is empty; give it words"), Problem(0, key, "the disk is gone")]
    assert check(Broken("val", count=1)) == expected
    assert str(expected[1]) == "scenes/val/000000: the disk is gone"


def test_bad_members_of_a_shard_are_left_out(tmp_path: Path) -> None:
    good = {"0.png": PNG, "0.txt": b"fine"}
    bad = {"1.png": PNG, "2.png": PNG, "2.json": b"{half", "3.txt": b"no picture", "4.png": b"x", "4.txt": b"a"}
    bad |= {"5.png": PNG, "5.txt": b"\xff\xfea", "6.png": PNG, "6.json": b'{"captions": "a"}'}
    shard = tar(tmp_path / "x.tar", good | bad)
    with pytest.raises(ValueError, match=r"x.tar/1: expected a list of at least one caption, got \[\]"):
        WebDatasetTars(shard, split="train")
    with pytest.warns(UserWarning, match="6 of 7 samples"):
        reader = WebDatasetTars(shard, split="train", on_error="skip")
    assert len(reader) == 1
    reasons = {problem.key.removeprefix("x.tar/"): problem.reason for problem in reader.problems}
    assert list(reasons) == list("123456")
    for key, reason in (
        ("2", "{half"),
        ("3", "the shard has captions of this name and no picture; put the picture beside them"),
        ("4", "is no image"),
        ("5", "no valid Unicode"),
    ):
        assert reason in reasons[key]


# Bad files.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"{half", "is no JSON: Expecting property name"),
        (b"\xff\xfe\xfa", "is no JSON"),
        (b"[]", r"expected an object with a list 'images', got \[\]"),
        (b'{"images": {}}', "expected an object with a list 'images'"),
        (b'{"images": ["a.jpg"]}', r"images\[0\] needs a filename and a split as strings, got 'a.jpg'"),
        (b'{"images": [{"filename": 3, "split": "train"}]}', r"images\[0\] needs a filename"),
        (b'{"images": []}', "has no split 'train'; it has: "),
        (b'{"images": [{"filename": "a", "split": "val"}, {"filename": "b", "split": "dev"}]}', "it has: dev, val"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}.*{message}"):
        KarpathyJson(path, split="train", on_error="skip")


def test_missing_files_are_named(tmp_path: Path) -> None:
    for make, message in (
        (lambda: KarpathyJson(tmp_path / "gone.json", split="train"), "gone.json"),
        (lambda: ImageFolder(tmp_path, split="gone"), "there is no folder '.*gone'; the pictures of a split"),
        (lambda: WebDatasetTars(tmp_path / "gone-*.tar", split="train"), r"no file fits '.*gone-\*.tar'; expected tar"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            make()


def test_empty_splits_and_unknown_policies_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    tar(tmp_path / "empty.tar", {})
    for make in (
        lambda: ImageFolder(tmp_path, split="train"),
        lambda: WebDatasetTars(tmp_path / "*.tar", split="train"),
    ):
        with pytest.raises(ValueError, match="has no samples in split 'train'; check the path and the split"):
            make()
    with pytest.raises(ValueError, match="on_error: expected one of raise, skip, keep, got 'ignore'"):
        KarpathyJson(karpathy(tmp_path, [["a"]]), split="train", on_error="ignore")


def test_tars_that_are_none_are_named(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole", {"0.txt": b"a", "0.png": PNG + bytes(20_000)}).read_bytes()
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as zipped:
        zipped.add(tmp_path / "whole", "0.png")
    (tmp_path / "text.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "half.tar").write_bytes(whole[: len(whole) // 2])
    for name in ("zipped.tar", "text.tar", "half.tar"):
        with pytest.raises(ValueError, match=f"{name} is no plain tar file, or truncated: .*; write it again"):
            WebDatasetTars(tmp_path / name, split="train")


# Paths stay inside.


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "a\0.png"])
def test_names_cannot_leave_their_root(tmp_path: Path, name: str) -> None:
    message = "leaves .*; expected a path inside it"
    with pytest.raises(ValueError, match=message):
        KarpathyJson(karpathy(tmp_path / "k", [["a"]], filename=name), split="train", on_error="skip")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "m.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(ValueError, match=message):
        JsonLines(tmp_path / "train" / "m.jsonl", on_error="skip")
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, split=name)
    if "\0" not in name:  # a tar's header ends there
        with pytest.raises(ValueError, match=message):
            WebDatasetTars(tar(tmp_path / "x.tar", {name: PNG}), split="train", on_error="skip")


def test_filepath_cannot_leave_the_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves"):
        KarpathyJson(karpathy(tmp_path, [["a"]], filepath=".."), split="train")


def test_links_in_a_shard_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        shard.addfile(member)
    with pytest.raises(ValueError, match="member '0.png' is a link or device; expected plain files"):
        WebDatasetTars(tmp_path / "x.tar", split="train")


# Writers.


@pytest.mark.parametrize(
    "write", [lambda pairs, to: write_karpathy({"val": pairs}, to), lambda pairs, to: write_webdataset(pairs, to, 1)]
)
def test_a_data_set_is_written_whole_or_not_at_all(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes, image = Scenes("val", count=3), Scenes.image

    def broken(self: Scenes, i: int) -> Image.Image:
        if i == 2:
            raise OSError("No space left on device")
        return image(self, i)

    monkeypatch.setattr(Scenes, "image", broken)
    with pytest.raises(OSError, match="No space left"):
        write(scenes, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    write(scenes, tmp_path / "new")
    with pytest.raises(FileExistsError, match="holds files already"):
        write(scenes, tmp_path / "new")


def test_writers_refuse_what_would_be_lost(tmp_path: Path) -> None:
    scenes = Scenes("val", count=1)
    (tmp_path / "mine.txt").write_text("keep")
    for write in (lambda: write_karpathy({"val": scenes}, tmp_path), lambda: write_webdataset(scenes, tmp_path)):
        with pytest.raises(FileExistsError, match="holds files already; choose a new folder"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="got no split; give at least one"):
        write_karpathy({}, tmp_path / "new")
    with pytest.raises(ValueError, match="shard_size: expected at least 1, got 0"):
        write_webdataset(scenes, tmp_path / "new", 0)
