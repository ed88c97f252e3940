"""Image-text pairs from files, by random access: Karpathy's JSON and a folder of pictures; `shards.py` reads tars.

Every reader lists its samples when it is made and opens a picture when asked for it. Captions are checked at once.
Paths that leave their root are an error whatever `on_error` says: such a file was made to deceive.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from unimodal.data.images import load_image
from unimodal.data.items import SUFFIXES
from unimodal.data.pairs import Problem, caption_fault, check, fingerprint

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Sample:
    """Where a sample lies. A picture inside a shard starts at byte `start` and has `size` bytes."""

    key: str
    captions: list[str]
    file: Path
    start: int = 0
    size: int = -1  # to the end of the file


class Listed:
    """A split that is a list of samples (`unimodal.data.pairs.Pairs`).

    Attributes:
        problems: what `on_error="skip"` left out; empty under "raise".
    """

    def __init__(self, name: str, split: str, samples: list[Sample], on_error: OnError) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        if not samples:
            raise ValueError(f"{name} has no samples in split {split!r}; check the path and the split")
        self.name, self.split, self.samples = name, split, samples
        self.problems: list[Problem] = []
        if on_error == "skip":
            self._leave_out_bad_samples()
        for sample in self.samples:
            if fault := caption_fault(sample.captions):
                raise ValueError(f"{sample.key}: {fault}, or pass on_error='skip' to leave bad samples out")
        first: dict[str, int] = {}
        self._image_ids = [first.setdefault(sample.key, i) for i, sample in enumerate(self.samples)]

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
        if sample.size < 0:
            return load_image(sample.file)
        with open(sample.file, "rb") as shard:
            shard.seek(sample.start)
            content = shard.read(sample.size)
        try:
            return load_image(content)
        except ValueError as error:  # bytes have no name of their own
            raise ValueError(f"{sample.key}: {error}") from error

    def captions(self, i: int) -> list[str]:
        return self.samples[i].captions

    def key(self, i: int) -> str:
        return self.samples[i].key

    def image_id(self, i: int) -> int:
        return self._image_ids[i]

    def fingerprint(self) -> str:
        return fingerprint((sample.key, sample.captions) for sample in self.samples)

    def negatives(self, i: int, c: int) -> list[str]:
        return []


class KarpathyJson(Listed):
    """The format of Karpathy and Fei-Fei (CVPR 2015, arXiv:1412.2306) for Flickr8k, Flickr30k and COCO.

    Args:
        path: the JSON file, `{"dataset", "images": [{"filename", "split", "sentences": [{"raw"}]}]}`; an image's
            `filepath`, where there is one, is a folder inside the root.
        root: folder of the pictures; by default `images` beside the file.
        split: one of the file's splits, or several joined by a plus: "train+restval".
        on_error: "raise" stops at a bad sample: at its captions here, at its picture when it is read. "skip" opens
            every picture once, here, and leaves bad samples out, with a warning and the list `problems`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, a bad caption, a path outside the root, or nothing in this split.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, *, split: str, on_error: OnError = "raise"):
        root = Path(root) if root is not None else Path(path).parent / "images"
        data = _parse(Path(path).read_bytes(), str(path))
        if not isinstance(data, dict) or not isinstance(data.get("images"), list):
            raise ValueError(f"{path}: expected an object with a list 'images', got {data!r:.60}")
        wanted, found = split.split("+"), set()
        samples: list[Sample] = []
        for i, image in enumerate(data["images"]):
            if not isinstance(image, dict) or not all(isinstance(image.get(k), str) for k in ("filename", "split")):
                raise ValueError(f"{path}: images[{i}] needs a filename and a split as strings, got {image!r:.80}")
            found.add(image["split"])
            if image["split"] in wanted:
                key = str(PurePosixPath(str(image.get("filepath", "")), image["filename"]))
                samples.append(Sample(key, _raw(image.get("sentences")), inside(root, key)))
        if unknown := [part for part in wanted if part not in found]:
            raise ValueError(f"{path} has no split {unknown[0]!r}; it has: {', '.join(sorted(found))}")
        super().__init__(str(data.get("dataset", Path(path).stem)), split, samples, on_error)


class ImageFolder(Listed):
    """The pictures in the folder `root/split`, at any depth, in the order of their paths.

    Args:
        root: the folder of all splits.
        split: the folder of this one.
        captions: a file of JSON lines inside `root/split`, `{"file_name": "a.jpg", "text": "..." or ["...", "..."]}`,
            which then names the pictures; by default each picture has a text file beside it, one caption a line.
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a bad caption, a path outside the folder, or no picture.
    """

    def __init__(
        self, root: str | Path, *, split: str, captions: str | Path | None = None, on_error: OnError = "raise"
    ) -> None:
        folder = inside(Path(root), split)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}; the pictures of a split lie in root/split")
        if captions is None:
            files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
            listed = [(path.relative_to(folder).as_posix(), _lines_beside(path)) for path in files]
        else:
            listed = list(_json_lines(inside(folder, str(captions))))
        samples = [Sample(key, texts, inside(folder, key)) for key, texts in listed]
        super().__init__(Path(root).resolve().name, split, samples, on_error)


def _raw(sentences: Any) -> Any:
    """Karpathy's sentences as captions; anything else as it is, for `caption_fault` to name."""
    if not isinstance(sentences, list):
        return sentences
    return [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]


def lines(content: bytes) -> list[str]:
    """One caption a line. Broken UTF-8 stays visible, for `caption_fault` to name."""
    decoded = [line.decode(errors="surrogateescape") for line in content.splitlines()]
    return [line for line in decoded if line.strip()]


def _lines_beside(picture: Path) -> list[str]:
    path = picture.with_suffix(".txt")
    return lines(path.read_bytes()) if path.is_file() else []


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        data = _parse(line, f"{path} line {n}")
        if not isinstance(data, dict) or not isinstance(data.get("file_name"), str) or "text" not in data:
            raise ValueError(f"{path} line {n}: expected an object with 'file_name' and 'text', got {data!r:.80}")
        yield data["file_name"], data["text"] if isinstance(data["text"], list) else [data["text"]]


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def inside(root: Path, relative: str) -> Path:
    """`relative` under `root`. Links on the disk are followed: they are the user's own."""
    path = Path(relative)
    if path.anchor or ".." in path.parts or "\0" in relative:
        raise ValueError(f"{relative!r} leaves {root}; expected a path inside it")
    return root / path
