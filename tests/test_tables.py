"""Proves that tables read as people write them: any delimiter, one row a picture or one a caption, columns by name; and that every
row that cannot be read as it stands is an error that names its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from unimodal.data import CsvTable, JsonLines, check
from unimodal.data.module import PairData


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them in a folder of its own."""
    (tmp_path / "sub").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "green"), ("sub/c.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    return tmp_path


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return folder / name


def write_lines(folder: Path, *rows: Any) -> Path:
    return write(folder, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "table.jsonl")


def content(reader: Any) -> list[tuple[str, list[str]]]:
    return [(reader.key(i), reader.captions(i)) for i in range(len(reader))]


# What tables look like.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,caption\na.png,one\nb.png,two\n", [("a.png", ["one"]), ("b.png", ["two"])]),
        ("filepath\ttitle\na.png\tone, and more\n", [("a.png", ["one, and more"])]),
        ("image_name| comment_number| comment\na.png| 0| one , two\n", [("a.png", ["one , two"])]),
        ("\ufefffile_name;text\r\na.png;one\r\n\r\nb.png;two\r\n", [("a.png", ["one"]), ("b.png", ["two"])]),
        ('image,caption\na.png,"one, ""two""\nthree"\n', [("a.png", ['one, "two"\nthree'])]),
        (
            "id,image,caption_0,caption_1\n7,a.png,one,two\n8,b.png,three,\n",
            [("a.png", ["one", "two"]), ("b.png", ["three"])],
        ),
        ("image,caption\nsub/c.png,一只猫\n", [("sub/c.png", ["一只猫"])]),
    ],
)
def test_tables_of_all_kinds(folder: Path, text: str, expected: list) -> None:
    reader = CsvTable(write(folder, text))
    assert content(reader) == expected
    assert (reader.name, reader.split, check(reader)) == ("table", "all", [])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_one_picture_are_one_image(folder: Path, kind: str) -> None:
    rows = [("a.png", "one"), ("b.png", "two"), ("./a.png", "three"), (str(folder / "a.png"), "one")]
    if kind == "csv":
        reader: Any = CsvTable(write(folder, "image,caption\n" + "".join(f"{a},{b}\n" for a, b in rows)))
    else:
        reader = JsonLines(write_lines(folder, *({"image": a, "caption": b} for a, b in rows)))
    assert content(reader) == [("a.png", ["one", "three", "one"]), ("b.png", ["two"])]
    assert [reader.image_id(i) for i in range(2)] == [0, 1]


def test_lines_of_json(folder: Path) -> None:
    rows = [{"file_name": "a.png", "text": ["one", "two\u2028"]}, {"file_name": "sub/c.png", "text": "three"}]
    reader = JsonLines(write_lines(folder, *rows))
    assert content(reader) == [("a.png", ["one", "two\u2028"]), ("sub/c.png", ["three"])]
    assert reader.image(1).getpixel((0, 0)) == (0, 0, 255)


def test_columns_by_name_splits_and_root(folder: Path) -> None:
    (folder / "tables").mkdir()
    text = "p,en,de,part,kind\na.png,one,eins,train,x;y\nb.png,two,zwei,val,\nsub/c.png,three,drei,dev,x\na.png,four,vier,train,z\n"
    path = write(folder / "tables", text)
    columns: Any = {"image": "p", "captions": ["en", "de"], "labels": "kind", "split_column": "part"}
    train = CsvTable(path, folder, split="train", **columns)
    assert content(train) == [("a.png", ["one", "eins", "four", "vier"])] and train.labels(0) == {"x", "y", "z"}
    both = CsvTable(path, folder, split="val+dev", **columns)
    assert both.split == "val+dev" and [both.key(i) for i in range(2)] == ["b.png", "sub/c.png"]
    assert [both.labels(i) for i in range(2)] == [frozenset(), frozenset({"x"})]
    assert both.image(0).getpixel((0, 0)) == (0, 128, 0)
    with pytest.raises(ValueError, match="table.csv has no split 'test'; it has: dev, train, val"):
        CsvTable(path, folder, split="test", **columns)


def test_labels_of_json_lines(folder: Path) -> None:
    rows = [{"image": "a.png", "caption": "one", "tags": ["x", 3]}, {"image": "b.png", "caption": "two", "tags": "y"}]
    reader = JsonLines(write_lines(folder, *rows), labels="tags")
    assert [reader.labels(i) for i in range(2)] == [{"x", "3"}, {"y"}]


