"""What documents an index has: one SQLite file, the only place that says so.

Documents come in three steps, so that a kill between any two of them loses nothing and leaves nothing twice: they are planned (`plan`),
their parts are read one after another (`read`), and all of them become visible at once (`reveal`). Until then searches see the old state;
planning the same documents again finds the plan, and goes on with what is not read yet. The backend has the vectors of a document before it
becomes visible, and loses them after it is gone: `in_line` is false from the moment documents change until the backend holds no others.

One `Ledger` at a time writes the file. A `Catalogue` is a copy of it at one moment: it stays the same while others write, and it needs no
lock, no journal and no folder that can be written.

Metadata are columns whose declared type says what they hold: TEXT a text, NUMERIC a number, BOOLEAN true or false.

Legend: rows are the numbers by which an index knows its documents, never used twice.
"""

import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimodal.search.filters import FIELD, WORDS, Filter, Kind, column

TYPES: dict[Kind, str] = {"text": "TEXT", "number": "NUMERIC", "flag": "BOOLEAN"}
KINDS: dict[str, Kind] = {declared: kind for kind, declared in TYPES.items()}
PATIENCE = 60  # seconds to wait for those who copy a catalogue, or for the one who writes it
LARGEST = 2**53  # beyond it not every whole number has a float of its own

Id = int | str
Metadata = Mapping[str, str | int | float | bool | None]


class Document(NamedTuple):
    """What hits call a document, what it is in words, and its metadata without empty values."""

    id: Id
    document: Any
    metadata: dict[str, Any]


class Catalogue:
    """The documents of an index as they were at one moment: a copy in memory, which no writer changes.

    Attributes:
        db: the copy; several threads may ask it at once.
        part: rows per part.
    """

    def __init__(self, db: sqlite3.Connection, part: int) -> None:
        self.db, self.part = db, part
        self.db.execute("pragma case_sensitive_like = on")

    @classmethod
    def of(cls, path: Path, part: int) -> "Catalogue":
        """Copy what a catalogue says now. Its file is only read.

        Raises:
            FileNotFoundError: it is not there.
            PermissionError: it may not be read.
            ValueError: it is damaged.
        """
        with open(path, "rb"):  # SQLite has one message for all that keeps it from opening a file
            pass
        copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
                file.backup(copy)
            found = cls(copy, part)
            found._require_sound()
        except sqlite3.DatabaseError as error:
            if path.with_name(f"{path.name}-journal").exists():
                return cls._rolled_back(path, part)
            raise ValueError(
                f"{path} is damaged ({error}); copy it back from a backup, or build the index again in another folder"
            ) from error
        return found

    @classmethod
    def _rolled_back(cls, path: Path, part: int) -> "Catalogue":
        """What a catalogue says without the change that a kill interrupted: SQLite undoes it, in a copy."""
        with tempfile.TemporaryDirectory() as folder:
            for one in (path.with_name(f"{path.name}-journal"), path):
                if one.exists():
                    shutil.copyfile(one, Path(folder, one.name))
            with closing(sqlite3.connect(Path(folder, path.name))) as file:
                file.execute("select count(*) from sqlite_master").fetchone()
            Path(folder, f"{path.name}-journal").unlink(missing_ok=True)
            return cls.of(Path(folder, path.name), part)

    def _require_sound(self) -> None:
        self.db.execute("select row, id, document, pending, read, error from documents limit 1").fetchone()
        self.db.execute("select name, value from facts limit 1").fetchone()
        for field in self.fields:
            if not FIELD.match(field):
                raise sqlite3.DatabaseError(f"{field!r} is no name of a field")

    # Facts.

    def fact(self, name: str) -> int:
        found = self.db.execute("select value from facts where name = ?", (name,)).fetchone()
        return found[0] if found else 0

    @property
    def generation(self) -> int:
        """Another number after every change of what is visible."""
        return self.fact("generation")

    @property
    def built(self) -> bool:
        """Whether the first documents are all there."""
        return bool(self.fact("built"))

    @property
    def in_line(self) -> bool:
        """Whether the backend holds the visible documents and no others."""
        return bool(self.fact("in_line"))

    @property
    def fields(self) -> dict[str, Kind]:
        """The metadata that documents have, and what their values are."""
        columns = self.db.execute("pragma table_info(documents)").fetchall()
        return {name[2:]: KINDS[declared] for _, name, declared, *_ in columns if name.startswith(column(""))}

    # Documents.

    def __len__(self) -> int:
        return self.db.execute("select count(*) from documents where pending = 0 and error is null").fetchone()[0]

    def rows(self, where: Filter | None = None) -> np.ndarray:
        """Rows of the visible documents that a filter lets through, [n] int64, in order.

        Raises:
            ValueError: SQLite cannot evaluate the filter.
        """
        more = "" if where is None else f"and {where.sql()}"
        try:
            found = self.db.execute(
                f"select group_concat(row) from documents where pending = 0 and error is null {more}"
            ).fetchone()[0]
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise ValueError(f"this filter cannot be evaluated ({error}); make it shorter") from error
        # One text of all numbers takes a quarter of the time that the numbers take one by one.
        return np.sort(np.fromstring(found or "", np.int64, sep=","))

    def ranks(self, rows: np.ndarray) -> np.ndarray:
        """Places of rows [n] in the order of their ids: numbers before texts, each in their own order."""
        question = "select row from documents where row in (select value from json_each(?)) order by id"
        place = {row: i for i, (row,) in enumerate(self.db.execute(question, (json.dumps(rows.tolist()),)))}
        return np.array([place[row] for row in rows.tolist()], np.int64)

    def parts(self) -> set[int]:
        """Numbers of the parts that hold a document, visible or not."""
        return {part for (part,) in self.db.execute(f"select distinct row / {self.part} from documents")}

    def pending(self) -> list[tuple[int, Document]]:
        """(row, document) of what is planned and not visible yet."""
        return self._documents("pending = 1 order by row")

    def unread(self) -> list[int]:
        """Rows that are planned and not read."""
        return [
            row for (row,) in self.db.execute("select row from documents where pending = 1 and read = 0 order by row")
        ]

    def documents(self, rows: Sequence[int] | None = None) -> dict[int, Document]:
        """By row; all visible ones without `rows`."""
        if rows is None:
            return dict(self._documents("pending = 0 and error is null order by row"))
        listed = json.dumps([int(row) for row in rows])
        return dict(self._documents("row in (select value from json_each(?))", listed))

    def listed(self) -> list[Document]:
        """All visible documents, with those that could not be read, in order."""
        return [document for _, document in self._documents("pending = 0 order by row")]

    def skipped(self) -> dict[Id, str]:
        """Ids of the documents that could not be read, and why."""
        return dict(
            self.db.execute("select id, error from documents where pending = 0 and error is not null order by row")
        )

    def there(self, ids: Sequence[Id]) -> set[Id]:
        """Which of these ids are visible."""
        found: set[Id] = set()
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            question = (
                f"select id from documents where pending = 0 and error is null and id in ({', '.join('?' * len(some))})"
            )
            found |= {one for (one,) in self.db.execute(question, some)}
        return found

    def _documents(self, where: str, *values: Any) -> list[tuple[int, Document]]:
        fields = self.fields
        names = "".join(f", `{column(field)}`" for field in fields)
        out = []
        for row, one, document, *held in self.db.execute(
            f"select row, id, document{names} from documents where {where}", values
        ):
            metadata = {
                field: bool(value) if kind == "flag" else value
                for (field, kind), value in zip(fields.items(), held)
                if value is not None
            }
            out.append((row, Document(one, json.loads(document), metadata)))
        return out

    def close(self) -> None:
        self.db.close()


