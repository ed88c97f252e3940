"""Image-text pairs from tar shards in the layout of WebDataset, by random access; nothing is unpacked."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from unimodal.data.endings import PICTURES
from unimodal.data.readers import Listed, OnError, Sample, as_labels, inside, lines


class WebDatasetTars(Listed):
    """Tar shards in the layout of WebDataset, read at random places through an index made here; nothing is unpacked.

    The members of a sample share their name up to the first dot: a picture, and `json` with "captions" (or "caption") and
    perhaps "labels", or `txt` with one caption a line. An order by (epoch, index) over such a reader resumes exactly, which a stream of
    shards cannot.

    Args:
        pattern: the shards, with wildcards: "data/train-*.tar"; or a list of files. They are read in the order of their names.
        split: what this split is called.
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: the pattern fits no file.
        ValueError: a file is no plain tar, or truncated; a member leaves the shard, or is a link; a bad caption.
    """

    def __init__(self, pattern: str | Path | list[str], *, split: str, on_error: OnError = "raise") -> None:
        files = pattern if isinstance(pattern, list) else glob.glob(str(pattern))
        shards = sorted(Path(path) for path in files)
        if not shards:
            raise FileNotFoundError(f"no file fits {str(pattern)!r}; expected tar shards, such as 'data/train-*.tar'")
        samples = [sample for shard in shards for sample in _index(shard)]
        super().__init__(shards[0].resolve().parent.name, split, samples, on_error)


def _index(shard: Path) -> Iterator[Sample]:
    """The samples of one shard, in the order of their first members."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                inside(shard, member.name)
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{shard}: member {member.name!r} is a link or device; expected plain files")
                place = PurePosixPath(member.name)
                stem, _, suffix = place.name.partition(".")
                if not stem:  # .DS_Store and its like
                    continue
                sample = str(place.with_name(stem))
                if f".{suffix.lower()}" in PICTURES:
                    found.setdefault(sample, {})["picture"] = (member.offset_data, member.size)
                elif suffix in ("json", "txt"):
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    found.setdefault(sample, {})[suffix] = content
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is no plain tar file, or truncated: {error}; write it again, uncompressed"
        ) from error
    for name, parts in found.items():
        start, size = parts.get("picture", (0, 0))  # no bytes are no picture: a bad sample like any other
        captions, labels = _words_of(parts)
        yield Sample(f"{shard.name}/{name}", captions, shard, start, size, labels)


def _words_of(parts: dict[str, Any]) -> tuple[Any, frozenset[str]]:
    """The captions and labels of a sample in a shard; where captions are broken, what stands in their place."""
    data: Any = None
    if "json" in parts:
        try:
            data = json.loads(parts["json"])
        except ValueError:
            return parts["json"], frozenset()
    data = data if isinstance(data, dict) else {}
    labels = as_labels(data.get("labels"))
    if "captions" in data:
        return data["captions"], labels
    return [data["caption"]] if "caption" in data else lines(parts.get("txt", b"")), labels