# What is wrong with them.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.png,one,two\n", "line 2: 3 values separated by ',' for the 2 columns .* in double quotes"),
        ("image,caption\na.png\n", "line 2: 1 values separated by ','"),
        ('image,caption\na.png,"one\nb.png,two\n', "is no CSV: unexpected end of data; a double quote"),
        ('image,caption\na.png,"one" two\n', "line 2 is no CSV"),
        ("image,image\na.png,one\n", "two columns have one name"),
        ("x,caption\na.png,one\n", r"none of the columns \['x', 'caption'\] is called image, .*; name it with image="),
        ("image,x\na.png,one\n", "is called captions, caption, .*; name it with captions="),
        ("image,caption\n,one\n", "line 2: expected a picture's name in UTF-8, got ''"),
        ("image,caption\ncaf\udce9.png,one\n", "line 2: expected a picture's name in UTF-8, got 'caf"),
        ("image,caption\nhttps://host/a.jpg,one\n", "'https://host/a.jpg' is a URL; download the pictures first"),
        (
            "image,caption\n" + '"data:image/png;base64,' + "A" * 900 + '",one\n',
            r"'data:image/png;base64,A{18}'\.\.\. \(922 char.* is a URL",
        ),
        ("image,caption\n../a.png,one\n", "'../a.png' leaves .*; expected a path inside it"),
        ("image,caption\n/etc/a.png,one\n", "'/etc/a.png' leaves"),
        ("image,caption\n", "table has no samples in split 'all'"),
        ("", "table has no samples"),
    ],
)
def test_bad_tables_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CsvTable(write(folder, text), on_error="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "b.png"}', "line 2: there is no column of captions; the columns are .*; give another captions"),
        ('{"caption": "a"}', "line 2: there is no column 'image'"),
        ('{"image": 3, "caption": "a"}', "line 2: expected a picture's name in UTF-8, got 3"),
        ("[]", r"line 2: expected an object with a picture and its captions, got \[\]"),
        ("{half", "line 2 is no JSON"),
    ],
)
def test_bad_lines_of_json_are_named(folder: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JsonLines(write(folder, '{"image": "a.png", "caption": "a"}\n' + line, "table.jsonl"))


def test_no_split_column(folder: Path) -> None:
    with pytest.raises(ValueError, match="line 2: there is no column 'split'; .*; give another split_column"):
        CsvTable(write(folder, "image,caption\na.png,one\n"), split="train")
    with pytest.raises(FileNotFoundError, match="gone.csv"):
        CsvTable(folder / "gone.csv")


@pytest.mark.parametrize(("caption", "fault"), [(" ", "caption 0 is empty"), ("caf\udce9", ".*no valid Unicode")])
def test_bad_captions_follow_the_policy(folder: Path, caption: str, fault: str) -> None:
    path = write(folder, f"image,caption\na.png,{caption}\nb.png,two\ngone.png,three\n")
    with pytest.raises(ValueError, match=f"a.png: {fault}.* pass on_error='skip'"):
        CsvTable(path)
    with pytest.warns(UserWarning, match="2 of 3 samples of table all are bad and left out: a.png: ") as caught:
        reader = CsvTable(path, on_error="skip")
    assert content(reader) == [("b.png", ["two"])] and caught[0].filename == __file__
    assert [problem.key for problem in reader.problems] == ["a.png", "gone.png"]


@pytest.mark.parametrize("caption", [3, None, [], ["a", 3]])
def test_captions_of_json_lines_are_strings(folder: Path, caption: Any) -> None:
    with pytest.raises(ValueError, match="a.png: (expected a list of at least one|caption . is (int|NoneType))"):
        JsonLines(write_lines(folder, {"image": "a.png", "caption": caption}))


# Configurations.


@pytest.mark.parametrize(
    ("reader", "arguments"),
    [
        ("CsvTable", {"path": "x.csv", "captions": ["en", "de"], "labels": "kind", "split": "train"}),
        ("JsonLines", {"path": "x.jsonl", "root": "pictures", "captions": "text"}),
        ("KarpathyJson", {"path": "x.json", "split": "test", "captions_per_image": 5, "fold": [0, 5]}),
        ("ImageFolder", {"root": "photos"}),
        ("WebDatasetTars", {"pattern": "x-*.tar", "split": "train", "on_error": "skip"}),
        ("HuggingFaceDataset", {"dataset": "nobody/nothing", "split": "train", "revision": "main"}),
        ("PascalSentence", {"root": "x", "split": "val", "seed": 1}),
        ("Wikipedia", {"root": "x", "split": "test"}),
        ("NusWide", {"root": "x", "split": "test", "concepts": ["sky", "water"]}),
    ],
)
def test_every_reader_is_named_in_a_configuration(reader: str, arguments: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PairData, "data")
    given = {"class_path": f"unimodal.data.{reader}", "init_args": arguments}
    parsed = parser.parse_object({"data": {"train": given}}).data.train
    assert {key: parsed.init_args[key] for key in arguments} == arguments | (
        {"fold": (0, 5)} if "fold" in arguments else {}
    )


def test_a_table_from_a_configuration(folder: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PairData, "data")
    path = write(folder, "image,caption\na.png,one\nb.png,two\n")
    given = {"class_path": "unimodal.data.CsvTable", "init_args": {"path": str(path)}}
    data = parser.instantiate(parser.parse_object({"data": {"train": given}})).data
    assert content(data.train) == [("a.png", ["one"]), ("b.png", ["two"])]
