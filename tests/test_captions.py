"""Proves that tables, texts and tars are read as Excel, pandas, the Hub and phones write them; and that what cannot be read rightly is
named by `data check` and refused by every verb in the same words."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_cli import run

from unimodal.data import (
    CsvTable,
    HuggingFaceDataset,
    ImageFolder,
    JsonLines,
    KarpathyJson,
    WebDatasetTars,
    audit,
    open_splits,
)
from unimodal.data.captions import as_captions, usual_captions, written_list
from unimodal.data.guess import open_split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures."""
    for name, colour in (("a.png", "red"), ("b.png", "green")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    return tmp_path


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def table(folder: Path, content: str | bytes, name: str = "table.csv") -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def read(reader: Any) -> dict[str, list[Any]]:
    return {reader.key(i): reader.captions(i) for i in range(len(reader))}


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


# Cells.


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["a dog", "a cat"]', ["a dog", "a cat"]),
        ("['a dog', 'a cat']", ["a dog", "a cat"]),
        ("""["a dog's bone", 'the "cat"']""", ["a dog's bone", 'the "cat"']),
        ("['a dog' 'a cat']", ["a dog", "a cat"]),  # numpy
        ("['a dog'\n \"a cat's tail\"\n 'a cow']", ["a dog", "a cat's tail", "a cow"]),
        ("('a dog', 'a cat')", ["a dog", "a cat"]),
        (" [ 'a dog' , ] ", ["a dog"]),
        ('["一只狗", "caf\\u00e9"]', ["一只狗", "café"]),
        ("[{'raw': 'a dog', 'sentid': 3}, {'raw': 'a cat'}]", ["a dog", "a cat"]),
        ("[]", []),
        ("['a dog', None]", ["a dog", None]),
        ("[null]", [None]),
        ("a dog", ["a dog"]),
        ("[A dog] sits", ["[A dog] sits"]),
        ("(a dog)", ["(a dog)"]),
        ("('a dog')", ["('a dog')"]),
        ("[1]", ["[1]"]),
        ('"a dog"', ['"a dog"']),
        (["a dog", "a cat"], ["a dog", "a cat"]),
        (None, [None]),
        (3, [3]),
    ],
)
def test_lists_written_as_text_are_lists(cell: Any, captions: list[Any]) -> None:
    assert as_captions(cell) == captions


@pytest.mark.parametrize(
    "text", ["['a', 'b' 'c']", "['a' ... 'b']", "['a', 'b", "[a, b]", "[" * 100_000 + "]" * 100_000]
)
def test_other_texts_are_no_lists(text: str) -> None:
    assert written_list(text) is None


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        ("image title caption_1 caption_2", "caption_1 caption_2"),
        ("title image caption.1 caption", "caption.1 caption"),
        ("caption_0 captions", "captions"),
        ("filename raw split", "raw"),
        ("Image Caption", "Caption"),
        ("TEXT URL title", "TEXT"),
        ("text caption", "caption"),
        ("image title", "title"),
        ("image comment_number comment", "comment"),
        ("caption_id sentence1 sentence2", "sentence1 sentence2"),
        ("image texts text", "texts"),
    ],
)
def test_which_columns_are_captions(names: str, columns: str) -> None:
    assert usual_captions(names.split(), "here") == columns.split()


# Tables.

