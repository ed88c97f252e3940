"""Proves that COCO's own annotations are read with all their captions and ids, found by their path, and scored."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_cli import run
from toy import toy_model, toy_processor

from unimodal.data import CocoCaptions, KarpathyJson, audit, open_splits, write_karpathy
from unimodal.data.guess import open_split
from unimodal.hub import save_checkpoint

COUNTS = {139: 5, 285: 6, 632: 7, 724: 5}


def content(counts: dict[int, int] = COUNTS) -> dict[str, Any]:
    """COCO's layout: annotations of all images are mixed, ids are no places."""
    images = [{"id": i, "file_name": f"{i:012d}.png", "height": 4, "width": 4, "license": 2} for i in counts]
    each = [(c, i) for i, count in counts.items() for c in range(count)]
    annotations = [
        {"image_id": i, "id": 1000 + n, "caption": f"caption {c} of {i}"} for n, (c, i) in enumerate(sorted(each))
    ]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations}


def coco(folder: Path, split: str = "val2017", data: Any = None, pictures: str | None = None) -> Path:
    """Annotations and pictures as COCO's archives unpack."""
    data = content() if data is None else data
    place = folder / (split if pictures is None else pictures)
    place.mkdir(parents=True, exist_ok=True)
    for n, one in enumerate(data["images"] if isinstance(data, dict) else []):
        if isinstance(one, dict) and isinstance(one.get("file_name"), str):
            Image.new("RGB", (4, 4), (10 * n, 60 if split == "val2017" else 90, 30)).save(
                place / one["file_name"].replace("\\", "/")
            )
    path = folder / "annotations" / f"captions_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def test_all_captions_and_ids(tmp_path: Path) -> None:
    reader = CocoCaptions(coco(tmp_path))
    assert (reader.name, reader.split, len(reader)) == ("coco", "val2017", 4)
    assert [len(reader.captions(i)) for i in range(4)] == [5, 6, 7, 5]
    assert reader.key(1) == "000000000285.png" and reader.image(1).size == (4, 4)
    assert reader.captions(2) == [f"caption {c} of 632" for c in range(7)]
    image, ids = reader.coco_ids(2)
    told = {one["id"]: one["caption"] for one in content()["annotations"]}
    assert image == 632 and [told[one] for one in ids] == reader.captions(2)
    with pytest.warns(
        UserWarning, match="3 captions of 2 images of coco val2017 come after the first 5 and are left out"
    ):
        five = CocoCaptions(coco(tmp_path), captions_per_image=5)
    assert [len(five.captions(i)) for i in range(4)] == [5] * 4 and five.coco_ids(2) == (632, ids[:5])


def test_found_by_path(tmp_path: Path) -> None:
    coco(tmp_path, "train2017", content({7: 5, 9: 6}))
    path = coco(tmp_path)
    for place, splits in (
        (tmp_path, ["train2017", "val2017"]),
        (path.parent, ["train2017", "val2017"]),
        (path, ["val2017"]),
    ):
        name, opened = open_splits(place)
        assert (name, list(opened)) == ("CocoCaptions", splits) and audit(opened) == []
    assert len(open_split(tmp_path, "train2017")) == 2
    with pytest.raises(ValueError, match="has no split 'val'; it has: train2017, val2017"):
        open_split(tmp_path, "val")


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_pictures_elsewhere(tmp_path: Path, place: str) -> None:
    path = coco(tmp_path, pictures="annotations/val2017" if place == "beside" else "photos")
    root = tmp_path / "photos" if place == "elsewhere" else None
    assert audit(open_splits(path, root)[1]) == []
    if place == "elsewhere":
        with pytest.raises(FileNotFoundError, match="4 of 4 files of coco val2017 are not there"):
            open_split(path, "val2017")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["images"].append(dict(data["images"][0])),
            r"images\[4\] has the id 139 of an earlier entry",
        ),
        (
            lambda data: data["annotations"].append(dict(data["annotations"][3])),
            r"annotations\[23\] has the id 1003 of an earlier entry",
        ),
        (
            lambda data: data["annotations"][2].update(image_id=1),
            r"annotations\[2\] is of image 1, which is not among the images",
        ),
        (
            lambda data: data["annotations"][0].pop("caption"),
            r"annotations\[0\] needs id, image_id, caption, .* other annotations have none",
        ),
        (lambda data: data["images"][0].update(id="139"), r"images\[0\] needs id, file_name, got"),
        (lambda data: data["images"][0].update(file_name="../a.png"), "'../a.png' leaves"),
        (lambda data: data.pop("images"), "expected an object with the lists 'images' and 'annotations'"),
        (
            lambda data: data["annotations"][0].update(caption=3),
            "000000000139.png: caption 0 is int 3; expected a string",
        ),
        (lambda data: data["annotations"][0].update(caption=" "), "000000000139.png: caption 0 is empty"),
        (
            lambda data: data["images"].append({"id": 3, "file_name": "3.png"}),
            r"3.png: expected a list of at least one caption, got \[\]",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Any, message: str) -> None:
    data = content()
    change(data)
    path = coco(tmp_path)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        CocoCaptions(path)


def test_ids_are_written(tmp_path: Path) -> None:
    reader = CocoCaptions(coco(tmp_path))
    copy = KarpathyJson(write_karpathy({"val": reader}, tmp_path / "copy"), split="val")
    assert [copy.coco_ids(i) for i in range(4)] == [reader.coco_ids(i) for i in range(4)]
    assert [copy.captions(i) for i in range(4)] == [reader.captions(i) for i in range(4)]


def test_entries_of_one_caption_keep_their_ids(tmp_path: Path) -> None:
    entries = [
        {
            "filename": f"{i}.png",
            "split": "test",
            "cocoid": i,
            "sentences": [{"raw": f"{c} of {i}", "sentid": 10 * i + c}],
        }
        for c in range(3)
        for i in (7, 9)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": entries}))
    reader = KarpathyJson(tmp_path / "k.json", split="test")
    assert [reader.coco_ids(i) for i in range(2)] == [(7, [70, 71, 72]), (9, [90, 91, 92])]
    entries[1]["cocoid"] = 8
    (tmp_path / "k.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(ValueError, match="9.png of k test lacks COCO's ids"):
        KarpathyJson(tmp_path / "k.json", split="test").coco_ids(1)


@pytest.mark.parametrize(
    "wrong", [{"root": 3}, {"split": 3}, {"captions_per_image": "five"}, {"captions_per_image": 0}]
)
def test_arguments_are_checked(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        CocoCaptions(coco(tmp_path), **wrong)


def test_the_other_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="COCO's own annotations, which CocoCaptions reads"):
        KarpathyJson(coco(tmp_path), split="val2017")


def test_coco_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(toy_model(), toy_processor(), tmp_path / "model")
    coco(tmp_path / "coco")
    arguments = ("--model", tmp_path / "model", "--data", tmp_path / "coco", "--split", "val2017")
    with pytest.warns(UserWarning, match="3 captions of 2 images"):
        status, output, error = run(
            capsys, "evaluate", *arguments, "--out", tmp_path / "out", "--captions_per_image", "5"
        )
    assert status == 0, error
    protocol = json.loads((tmp_path / "out" / "results.json").read_text())["first"]["protocol"]
    assert (protocol["dataset"], protocol["split"], protocol["images"], protocol["captions"]) == (
        "coco",
        "val2017",
        4,
        20,
    )
