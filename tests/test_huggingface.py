"""Proves that Hugging Face datasets read like any other split: in memory, saved on disk, one row a picture or one a caption."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimodal.data import HuggingFaceDataset, check

datasets = pytest.importorskip("datasets")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), np.uint8)


def table(captions: list[Any], **columns: list[Any]) -> Any:
    """A dataset with the pictures in turn."""
    pictures = [Image.fromarray(PIXELS[i % 3]) for i in range(len(captions))]
    made = datasets.Dataset.from_dict({"image": pictures, "caption": captions, **columns})
    return made.cast_column("image", datasets.Image())


def content(reader: HuggingFaceDataset) -> list[list[str]]:
    return [reader.captions(i) for i in range(len(reader))]


def test_in_memory() -> None:
    reader = HuggingFaceDataset(table(["one", "two"]), split="train")
    assert content(reader) == [["one"], ["two"]] and reader.split == "train"
    assert [reader.key(i) for i in range(2)] == ["000000", "000001"] and check(reader) == []
    for i in range(2):
        assert (np.asarray(reader.image(i)) == PIXELS[i]).all()
    assert content(HuggingFaceDataset(table([["one", "two"], ["three"]]))) == [["one", "two"], ["three"]]


def test_saved_on_disk(tmp_path: Path) -> None:
    table(["one"]).save_to_disk(str(tmp_path / "single"))
    reader = HuggingFaceDataset(tmp_path / "single")
    assert content(reader) == [["one"]] and reader.name == "single"
    both = datasets.DatasetDict({"train": table(["one", "two"]), "test": table(["three"])})
    both.save_to_disk(str(tmp_path / "both"))
    assert content(HuggingFaceDataset(str(tmp_path / "both"), split="test")) == [["three"]]
    assert content(HuggingFaceDataset(both, split="train")) == [["one"], ["two"]]
    for split in (None, "dev"):
        with pytest.raises(ValueError, match=f"there is no split {split!r}; it has: train, test"):
            HuggingFaceDataset(both, split=split)


def test_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
    reader = HuggingFaceDataset(str(tmp_path / "pictures"), split="train", captions="text")
    assert content(reader) == [["one"]] and (np.asarray(reader.image(0)) == PIXELS[0]).all()


def test_rows_of_one_key_are_one_image() -> None:
    made = table(["one", "two", "three", "four"], photo=[7, 8, 9, 7], kind=[["x"], ["y"], [], ["z"]])
    reader = HuggingFaceDataset(made, key="photo", labels="kind")
    assert content(reader) == [["one", "four"], ["two"], ["three"]]
    assert [reader.key(i) for i in range(3)] == ["7", "8", "9"]
    assert [reader.labels(i) for i in range(3)] == [{"x", "z"}, {"y"}, frozenset()]
    assert (np.asarray(reader.image(0)) == PIXELS[0]).all()


def test_class_numbers_become_names_and_captions_may_have_columns() -> None:
    made = table(["one", "two"], other=["eins", "zwei"], kind=[1, 0])
    made = made.cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    reader = HuggingFaceDataset(made.with_format("numpy"), captions=["caption", "other"], labels="kind")
    assert content(reader) == [["one", "eins"], ["two", "zwei"]]
    assert [reader.labels(i) for i in range(2)] == [{"dog"}, {"cat"}]


def test_bad_rows_follow_the_policy() -> None:
    made = table(["one", "", "three", "four"])
    rows = [made.cast_column("image", datasets.Image(decode=False))[i]["image"] for i in range(4)]
    rows[2], rows[3] = {"bytes": rows[2]["bytes"][:60], "path": None}, None
    broken = datasets.Dataset.from_dict({"image": rows, "caption": made["caption"][:]}, features=made.features)
    with pytest.raises(ValueError, match="000001: caption 0 is empty.* pass on_error='skip'"):
        HuggingFaceDataset(broken)
    with pytest.warns(UserWarning, match="3 of 4 samples"):
        reader = HuggingFaceDataset(broken, on_error="skip")
    assert content(reader) == [["one"]]
    reasons = [str(problem) for problem in reader.problems]
    assert "000002: the 60 bytes given as an image is truncated" in reasons[1]
    assert "column 'image' holds no picture" in reasons[2]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = table(["one"])
    with pytest.raises(ValueError, match=r"there is no column 'text'; the columns are \['image', 'caption'\]"):
        HuggingFaceDataset(made, captions="text")
    with pytest.raises(ValueError, match=r"column 'caption' holds .*not pictures; dataset.cast_column\('caption'"):
        HuggingFaceDataset(made, image="caption")
    with pytest.raises(ValueError, match="000000: caption 0 is int 3; expected a string"):
        HuggingFaceDataset(table([3]))
    with pytest.raises(
        TypeError, match="expected a datasets.Dataset, .* got IterableDataset; a streamed dataset has no"
    ):
        HuggingFaceDataset(made.to_iterable_dataset())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'unimodal\[datasets\]'"):
        HuggingFaceDataset(tmp_path)
