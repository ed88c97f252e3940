"""Image-text pairs from files, by random access: Karpathy's JSON and a folder of pictures. Beside this file lie `tables.py`
(CSV and JSON lines), `shards.py` (tars), `labelled.py` (sets with categories) and `huggingface.py`.

Every reader lists its samples when it is made and opens a picture when asked for it. Captions are checked at once.
Paths that leave their root are an error whatever `on_error` says: such a file was made to deceive.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, get_args

from PIL import Image

from unimodal import arguments
from unimodal.data.captions import is_missing
from unimodal.data.folders import find_pictures, is_hidden
from unimodal.data.images import load_image
from unimodal.data.pairs import Problem, caption_fault, check, fingerprint
from unimodal.data.text import lines, parse_json

TABLES = (".json", ".jsonl", ".csv", ".tsv")  # files of captions, by their ending
OnError = Literal["raise", "skip", "keep"]


@dataclass(frozen=True)
class Sample:
    """Where a sample lies. A picture inside a shard starts at byte `start` and has `size` bytes; one of Hugging Face is row `start`."""

    key: str
    captions: list[str]
    file: Path
    start: int = 0
    size: int = -1  # to the end of the file
    labels: frozenset[str] = frozenset()
    coco_ids: tuple[int, ...] = ()  # COCO's, of the picture and then of each caption
    fault: str = ""  # why there can be no picture, where that is known before it is opened


class Listed:
    """A split that is a list of samples (`unimodal.data.pairs.Pairs`). Samples of one key are one image with all their captions, at the
    place of the first.

    Args:
        gallery: a split of which no sample has captions is sound; else that is an error.

    Attributes:
        problems: what `on_error="skip"` left out; empty under "raise" and "keep".
        others: files or members among the samples that belong to none and are not read, for `audit` to name.
    """

    def __init__(
        self, name: str, split: str, samples: list[Sample], on_error: OnError, *, gallery: bool = False
    ) -> None:
        arguments.choice(on_error, "on_error", get_args(OnError))
        if not samples:
            raise ValueError(f"{name} has no samples in split {split!r}; check the path and the split")
        self.name, self.split, self.samples = name, split, merged(samples)
        self.problems: list[Problem] = []
        self.others: list[str] = []
        gallery = gallery and not any(sample.captions for sample in samples)
        if on_error == "skip":
            self._leave_out_bad_samples()
        for sample in () if gallery or on_error == "keep" else self.samples:
            if fault := sample.fault or caption_fault(sample.captions):
                raise ValueError(f"{sample.key}: {fault}, or pass on_error='skip' to leave bad samples out")

    def _leave_out_bad_samples(self) -> None:
        self.problems = check(self)
        bad = {problem.index for problem in self.problems}
        if not bad:
            return
        told = f"{len(bad)} of {len(self.samples)} samples of {self.name} {self.split} are bad and left out: "
        told += "; ".join(map(str, self.problems[:5]))
        self.samples = [sample for i, sample in enumerate(self.samples) if i not in bad]
        if not self.samples:
            raise ValueError(f"{told}; no sample remains, check the files")
        warnings.warn(f"{told}; attribute `problems` lists all", stacklevel=4)

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, i: int) -> Image.Image:
        sample = self.samples[i]
        if sample.fault:
            raise ValueError(f"{sample.key}: {sample.fault}")
        source = self.source(sample)
        try:
            return load_image(source)
        except ValueError as error:
            if isinstance(source, Path):
                raise
            raise ValueError(f"{sample.key}: {error}") from error  # bytes have no name of their own

    def source(self, sample: Sample) -> Path | bytes:
        """The picture's file, or the bytes of one."""
        if sample.size < 0:
            return sample.file
        with open(sample.file, "rb") as shard:
            shard.seek(sample.start)
            return shard.read(sample.size)

    def captions(self, i: int) -> list[str]:
        return self.samples[i].captions

    def labels(self, i: int) -> frozenset[str]:
        return self.samples[i].labels

    def key(self, i: int) -> str:
        return self.samples[i].key

    def image_id(self, i: int) -> int:
        return i

    def fingerprint(self) -> str:
        return fingerprint(
            (sample.key, [*sample.captions, *(f"label {label}" for label in sorted(sample.labels))])
            for sample in self.samples
        )

    def negatives(self, i: int, c: int) -> list[str]:
        return []

    def require_files(self) -> None:
        """Look whether the file of every picture is there, without opening one.

        Raises:
            FileNotFoundError: names the first files that are not there, and how many there are.
        """
        files = list(
            dict.fromkeys(sample.file for sample in self.samples if sample.file != Path())
        )  # Path(): a row of a table
        if missing := [file for file in files if not file.exists()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(files)} files of {self.name} {self.split} are not there: "
                f"{', '.join(map(str, missing[:3]))}{', ...' if len(missing) > 3 else ''}; give the right root, or pass on_error='skip' to "
                "leave bad samples out"
            )

    def coco_ids(self, i: int) -> tuple[int, list[int]]:
        """COCO's ids of image i and of its captions, by which later judgements of COCO go.

        Raises:
            ValueError: the file has none.
        """
        if not self.samples[i].coco_ids:
            raise ValueError(
                f"{self.key(i)} of {self.name} {self.split} lacks COCO's ids, a `cocoid` and a `sentid` per sentence; "
                "Karpathy's file of COCO, dataset_coco.json, and COCO's own, captions_val2017.json, have them"
            )
        image, *captions = self.samples[i].coco_ids
        return image, captions