TWO = {"a.png": ["one"], "b.png": ["two"]}
TEXT = "image,caption\na.png,one\nb.png,twö\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le-mark", "utf-16-be-mark"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "txt"])
def test_byte_order_marks(folder: Path, encoding: str, kind: str) -> None:
    def written(text: str) -> bytes:
        if encoding.endswith("-mark"):
            return ("\ufeff" + text).encode(encoding.removesuffix("-mark"))
        return text.encode(encoding)

    rows = {"a.png": ["one"], "b.png": ["twö"]}
    if kind == "csv":
        reader: Any = CsvTable(table(folder, written(TEXT.replace("\n", "\r\n"))))
    elif kind == "jsonl":
        text = "\n\n".join(
            json.dumps({"image": key, "caption": said}, ensure_ascii=False) for key, said in rows.items()
        )
        reader = JsonLines(table(folder, written(text + "\n"), "table.jsonl"))
    elif kind == "json":
        images = [{"filename": key, "split": "all", "sentences": said} for key, said in rows.items()]
        reader = KarpathyJson(table(folder, written(json.dumps({"images": images}))), folder, split="all")
    else:
        for key, said in rows.items():
            (folder / key).with_suffix(".txt").write_bytes(written(said[0] + "\r\n"))
        reader = ImageFolder(folder)
    assert read(reader) == rows


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nimage;caption\na.png;one\nb.png;two\n",
        "\ufeffsep=;\r\nimage;caption\r\na.png;one\r\nb.png;two\r\n",
        "sep=,\nimage,caption\na.png,one\nb.png,two\n",
        "image;caption\na.png;one\nb.png;two\n",
        "image\tcaption\na.png\tone\nb.png\ttwo\n",
        '"image","caption"\n"a.png","one"\n"b.png","two"\n',
        'image,caption,"note; or | none"\na.png,one,x\nb.png,two,y\n',
        "image,caption\ra.png,one\rb.png,two\r",
        "image,caption,,\na.png,one,,\nb.png,two,,\n,,,\n",
        ",image,caption\n0,a.png,one\n1,b.png,two\n",
        "Image,Caption\na.png,one\nb.png,two\n",
        "image,caption\n a.png ,one\n.\\b.png,two\n",
        "image,title,caption_1,caption_2\na.png,A,one,nan\nb.png,B,,two\n",
        "image,caption_0,caption_1,caption_2\na.png,one,None,<NA>\nb.png,null,two,NaN\n",
        'image,caption_0,caption_1\na.png,[\'one\'],[]\nb.png,"[""two""]",\n',
        "image,caption\na.png,one\n./b.png,two\n",
    ],
)
def test_tables_as_programs_write_them(folder: Path, text: str) -> None:
    assert read(CsvTable(table(folder, text))) == TWO
    _, splits = open_splits(folder / "table.csv")
    assert audit(splits) == []


