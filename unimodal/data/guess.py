"""The readers that fit a path: which format lies there, and which splits it has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimodal.data.coco import CocoCaptions, split_of
from unimodal.data.folders import visible
from unimodal.data.huggingface import HuggingFaceDataset, is_saved
from unimodal.data.labelled import NusWide, PascalSentence, Wikipedia
from unimodal.data.pairs import Pairs
from unimodal.data.readers import TABLES, ImageFolder, KarpathyJson, Listed, OnError
from unimodal.data.scenes import Scenes
from unimodal.data.shards import WebDatasetTars
from unimodal.data.tables import CsvTable, JsonLines, splits_of
from unimodal.data.text import parse_json

SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


def open_splits(
    path: str | Path,
    root: str | Path | None = None,
    splits: Sequence[str] | None = None,
    *,
    image: str | None = None,
    captions: list[str] | None = None,
    labels: str | None = None,
    captions_per_image: int | None = None,
    on_error: OnError = "keep",
) -> tuple[str, dict[str, Pairs]]:
    """Every split of the data at a path, and the name of the reader that was taken.

    A file is told by its suffix: `.json` is Karpathy's, or COCO's own where it has annotations, `.jsonl` JSON lines, `.csv`, `.tsv` and
    `.txt` a table, `.tar` or a pattern with wildcards are shards, whose splits are their names without the number. A folder is told by
    what lies in it: COCO's `captions_train2017.json` and its like (or a folder `annotations` of them), one of the labelled sets, what
    `datasets` saved, shards, a single table, or else pictures.

    Args:
        path: the data.
        root: folder of the pictures, for Karpathy's and COCO's JSON and tables.
        splits: the splits to open; by default all.
        image: column of the picture, for tables and `datasets`, where its name is unusual.
        captions: columns of the captions, likewise.
        labels: column of the labels, where they are to be read.
        captions_per_image: keep the first so many captions of each image, for Karpathy's and COCO's JSON.
        on_error: what happens at a bad sample; by default it is kept, for `audit` to name.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: a file or folder of no known format; an argument that the format has no use for; what the readers raise.
    """
    path = Path(path)
    given = {
        "root": root,
        "image": image,
        "captions": captions,
        "labels": labels,
        "captions_per_image": captions_per_image,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    wildcards = any(mark in path.name for mark in "*?[")
    if not path.exists() and not wildcards:
        raise FileNotFoundError(f"there is nothing at {str(path)!r}; check the path")
    coco = _coco_files(path)
    if (
        path.is_dir() and not coco and not is_saved(path) and not visible(path, "*.tar")
    ):  # they have JSON files of their own beside them
        path = _inside_folder(path)
    reader, found = (CocoCaptions, coco) if coco else _reader(path, wildcards)
    takes = {
        KarpathyJson: {"root", "captions_per_image"},
        CocoCaptions: {"root", "captions_per_image"},
        CsvTable: {"root", "image", "captions", "labels"},
        JsonLines: {"root", "image", "captions", "labels"},
        HuggingFaceDataset: {"image", "captions", "labels"},
    }
    if useless := sorted(options.keys() - takes.get(reader, set())):
        raise ValueError(f"{path} is read by {reader.__name__}, which has no {' and no '.join(useless)}; leave it out")
    if missing := [split for split in splits or () if split not in found]:
        raise ValueError(f"{path} has no split {missing[0]!r}; it has: {', '.join(map(str, found))}")
    opened = {}
    for split in splits or found:
        where, name = found[split]
        opened[split] = reader(where, split=name, on_error=on_error, **options)
    return reader.__name__, opened


def open_split(path: str | Path, split: str, root: str | Path | None = None, **options: Any) -> Pairs:
    """One split of the data at a path, or of the embedded scenes where the path is `scenes`; bad samples and missing pictures raise.

    Arguments and errors as in `open_splits`.
    """
    if str(path) == "scenes":
        return Scenes(split)
    pairs = open_splits(path, root, [split], on_error="raise", **options)[1][split]
    if isinstance(pairs, Listed):
        pairs.require_files()
    return pairs


def _coco_files(path: Path) -> dict[str, tuple[Any, str | None]]:
    """The splits of COCO's files `captions_SPLIT.json` in a folder, or in its folder `annotations`."""
    named = [file for folder in (path, path / "annotations") for file in visible(folder, "captions_*.json")]
    files = [file for file in named if b'"annotations"' in file.read_bytes()]  # the name alone could be Karpathy's
    return {split_of(file): (file, split_of(file)) for file in files}


