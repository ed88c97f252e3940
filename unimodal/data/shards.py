"""Image-text pairs from tar shards in the layout of WebDataset, by random access; nothing is unpacked."""

from __future__ import annotations

import glob
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unimodal import arguments
from unimodal.data.endings import PICTURES
from unimodal.data.folders import is_hidden
from unimodal.data.readers import Listed, OnError, Sample, as_labels, inside
from unimodal.data.text import lines, parse_json


class WebDatasetTars(Listed):
    """Tar shards in the layout of WebDataset, read at random places through an index made here; nothing is unpacked.

    The members of a sample share their name up to the last dot ("v1.5 a.jpg" and "v1.5 a.txt"): a picture, and `json` with "captions"
    (or "caption") and perhaps "labels", or `txt` with one caption a line. An order by (epoch, index) over such a reader resumes exactly,
    which a stream of shards cannot.

    Args:
        pattern: the shards, with wildcards: "data/train-*.tar"; or a list of files. They are read in the order of their names.
        split: what this split is called.
        on_error: as for `KarpathyJson`.

    Attributes:
        others: members that are neither picture nor caption, and are not read.

    Raises:
        FileNotFoundError: the pattern fits no file.
        ValueError: a file is no plain tar, or truncated; a member leaves the shard, or is a link; a bad caption; captions
            without a picture, or with several.
    """

    def __init__(self, pattern: str | Path | list[str], *, split: str, on_error: OnError = "raise") -> None:
        arguments.text(split, "split")
        files = pattern if isinstance(pattern, list) else glob.glob(str(arguments.path(pattern, "pattern")))
        shards = sorted(arguments.path(path, f"pattern[{i}]") for i, path in enumerate(files))
        if not shards:
            raise FileNotFoundError(
                f"no file fits {str(pattern)!r:.200}; expected tar shards, such as 'data/train-*.tar'"
            )
        indexed = [_index(shard) for shard in shards]
        samples = [sample for listed, _ in indexed for sample in listed]
        super().__init__(shards[0].resolve().parent.name, split, samples, on_error)
        self.others = [name for _, names in indexed for name in names]


def _index(shard: Path) -> tuple[list[Sample], list[str]]:
    """The samples of one shard, in the order of their first members, and the members that belong to none."""
    parts: dict[str, _Parts] = {}
    others: list[str] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                inside(shard, member.name)
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{shard}: member {member.name!r} is a link or device; expected plain files")
                place = PurePosixPath(member.name)
                if any(map(is_hidden, place.parts)):  # what systems leave: ._a.jpg, .DS_Store
                    continue
                suffix = place.suffix.lower()
                sample = str(place.with_suffix(""))
                if suffix in PICTURES:
                    parts.setdefault(sample, _Parts()).pictures[place.name] = (member.offset_data, member.size)
                elif suffix in (".json", ".txt"):
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    parts.setdefault(sample, _Parts()).words[suffix] = content
                else:
                    others.append(f"{shard.name}/{place}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is no plain tar file, or truncated: {error}; write it again, uncompressed"
        ) from error
    return [part.sample(f"{shard.name}/{name}", shard) for name, part in parts.items()], others


@dataclass
class _Parts:
    """The members of a sample: pictures by name as (start, size), and texts by suffix."""

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    words: dict[str, bytes] = field(default_factory=dict)

    def sample(self, key: str, shard: Path) -> Sample:
        fault = ""
        if not self.pictures:
            fault = "the shard has captions of this name and no picture; put the picture beside them"
        elif len(self.pictures) > 1:
            fault = f"the shard has several pictures of this name, {', '.join(self.pictures)}; give each a name and captions of its own"
        captions, labels = _words_of(self.words)
        start, size = next(iter(self.pictures.values()), (0, 0))
        return Sample(key, captions, shard, start, size, labels, fault=fault)


def _words_of(words: dict[str, bytes]) -> tuple[Any, frozenset[str]]:
    """The captions and labels of a sample in a shard; where captions are broken, what stands in their place."""
    data: Any = None
    if ".json" in words:
        try:
            data = parse_json(words[".json"], "")
        except ValueError:
            return words[".json"], frozenset()
    data = data if isinstance(data, dict) else {}
    labels = as_labels(data.get("labels"))
    if "captions" in data:
        return data["captions"], labels
    return [data["caption"]] if "caption" in data else lines(words.get(".txt", b"")), labels