def test_names_are_taken_as_they_are_where_such_a_file_is(folder: Path) -> None:
    for name in ("c.png ", " d.png", "e\\f.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    (folder / "g").mkdir()
    (folder / "g" / "h.png").write_bytes((folder / "a.png").read_bytes())
    reader = CsvTable(table(folder, "image\tcaption\nc.png \tone\n d.png\ttwo\ne\\f.png\tthree\ng\\h.png\tfour\n"))
    # The spaces before a value belong to the table.
    assert [reader.key(i) for i in range(4)] == ["c.png ", "d.png", "e\\f.png", "g/h.png"]
    assert reader.image(0).size == reader.image(3).size == (4, 4)


def test_lines_of_json_may_have_more_captions_than_the_first(folder: Path) -> None:
    rows = [
        {"image": "a.png", "caption_0": "one"},
        {"image": "b.png", "caption_0": "two", "caption_1": "three", "caption_2": None},
    ]
    assert read(JsonLines(table(folder, "\n".join(map(json.dumps, rows)), "t.jsonl"))) == {
        "a.png": ["one"],
        "b.png": ["two", "three"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"image,caption\r\na.png,caf\xe9\r\nb.png,two",
            r"a.png: caption 0 is 'caf\\udce9', which is no valid Unicode \(byte 0xe9\)",
        ),
        (
            "image,caption\na.png,nan\nb.png,two",
            "a.png: caption 0 is 'nan', which stands for a missing one; give it words",
        ),
        (
            "image,caption\na.png,one\na.png,None\nb.png,two",
            "a.png: caption 1 is 'None', which stands for a missing one",
        ),
        ("image,caption\na.png,\nb.png,two", "a.png: caption 0 is empty"),
        ("image,caption\na.png,\u200b\nb.png,two", r"a.png: caption 0 is '\\u200b', which shows nothing"),
        (
            "image,caption_0,caption_1\na.png,nan,\nb.png,two,",
            r"a.png: expected a list of at least one caption, got \[\]",
        ),
        ("image,captions\na.png,\"['a', None]\"\nb.png,\"['b']\"", "a.png: caption 1 is NoneType None"),
        ("image,captions\na.png,\"['a' ... 'b']\"\nb.png,['b']", "a.png: caption 0 is .*, a list written as text"),
        (
            "image,captions\na.png,\"array(['a', 'b'], dtype=object)\"\nb.png,['b']",
            "caption 0 is .*, a list written as text",
        ),
        ("image,captions\na.png,\"{'en': 'a'}\"\nb.png,b", "caption 0 is .*, a list written as text"),
        ("image,captions\na.png,\"['a dog', 'a c\"\nb.png,b", "caption 0 is .*, a list written as text"),
        ("image,captions\na.png,\"[['a', 'b']]\"\nb.png,b", "a.png: caption 0 is list"),
    ],
)
def test_captions_that_are_none_are_found_and_refused(folder: Path, content: str | bytes, message: str) -> None:
    path = table(folder, content)
    with pytest.raises(ValueError, match=message):
        open_split(path, "all")
    (finding,) = audit(open_splits(path)[1])
    assert finding.kind in ("captions", "no captions") and finding.cases[0].startswith("all/a.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,caption\na.png,one\nb.png,two".encode("utf-16-le"),
            "table.csv line 1: a byte of zero, which no text holds; save the file as",
        ),
        (b"image,caption\na.png,one\nb.png,t\0wo", "table.csv line 3: a byte of zero"),
        ("image,caption\nnan,one\n", "line 2: expected a picture's name in UTF-8, got 'nan'"),
        (
            "image,caption\nC:\\photos\\a.png,one\n",
            r"line 2: 'C:\\\\photos\\\\a.png' starts at the drive C: of Windows",
        ),
        ("image,caption\n..\\a.png,one\n", r"'..\\\\a.png' leaves|'../a.png' leaves"),
        ("a.png,one\nb.png,two\n", "the first line of a table names its columns"),
        ("image,caption,caption\na.png,one,two\n", "two columns have one name"),
        (
            "image,caption,split\na.png,one,all\nb.png,two,\n",
            "line 3: column 'split' is '', which is no split; give every row one",
        ),
        ("image,caption,Split\na.png,one,all\nb.png,two,nan\n", "line 3: column 'Split' is 'nan', which is no split"),
        ("image,caption\na.png,one,two\n", "line 2: 3 values separated by ','"),
        ("sep=;\nimage;caption\na.png;one;two\n", "line 3: 3 values separated by ';'"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(folder: Path, content: str | bytes, message: str) -> None:
    path = table(folder, content)
    for opened in (lambda: open_split(path, "all"), lambda: open_splits(path)):
        with pytest.raises(ValueError, match=message):
            opened()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "int 3"),
        (None, "NoneType None"),
        (float("nan"), "float nan"),
        ([["a"]], "list"),
        ({"en": "a"}, "dict"),
        (True, "bool"),
    ],
)
def test_captions_of_json_that_are_no_text(folder: Path, value: Any, message: str) -> None:
    rows = [{"image": "a.png", "caption": value}, {"image": "b.png", "caption": "two"}]
    lines = table(folder, "\n".join(map(json.dumps, rows)), "table.jsonl")
    whole = value if isinstance(value, list) else [value]
    images = [
        {"filename": "a.png", "split": "all", "sentences": whole},
        {"filename": "b.png", "split": "all", "sentences": ["b"]},
    ]
    karpathy = table(folder, json.dumps({"images": images}), "k.json")
    for path in (lines, karpathy):
        root = folder
        with pytest.raises(
            ValueError,
            match="a.png: caption 0 is " + message if not isinstance(value, dict) or path == lines else "a.png",
        ):
            open_split(path, "all", root)
        assert [finding.kind for finding in audit(open_splits(path, root)[1])] == ["captions"]


def test_an_object_that_gives_a_key_twice_is_refused(folder: Path) -> None:
    path = table(folder, '{"image": "a.png", "caption": "one", "caption": "two"}', "table.jsonl")
    with pytest.raises(
        ValueError, match="table.jsonl line 1 is no JSON: one object has the key 'caption' twice; give it once"
    ):
        JsonLines(path)