class KarpathyJson(Listed):
    """The format of Karpathy and Fei-Fei (CVPR 2015, arXiv:1412.2306) for Flickr8k, Flickr30k and COCO.

    RSICD (Lu et al. 2017, arXiv:1712.07835; `dataset_rsicd.json`, pictures in `RSICD_images`) and RSITMD (Yuan et al. 2021,
    arXiv:2204.09868; `dataset_RSITMD.json`, TIFF pictures in `images`) are published in it too.

    Args:
        path: the JSON file, `{"dataset", "images": [{"filename", "split", "sentences": [{"raw"}]}]}`; an image's
            `filepath`, where there is one, is a folder inside the root, and `labels` are its categories. COCO's has a
            `cocoid` too, and each sentence a `sentid`.
        root: folder of the pictures; by default `images` beside the file.
        split: one of the file's splits, or several joined by a plus: "train+restval".
        captions_per_image: keep the first so many captions of each image, under a warning that counts the others. The
            protocols of COCO say five; some of its images have six or seven.
        fold: (f, n) reads block f, counted from 0, of the split cut in file order into n blocks of one size. "COCO 1K" is the
            mean over the five folds of `test` (`unimodal.metrics.mean_of_folds`).
        on_error: "raise" stops at a bad sample: at its captions here, at its picture when it is read. "skip" opens
            every picture once, here, and leaves bad samples out, with a warning and the list `problems`. "keep" takes
            samples as they are, for `audit` to name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, a bad caption, a path outside the root, or nothing in this split; a split that the
            folds do not divide.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        *,
        split: str,
        captions_per_image: int | None = None,
        fold: tuple[int, int] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        path = arguments.path(path, "path")
        root = arguments.path(root, "root") if root is not None else path.parent / "images"
        split = arguments.text(split, "split")
        fold = None if fold is None else _fold(fold)
        data = parse_json(path.read_bytes(), str(path))
        if not isinstance(data, dict) or not isinstance(data.get("images"), list):
            raise ValueError(f"{path}: expected an object with a list 'images', got {data!r:.60}")
        name = str(data.get("dataset", path.stem))
        wanted, found = split.split("+"), set()
        samples: list[Sample] = []
        for i, image in enumerate(data["images"]):
            if not isinstance(image, dict) or not all(
                isinstance(image.get(key), str)
                for key in ("filename", "split", *["filepath"] * (image.get("filepath") is not None))
            ):
                raise ValueError(
                    f"{path}: images[{i}] needs a filename and a split as strings, got {image!r:.80}{_other_format(data)}"
                )
            found.add(image["split"])
            if image["split"] in wanted:
                key = relative(str(PurePosixPath(image.get("filepath") or "", image["filename"])), root)
                captions, labels, ids = _raw(image.get("sentences")), as_labels(image.get("labels")), _coco_ids(image)
                samples.append(Sample(key, captions, inside(root, key), labels=labels, coco_ids=ids))
        if unknown := [part for part in wanted if part not in found]:
            raise ValueError(f"{path} has no split {unknown[0]!r:.80}; it has: {', '.join(sorted(found))}")
        samples = first_captions(merged(samples), captions_per_image, f"{name} {split}")
        super().__init__(name, split, _block(samples, fold) if fold is not None else samples, on_error)


class ImageFolder(Listed):
    """The pictures in the folder `root/split`, at any depth, in the order of their paths; each has its captions in a text file beside it,
    one a line: those of "v1.5 a.jpg" are in "v1.5 a.txt". A folder without any such file is a gallery: it can be searched and captioned,
    not trained on.

    A folder with a table of captions (`metadata.jsonl`, `captions.csv`) is read by `JsonLines` and `CsvTable`.

    Args:
        root: the folder of all splits.
        split: the folder of this one; by default `root` itself, whose split is called "all".
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a picture without captions among others with captions, a bad caption, a path outside the folder, or no
            picture.
    """

    def __init__(self, root: str | Path, *, split: str | None = None, on_error: OnError = "raise") -> None:
        root = arguments.path(root, "root")
        folder = inside(root, "" if split is None else arguments.text(split, "split", empty=True))
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}; the pictures of a split lie in root/split")
        seen = find_pictures(folder)
        if seen.left_out:
            warnings.warn(f"{folder}: {seen.left_out}", stacklevel=2)
        files = seen.pictures
        texts = _texts_beside(files)
        captions = [
            lines(texts[path.with_suffix("")].read_bytes()) if path.with_suffix("") in texts else [] for path in files
        ]
        samples = [Sample(path.relative_to(folder).as_posix(), said, path) for path, said in zip(files, captions)]
        super().__init__(root.resolve().name, split or "all", samples, on_error, gallery=True)
        stems = {path.with_suffix("") for path in files}
        tables = [
            path
            for place in {folder, *(path.parent for path in files)}
            for path in place.glob("*")
            if path.suffix.lower() in TABLES
        ]
        others = [path for stem, path in texts.items() if stem not in stems] + tables
        self.others = sorted(path.relative_to(folder).as_posix() for path in others)


def _fold(fold: Any) -> tuple[int, int]:
    """Which block of how many.

    Raises:
        TypeError, ValueError: it is no such pair.
    """
    pair = [arguments.integer(one, "fold", least=-1) for one in arguments.listed(fold, "fold", "two numbers (f, n)")]
    if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
        raise ValueError(
            f"fold: expected (f, n) with f from 0 to n - 1, got {tuple(pair[:5])}; (0, 5) is the first of five"
        )
    return pair[0], pair[1]


def _block(samples: list[Sample], fold: tuple[int, int]) -> list[Sample]:
    f, n = fold
    size, rest = divmod(len(samples), n)
    if rest:
        raise ValueError(f"fold: {len(samples)} images do not make {n} blocks of one size; choose another n than {n}")
    return samples[f * size : (f + 1) * size]


def _raw(sentences: Any) -> Any:
    """Karpathy's sentences as captions; anything else as it is, for `caption_fault` to name."""
    if not isinstance(sentences, list):
        return sentences
    return [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]