def generation(path: Path) -> int | None:
    """The generation of a catalogue's file, without copying it; None where the file cannot be asked."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as file:
            found = file.execute("select value from facts where name = 'generation'").fetchone()
    except sqlite3.Error:
        return None
    return found[0] if found else 0


def kinds_of(metadata: Sequence[Mapping[str, Any]], known: Mapping[str, Kind]) -> dict[str, Kind]:
    """What the values of each field are, together with those known already.

    Raises:
        ValueError: a field name that a filter could not say, or values of two kinds in one field.
        TypeError: a value that is no text, number, true or false.
    """
    kinds, spelled = dict(known), {field.lower(): field for field in known}
    for one in metadata:
        for field, value in one.items():
            if not isinstance(field, str) or not FIELD.match(field) or field.lower() in WORDS:
                raise ValueError(
                    f"metadata: {field!r} is no name for a field; use letters, digits and _ and no word of a filter"
                )
            if spelled.setdefault(field.lower(), field) != field:
                raise ValueError(
                    f"metadata: {field!r} and {spelled[field.lower()]!r} differ by case alone; use one of them"
                )
            kind = _kind(field, value)
            if kinds.setdefault(field, kind) != kind:
                raise ValueError(f"metadata: field {field!r} holds a {kinds[field]}, got the {kind} {value!r}")
    return kinds


def _kind(field: str, value: Any) -> Kind:
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, str):
        return "text"
    if not isinstance(value, int | float):
        raise TypeError(
            f"metadata: field {field!r} takes a text, a number, true or false, got {type(value).__name__} {value!r}"
        )
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"metadata: field {field!r} takes finite numbers up to 2^53, got {value!r}; pass it as a text")
    return "number"