def test_one_picture_in_two_splits_is_found(folder: Path) -> None:
    images = [
        {"filename": "a.png", "split": split, "sentences": [f"one {split}", split]}
        for split in ("train", "train", "test")
    ]
    path = table(folder, json.dumps({"images": images}), "k.json")
    (finding,) = audit(open_splits(path, folder)[1])
    assert finding.kind == "shared pictures" and finding.cases == ["train/a.png = test/a.png"]


def test_rows_of_a_dataset_follow_the_same_rules(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [str(folder / "a.png"), str(folder / "b.png")],
        "title": ["A", "B"],
        "caption_0": ["one", "['two', 'three']"],
        "caption_1": [None, "four"],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    assert list(read(HuggingFaceDataset(data)).values()) == [["one"], ["two", "three", "four"]]
    unnamed = data.add_column("name", ["x", None])
    with pytest.raises(ValueError, match="row 1: column 'name' is None; give every picture a name"):
        HuggingFaceDataset(unnamed, key="name")
    with pytest.raises(ValueError, match="none of the columns .* is called captions, caption"):
        HuggingFaceDataset(data.select_columns(["image"]))


# Tars and folders.


def test_names_in_a_shard(tmp_path: Path) -> None:
    words = ("plain", "PXL_20230101_123456789.MP", "photo v1.5 a", "./sub/1.2", "é.x")
    colours = ("red", "green", "blue", "white", "black")
    members = [(f"{name}.JPG", png(colour)) for name, colour in zip(words, colours)]
    members += [(name.removeprefix("./") + ".txt", name.encode()) for name in words]
    hidden = ["._plain.JPG", "__MACOSX/._plain.JPG", ".DS_Store", "sub/._1.2.txt", "@eaDir/plain.JPG"]
    reader = WebDatasetTars(tar(tmp_path / "t-0.tar", [(name, b"x") for name in hidden] + members), split="t")
    assert read(reader) == {f"t-0.tar/{name.removeprefix('./')}": [name] for name in words}
    assert audit({"t": reader}) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", b"one")], "t-0.tar/1: the shard has captions of this name and no picture"),
        (
            [("1.png", png("red")), ("1.jpg", png("blue")), ("1.txt", b"a")],
            "t-0.tar/1: the shard has several pictures of this name, 1.png, 1.jpg",
        ),
        ([("1.png", png("red"))], r"t-0.tar/1: expected a list of at least one caption, got \[\]"),
        ([("1.png", png("red")), ("1.json", b'{"caption": ["a", "b"]}')], "t-0.tar/1: caption 0 is list"),
        ([("1.png", png("red")), ("1.txt", b"['a', 'b']")], "t-0.tar/1: caption 0 is .*, a list written as text"),
        ([("1.png", png("red")), ("1.json", b'{"caption": NaN}')], "t-0.tar/1: caption 0 is float nan"),
    ],
)
def test_samples_of_a_shard_that_lack_a_part(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = tar(tmp_path / "t-0.tar", [("0.png", png("green")), ("0.txt", b"fine"), *members])
    with pytest.raises(ValueError, match=message):
        open_split(path, "t")
    findings = audit(open_splits(path)[1])
    assert any(case.startswith("t/t-0.tar/1") for finding in findings for case in finding.cases)


def test_what_is_neither_picture_nor_caption_is_named(tmp_path: Path) -> None:
    members = [("0.png", png("green")), ("0.txt", b"fine"), ("0.cls", b"3"), ("README", b"x"), ("0.caption", b"y")]
    (finding,) = audit(open_splits(tar(tmp_path / "t-0.tar", members))[1])
    assert finding.kind == "other files" and finding.cases == [
        "t/t-0.tar/0.cls",
        "t/t-0.tar/README",
        "t/t-0.tar/0.caption",
    ]
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in {
        "v1.5 a.png": png("red"),
        "v1.5 a.TXT": b"one",
        "b.png.txt": b"two",
        "b.png": png("blue"),
    }.items():
        (photos / name).write_bytes(content)
    findings = audit(open_splits(photos)[1])
    assert {finding.kind: finding.cases for finding in findings} == {
        "no captions": ["all/b.png"],
        "other files": ["all/b.png.txt"],
    }


def test_a_column_of_splits_in_capitals(folder: Path) -> None:
    _, splits = open_splits(table(folder, "Image,Caption,Split\na.png,one,train\nb.png,two,2026\n"))
    assert {name: read(pairs) for name, pairs in splits.items()} == {
        "train": {"a.png": ["one"]},
        "2026": {"b.png": ["two"]},
    }


@pytest.mark.parametrize("missing", ["nan", "", "None", "<NA>"])
def test_missing_labels_are_none(folder: Path, missing: str) -> None:
    rows = table(folder, f"image,caption,kind\na.png,one,{missing}\nb.png,two,x;{missing};y\n")
    reader = CsvTable(rows, labels="kind")
    assert [reader.labels(i) for i in range(2)] == [frozenset(), {"x", "y"}]
    listed = CsvTable(table(folder, "image,caption,kind\na.png,one,\"['x', 'y']\"\n"), labels="kind")
    assert listed.labels(0) == {"x", "y"}


def test_a_folder_of_a_picture_may_be_null(folder: Path) -> None:
    image = {"filename": "a.png", "filepath": None, "split": "all", "sentences": ["one"]}
    assert read(KarpathyJson(table(folder, json.dumps({"images": [image]}), "k.json"), folder, split="all")) == {
        "a.png": ["one"]
    }
    path = table(folder, json.dumps({"images": [image | {"filepath": 3}]}), "k.json")
    with pytest.raises(ValueError, match=r"images\[0\] needs a filename and a split as strings"):
        KarpathyJson(path, folder, split="all")


def test_tables_in_folders_are_not_overlooked(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "a.png").rename(folder / "train" / "a.png")
    inner = table(folder / "train", '{"file_name": "a.png", "text": "one"}\n', "metadata.jsonl")
    with pytest.raises(
        ValueError, match="holds the table train/metadata.jsonl in the folder of a split; give the path of one table"
    ):
        open_splits(folder)
    assert read(open_splits(inner)[1]["all"]) == {"a.png": ["one"]}
    (finding,) = audit({"train": ImageFolder(folder, split="train")})
    assert finding.kind == "other files" and finding.cases == ["train/metadata.jsonl"]


def test_karpathys_json_may_have_the_name_of_coco(folder: Path) -> None:
    images = [{"filename": "a.png", "split": "all", "sentences": ["one"]}]
    table(folder, json.dumps({"images": images}), "captions_mine.json")
    assert open_splits(folder, folder)[0] == "KarpathyJson"


# All verbs alike.


@pytest.mark.parametrize(
    "verb",
    [
        ("evaluate", "--out", "out"),
        ("mine", "--out", "mined.jsonl"),
        ("search", "tune", "--recall", "0.5"),
        ("search", "calibrate", "--out", "c.json"),
        ("survey", "--train_split", "train", "--out", "survey"),
    ],
)
@pytest.mark.parametrize("fault", ["caption", "picture"])
def test_verbs_refuse_alike(
    verb: tuple[str, ...], fault: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    bad = "a.png,nan" if fault == "caption" else "gone.png,one"
    path = table(folder, f"image,caption,split\n{bad},train\nb.png,two,train\n")
    options = {option.partition("=")[0] for option in verb}
    model = [] if verb[0] == "survey" else ["--model", "no/model"]
    split = ["--split", "train"] if "--train_split" not in options else []
    status, _, error = run(capsys, *verb, *model, "--data", path, *split)
    assert status == 1, error
    message = (
        "a.png: caption 0 is 'nan', which stands for a missing one" if fault == "caption" else f"{folder / 'gone.png'}"
    )
    assert message in error and len(error.splitlines()) == 1
    status, output, _ = run(capsys, "data", "check", path)
    assert status == 1 and ("a.png: caption 0 is 'nan'" in output or "gone.png" in output)