def _inside_folder(folder: Path) -> Path:
    """The single table of a folder, where it has one; else the folder."""
    tables = [path for path in visible(folder) if path.suffix.lower() in TABLES and path.is_file()]
    if len(tables) > 1:
        raise ValueError(f"{folder} holds {', '.join(path.name for path in tables)}; name one of them")
    return tables[0] if tables else folder


def _reader(path: Path, wildcards: bool) -> tuple[type[Any], dict[str, tuple[Any, str | None]]]:
    """The reader of a path, and for each split what it reads and how it calls it."""

    def all_of(*names: str) -> dict[str, tuple[Any, str | None]]:
        return {name: (path, name) for name in names}

    if wildcards or path.suffix.lower() == ".tar":
        return WebDatasetTars, _shards(visible(path.parent, path.name), path)
    if path.is_dir():
        if (path / "trainset_txt_img_cat.list").is_file():
            return Wikipedia, all_of("train", "test")
        if (path / "ImageList" / "Imagelist.txt").is_file():
            return NusWide, all_of("train", "test")
        if (path / "dataset").is_dir() and (path / "sentence").is_dir():
            return PascalSentence, all_of("train", "val", "test")
        if (path / "dataset_dict.json").is_file():
            return HuggingFaceDataset, all_of(
                *parse_json((path / "dataset_dict.json").read_bytes(), str(path))["splits"]
            )
        if is_saved(path):
            return HuggingFaceDataset, {"all": (path, None)}
        if shards := visible(path, "*.tar"):
            return WebDatasetTars, _shards(shards, path)
        folders = [name for name in SPLIT_FOLDERS if (path / name).is_dir()]
        if inner := [table for name in folders for table in visible(path / name) if table.suffix.lower() in TABLES]:
            raise ValueError(
                f"{path} holds the table {inner[0].relative_to(path)} in the folder of a split; give the path of one table"
            )
        return ImageFolder, all_of(*folders) if folders else {"all": (path, None)}
    if path.suffix.lower() == ".json":
        data = parse_json(path.read_bytes(), str(path))
        if isinstance(data, dict) and "annotations" in data:
            return CocoCaptions, all_of(split_of(path))
        images = data.get("images") if isinstance(data, dict) else None
        names = [
            str(image.get("split")) for image in (images if isinstance(images, list) else ()) if isinstance(image, dict)
        ]
        return KarpathyJson, all_of(*dict.fromkeys(names or ["train"]))  # of no image KarpathyJson says what is wrong
    if path.suffix.lower() in (".jsonl", ".csv", ".tsv", ".txt"):
        reader = JsonLines if path.suffix.lower() == ".jsonl" else CsvTable
        return reader, all_of(*splits_of(path)) or {"all": (path, None)}
    raise ValueError(
        f"{path} has no known format; expected a folder, {', '.join(TABLES)}, or .tar shards such as 'data/train-*.tar'"
    )


def _shards(shards: list[Path], path: Path) -> dict[str, tuple[Any, str | None]]:
    """Shards by their name without the number: train-00000.tar and train-00001.tar are train."""
    if not shards:
        raise FileNotFoundError(f"no file fits {str(path)!r}; expected tar shards, such as 'data/train-*.tar'")
    splits: dict[str, list[str]] = {}
    for shard in shards:
        splits.setdefault(re.sub(r"[-_.]?\d*\.tar$", "", shard.name) or "all", []).append(str(shard))
    return {split: (files, split) for split, files in splits.items()}
