"""Image-text pairs from tables: CSV and TSV files, and files of JSON lines.

All rows of one picture are one image with several captions, at the place of its first row. Which columns are captions, and what a cell
of them says, is told by `captions.py`.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from unimodal import arguments
from unimodal.data.captions import as_captions, caption_column, is_missing, written_list
from unimodal.data.endings import address_of, is_data, is_remote, shown
from unimodal.data.readers import Listed, OnError, Sample, as_labels, inside, relative
from unimodal.data.text import parse_json, table_text

# What people call their columns; the first that a table has is taken.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_name", "image_path", "filepath", "path")
DELIMITERS = ("\t", "|", ";", ",")

Rows = Iterable[tuple[str, dict[str, Any]]]  # where a row stands, for messages, and its values by column


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None in `image` and `captions` looks for a usual name."""

    image: str | None
    captions: str | Sequence[str] | None
    labels: str | None
    split: str

    def __post_init__(self) -> None:
        for name in ("image", "labels"):
            arguments.optional(arguments.text, getattr(self, name), name)
        arguments.text(self.split, "split_column")
        if self.captions is not None and not isinstance(self.captions, str):
            given = arguments.listed(self.captions, "captions", "columns")
            checked = [arguments.text(one, f"captions[{i}]") for i, one in enumerate(given)]
            object.__setattr__(self, "captions", checked)


