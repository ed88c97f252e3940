"""The file of mined hard negatives: JSON lines, a header first that says what they were mined with and from.

    {"format": "unimodal negatives 1", "model": ..., "data": {...}, "settings": {...}, "kept": {...}}
    {"image": 0, "positives": [2.5, 3.1], "texts": [[7, 1, -0.4], ...]}     caption 1 of image 7 is wrong for image 0
    {"caption": [0, 1], "positive": 3.1, "images": [[7, -0.4], ...]}        image 7 is wrong for caption 1 of image 0

Numbers of images and captions count from 0 in the order of the split. The last number of an entry is its score by the
judge that the settings name: the logit of the matching head, or the cosine. Lines of one kind are in order; a query that
the judge did not trust has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimodal.data.pairs import Pairs
from unimodal.files import replacing

FORMAT = "unimodal negatives 1"


@dataclass(frozen=True)
class Negatives:
    """What a file holds.

    Attributes:
        header: its first line.
        texts: by image, the captions (image, number, score) that are wrong for it.
        images: by caption (image, number), the images (image, score) that are wrong for it.
        own: by caption, its score with its own image.
    """

    header: dict[str, Any]
    texts: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    images: dict[tuple[int, int], list[tuple[int, float]]] = field(default_factory=dict)
    own: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def judged_by_match(self) -> bool:
        """Whether the scores are match logits."""
        return self.header["settings"]["judge"] == "match"


def write_negatives(path: str | Path, header: dict[str, Any], rows: Iterable[dict[str, Any]]) -> Path:
    """Write the file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for row in ({"format": FORMAT, **header}, *rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def read_negatives(path: str | Path, pairs: Pairs) -> Negatives:
    """Read the hard negatives of a split.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, or was mined from other data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; mine hard negatives with `unimodal mine --out {path}`")
    rows = [_parse(line, path, n) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    if not rows or rows[0].get("format") != FORMAT:
        raise ValueError(f"{path} does not open with a header of format {FORMAT!r}; mine the negatives again")
    found, expected = rows[0]["data"]["fingerprint"], pairs.fingerprint()
    if found != expected:
        raise ValueError(
            f"{path} was mined from {rows[0]['data']['name']} {rows[0]['data']['split']} [{found}], this run trains on "
            f"{pairs.name} {pairs.split} [{expected}]; mine the negatives of this split"
        )
    out = Negatives(rows[0])
    for row in rows[1:]:
        if "image" in row:
            out.texts[row["image"]] = [(j, c, score) for j, c, score in row["texts"]]
            out.own.update({(row["image"], c): score for c, score in enumerate(row["positives"])})
        else:
            i, c = row["caption"]
            out.images[i, c] = [(j, score) for j, score in row["images"]]
            out.own[i, c] = row["positive"]
    return out


def _parse(line: str, path: Path, n: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} line {n} is no JSON: {error}") from error
    if not isinstance(row, dict) or not ({"format", "image", "caption"} & row.keys()):
        raise ValueError(f"{path} line {n}: expected a header, an image or a caption, got {line!r:.80}")
    return row
