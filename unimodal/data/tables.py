"""Image-text pairs from tables: CSV and TSV files, and files of JSON lines.

All rows of one picture are one image with several captions, at the place of its first row.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from unimodal.data.readers import Listed, OnError, Sample, as_labels, inside, parse_json

# What people call their columns; the first that a table has is taken.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_name", "image_path", "filepath", "path")
CAPTION_COLUMNS = ("captions", "caption", "texts", "text", "sentences", "sentence", "title", "comment")
NUMBERED = re.compile(r"(caption|text|sentence)s?[_ ]?\d+")
DELIMITERS = ("\t", "|", ";", ",")

Rows = Iterable[tuple[str, dict[str, Any]]]  # where a row stands, for messages, and its values by column


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None in `image` and `captions` looks for a usual name."""

    image: str | None
    captions: str | Sequence[str] | None
    labels: str | None
    split: str


class CsvTable(Listed):
    """A table of text: a first line that names the columns, then a row for each picture or for each of its captions.

    Args:
        path: the file, in UTF-8.
        root: the folder that the pictures' names start from; by default the table's own.
        split: rows of this split, or of several joined by a plus; by default all rows, a split that is called "all".
        image: column of the picture's name; by default the first of `IMAGE_COLUMNS` that there is.
        captions: column of a caption, or several columns, of which some cells may be empty; by default the first of
            `CAPTION_COLUMNS` that there is, else caption_0, caption_1, ...
        labels: column of the picture's categories, separated by semicolons.
        split_column: column of the split, read where `split` is given.
        delimiter: what separates columns; by default the first of tab, |, ; and comma that the first line has.
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no CSV, no such column or split, a row of another length, a URL or a path outside the root, a bad caption.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        *,
        split: str | None = None,
        image: str | None = None,
        captions: str | list[str] | None = None,
        labels: str | None = None,
        split_column: str = "split",
        delimiter: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        path = Path(path)
        columns = Columns(image, captions, labels, split_column)
        samples = _samples(path, root, _csv_rows(path, delimiter), columns, split)
        super().__init__(path.stem, split or "all", samples, on_error)


class JsonLines(Listed):
    """One JSON object a line: a picture with a caption, or with a list of them, such as `metadata.jsonl` of an image folder.

    Args:
        path: the file.
        root: the folder that the pictures' names start from; by default the file's own.
        split: as for `CsvTable`.
        image: key of the picture's name; by default the first of `IMAGE_COLUMNS` that there is.
        captions: key of a caption or of a list of captions, or several keys; by default as for `CsvTable`.
        labels: key of the picture's categories: a list, or text in which semicolons separate them.
        split_column: key of the split, read where `split` is given.
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no object, or lacks a key; no such split; a URL or a path outside the root; a bad caption.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        *,
        split: str | None = None,
        image: str | None = None,
        captions: str | list[str] | None = None,
        labels: str | None = None,
        split_column: str = "split",
        on_error: OnError = "raise",
    ) -> None:
        path = Path(path)
        columns = Columns(image, captions, labels, split_column)
        samples = _samples(path, root, _json_rows(path), columns, split)
        super().__init__(path.stem, split or "all", samples, on_error)


def splits_of(path: Path, split_column: str = "split") -> list[str]:
    """The splits that a table names, in the order of their first rows; none where it has no such column."""
    rows = _csv_rows(path, None) if path.suffix != ".jsonl" else _json_rows(path)
    return list(dict.fromkeys(str(row[split_column]) for _, row in rows if split_column in row))


def _csv_rows(path: Path, delimiter: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    # Broken UTF-8 stays visible, for `caption_fault` to name.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        first = file.readline()
        file.seek(0)
        delimiter = delimiter or next((mark for mark in DELIMITERS if mark in first), ",")
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: two columns have one name: {names}; give each its own")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise ValueError(
                        f"{path} line {reader.line_num}: {len(row)} values separated by {delimiter!r} for the "
                        f"{len(names)} columns {names}; put a value that holds a separator in double quotes"
                    )
                yield f"{path} line {reader.line_num}", dict(zip(names, row))
        except csv.Error as error:
            raise ValueError(
                f"{path} line {reader.line_num} is no CSV: {error}; a double quote inside a quoted value is written twice"
            ) from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path} line {n}")
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {n}: expected an object with a picture and its captions, got {row!r:.80}")
        yield f"{path} line {n}", row


def _samples(path: Path, root: str | Path | None, rows: Rows, columns: Columns, split: str | None) -> list[Sample]:
    """The images of a split, with the captions and labels of all their rows."""
    root = path.parent if root is None else Path(root)
    wanted = split.split("+") if split is not None else []
    found: dict[str, tuple[list[Any], set[str]]] = {}
    splits: set[str] = set()
    image: str | None = None
    names: list[str] = []
    for where, row in rows:
        if image is None:
            image = columns.image or _usual("image", row, IMAGE_COLUMNS, where)
            names = _caption_columns(columns.captions, row, where)
        if split is not None:
            splits.add(part := str(_value(row, columns.split, "split_column", where)))
            if part not in wanted:
                continue
        key = _key(_value(row, image, "image", where), root, where)
        captions, labels = found.setdefault(key, ([], set()))
        for name in names:
            texts = _value(row, name, "captions", where)
            if texts != "" or len(names) == 1:  # one of several columns may have nothing to say
                captions += texts if isinstance(texts, list) else [texts]
        if columns.labels is not None:
            said = _value(row, columns.labels, "labels", where)
            labels |= as_labels(said.split(";") if isinstance(said, str) else said)
    if unknown := [part for part in wanted if part not in splits]:
        raise ValueError(f"{path} has no split {unknown[0]!r}; it has: {', '.join(sorted(splits))}")
    return [Sample(key, texts, inside(root, key), labels=frozenset(tags)) for key, (texts, tags) in found.items()]


def _caption_columns(given: str | Sequence[str] | None, row: dict[str, Any], where: str) -> list[str]:
    if given is not None:
        return [given] if isinstance(given, str) else list(given)
    numbered = [name for name in row if NUMBERED.fullmatch(name.lower())]
    if numbered and not any(name in row for name in CAPTION_COLUMNS):
        return numbered
    return [_usual("captions", row, CAPTION_COLUMNS, where)]


def _usual(argument: str, row: dict[str, Any], known: Sequence[str], where: str) -> str:
    name = next((name for name in known if name in row), None)
    if name is None:
        raise ValueError(
            f"{where}: none of the columns {list(row)} is called {', '.join(known)}; name it with {argument}=..."
        )
    return name


def _value(row: dict[str, Any], name: str, argument: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: there is no column {name!r}; the columns are {list(row)}; give another {argument}")
    return row[name]


def _key(name: Any, root: Path, where: str) -> str:
    """A picture's name as a path from the root."""
    if not isinstance(name, str) or not name.strip() or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"{where}: expected a picture's name in UTF-8, got {name!r:.80}")
    if "://" in name:
        raise ValueError(
            f"{where}: {name!r} is a URL; download the pictures first, for example with img2dataset, whose tar shards "
            "WebDatasetTars reads"
        )
    path = PurePosixPath(name.strip())
    whole = root.absolute().as_posix()
    return str(path.relative_to(whole) if path.is_relative_to(whole) else path)