class CsvTable(Listed):
    """A table of text: a first line that names the columns, then a row for each picture or for each of its captions.

    Args:
        path: the file, in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. A first line `sep=;`, as Excel writes it, names the
            delimiter.
        root: the folder that the pictures' names start from; by default the table's own.
        split: rows of this split, or of several joined by a plus; by default all rows, a split that is called "all".
        image: column of the picture's name; by default the first of `IMAGE_COLUMNS` that there is.
        captions: column of a caption or of a list of captions, or several columns, of which some cells may be empty ("", "nan",
            "None", ...); by default the first of `captions`; `caption`, `caption_0`, `caption_1`, ... together; `texts`;
            `text`, `text_0`, ...; and likewise `sentence`, `raw`, `title` and `comment`.
        labels: column of the picture's categories, separated by semicolons.
        split_column: column of the split, read where `split` is given.
        delimiter: what separates columns; by default the first of tab, |, ; and comma that separates the names in the first line.
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
        path = arguments.path(path, "path")
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
        path = arguments.path(path, "path")
        columns = Columns(image, captions, labels, split_column)
        samples = _samples(path, root, _json_rows(path), columns, split)
        super().__init__(path.stem, split or "all", samples, on_error)


def splits_of(path: Path, split_column: str = "split") -> list[str]:
    """The splits that a table names, in the order of their first rows; none where it has no such column."""
    rows = _csv_rows(path, None) if path.suffix.lower() != ".jsonl" else _json_rows(path)
    named = ((where, row, _spelt(split_column, row)) for where, row in rows)
    return list(dict.fromkeys(_split(row, name, where) for where, row, name in named if name in row))


def _csv_rows(path: Path, delimiter: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if delimiter is not None and len(arguments.text(delimiter, "delimiter", empty=True)) != 1:
        raise ValueError(arguments.refused("delimiter", "one character", delimiter))
    text, skipped = table_text(path.read_bytes(), str(path)), 0
    if said := re.match(r"sep=(.)\r?\n?", text):
        text, skipped = text[said.end() :], 1
        delimiter = delimiter or said[1]
    delimiter = delimiter or _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        named = [name for name in names if name]
        if len(set(named)) < len(named):
            raise ValueError(f"{path}: two columns have one name: {names}; give each its own")
        for row in reader:
            if not any(row):
                continue
            where = f"{path} line {reader.line_num + skipped}"
            if len(row) != len(names):
                raise ValueError(
                    f"{where}: {len(row)} values separated by {delimiter!r} for the "
                    f"{len(names)} columns {names}; put a value that holds a separator in double quotes"
                )
            yield where, {name: value for name, value in zip(names, row) if name}
    except csv.Error as error:
        raise ValueError(
            f"{path} line {reader.line_num + skipped} is no CSV: {error}; a double quote inside a quoted value is written twice"
        ) from error


def _delimiter(text: str) -> str:
    """The first delimiter that separates the names in the first line, where one of them is a usual one; else the first that separates."""
    separating: list[str] = []
    for mark in DELIMITERS:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True, strict=True)
        try:
            names = [name.strip().lower() for name in next(rows, [])]
        except csv.Error:  # quotes make no sense under this one
            continue
        if len(names) > 1:
            if any(name in IMAGE_COLUMNS for name in names):
                return mark
            separating.append(mark)
    return separating[0] if separating else ","


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for n, line in enumerate(table_text(path.read_bytes(), str(path)).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path} line {n}")
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {n}: expected an object with a picture and its captions, got {row!r:.80}")
        yield f"{path} line {n}", row


def _samples(path: Path, root: str | Path | None, rows: Rows, columns: Columns, split: str | None) -> list[Sample]:
    """The images of a split, with the captions and labels of each of their rows."""
    root = path.parent if root is None else arguments.path(root, "root")
    wanted = arguments.text(split, "split").split("+") if split is not None else []
    out: list[Sample] = []
    splits: set[str] = set()
    files: dict[str, tuple[str, Path]] = {}
    image: str | None = None
    usual: re.Pattern[str] | None = None
    for where, row in rows:
        if image is None:
            image = columns.image or _image_column(row, where)
            usual = None if columns.captions is not None else caption_column(list(row), where)
        if split is not None:
            splits.add(part := _split(row, _spelt(columns.split, row), where))
            if part not in wanted:
                continue
        name = _value(row, image, "image", where)
        if not isinstance(name, str) or name not in files:  # one picture has many rows
            key = _key(name, root, where)
            files[name] = (key, inside(root, key))
        key, file = files[name]
        labels: frozenset[str] = frozenset()
        if columns.labels is not None:
            said = _value(row, columns.labels, "labels", where)
            labels = as_labels((written_list(said) or said.split(";")) if isinstance(said, str) else said)
        captions = _captions(row, columns.captions, usual, where)
        out.append(Sample(key, captions, file, labels=labels))
    if unknown := [part for part in wanted if part not in splits]:
        raise ValueError(f"{path} has no split {unknown[0]!r:.80}; it has: {', '.join(sorted(splits))}")
    return out


def _spelt(column: str, row: dict[str, Any]) -> str:
    """A column as a table spells it: `Split` for split."""
    return column if column in row else next((name for name in row if name.strip().lower() == column.lower()), column)


def _split(row: dict[str, Any], column: str, where: str) -> str:
    value = _value(row, column, "split_column", where)
    if is_missing(value):
        raise ValueError(
            f"{where}: column {column!r} is {value!r}, which is no split; give every row one, or give another split_column"
        )
    return str(value)


def _captions(
    row: dict[str, Any], given: str | Sequence[str] | None, usual: re.Pattern[str] | None, where: str
) -> list[Any]:
    if usual is None:
        names = [given] if isinstance(given, str) else list(given or ())
    else:
        names = list(filter(usual.fullmatch, row))
        if not names:
            raise ValueError(
                f"{where}: there is no column of captions; the columns are {list(row)}; give another captions"
            )
    cells = [_value(row, name, "captions", where) for name in names]
    if len(cells) > 1:  # one of several columns may have nothing to say
        cells = [cell for cell in cells if not is_missing(cell)]
    return [caption for cell in cells for caption in as_captions(cell)]


def _image_column(row: dict[str, Any], where: str) -> str:
    names = {name.strip().lower(): name for name in reversed(row)}
    column = next((names[name] for name in IMAGE_COLUMNS if name in names), None)
    if column is None:
        raise ValueError(
            f"{where}: none of the columns {list(row)} is called {', '.join(IMAGE_COLUMNS)}; name it with image=... (the first line of a "
            "table names its columns)"
        )
    return column


def _value(row: dict[str, Any], name: str, argument: str, where: str) -> Any:
    if name not in row:
        raise ValueError(
            f"{where}: there is no column {name!r:.80}; the columns are {list(row)}; give another {argument}"
        )
    return row[name]


def _key(name: Any, root: Path, where: str) -> str:
    """A picture's name as a path from the root."""
    if not isinstance(name, str) or is_missing(name) or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"{where}: expected a picture's name in UTF-8, got {name!r:.80}")
    try:
        address = address_of(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if is_data(address) or is_remote(address):
        raise ValueError(
            f"{where}: {shown(address)} is a URL; download the pictures first, for example with img2dataset, whose tar shards "
            "WebDatasetTars reads"
        )
    if os.path.isabs(address):
        whole, path = root.absolute().as_posix(), PurePosixPath(address)
        if path.is_relative_to(whole):
            return str(path.relative_to(whole))
    try:
        return relative(name if address == name.strip() else address, root)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