def _other_format(data: dict[str, Any]) -> str:
    if "annotations" in data:
        return "; this is the format of COCO's own annotations, which CocoCaptions reads"
    return ""


def _coco_ids(image: dict[str, Any]) -> tuple[int, ...]:
    """COCO's ids of an image and of its sentences; empty where one is missing."""
    sentences = image.get("sentences")
    said = sentences if isinstance(sentences, list) else []
    ids = [image.get("cocoid"), *(one.get("sentid") if isinstance(one, dict) else None for one in said)]
    known = [one for one in ids if isinstance(one, int)]
    return tuple(known) if len(known) == len(ids) else ()


def merged(samples: list[Sample]) -> list[Sample]:
    """One sample for each key, with the captions, labels and COCO ids of all its entries, at the place of the first."""
    entries: dict[str, list[Sample]] = {}
    for sample in samples:
        entries.setdefault(sample.key, []).append(sample)
    return [_merge(same) if len(same) > 1 else same[0] for same in entries.values()]


def _merge(entries: list[Sample]) -> Sample:
    # Captions that are no list are a fault, and stay to be named.
    faulty = [entry.captions for entry in entries if not isinstance(entry.captions, list)]
    captions = faulty[0] if faulty else [caption for entry in entries for caption in entry.captions]
    images = {entry.coco_ids[:1] for entry in entries}
    ids = next(iter(images)) if len(images) == 1 else ()
    return replace(
        entries[0],
        captions=captions,
        labels=frozenset().union(*(entry.labels for entry in entries)),
        coco_ids=(*ids, *(one for entry in entries for one in entry.coco_ids[1:])) if ids else (),
    )


def first_captions(samples: list[Sample], count: int | None, what: str) -> list[Sample]:
    """The samples with their first captions, under a warning that counts the others."""
    if count is None:
        return samples
    count = arguments.integer(count, "captions_per_image")
    longer = [
        len(one.captions) - count for one in samples if isinstance(one.captions, list) and len(one.captions) > count
    ]
    if longer:
        warnings.warn(
            f"{sum(longer)} captions of {len(longer)} images of {what} come after the first {count} and are left out",
            stacklevel=3,
        )
    return [
        replace(one, captions=one.captions[:count], coco_ids=one.coco_ids[: count + 1])
        if isinstance(one.captions, list)
        else one
        for one in samples
    ]


def relative(name: str, root: Path) -> str:
    """A picture's name as a path from the root: as it is written where there is such a file, else without spaces around it and with
    the separators of Windows as slashes."""
    tidy = name.strip().replace("\\", "/")
    if tidy != name and os.path.lexists(inside(root, name)):
        tidy = name
    if drive := PureWindowsPath(tidy).drive:
        raise ValueError(f"{name!r} starts at the drive {drive} of Windows; give names from the folder of the pictures")
    return str(PurePosixPath(tidy))


def as_labels(value: Any) -> frozenset[str]:
    """A category, a list of them or None, as text; what stands for a missing one is none."""
    values = value if isinstance(value, list) else [value]
    return frozenset(str(label).strip() for label in values if not is_missing(label))


def _texts_beside(pictures: list[Path]) -> dict[Path, Path]:
    """The files of captions in the folders of pictures, by their path without .txt or .TXT."""
    folders = dict.fromkeys(picture.parent for picture in pictures)
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix.lower() == ".txt"]
    return {path.with_suffix(""): path for path in files if not is_hidden(path.name)}


def inside(root: Path, relative: str) -> Path:
    """`relative` under `root`. Links on the disk are followed: they are the user's own."""
    path = Path(relative)
    if path.anchor or ".." in path.parts or "\0" in relative:
        raise ValueError(f"{relative!r} leaves {root}; expected a path inside it")
    return root / path
