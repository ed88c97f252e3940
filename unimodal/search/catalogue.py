"""What documents an index has: one SQLite file, the only place that says so.

Documents come in three steps, so that a kill between any two of them loses nothing and leaves nothing twice: they are planned (`plan`),
their parts are read one after another (`read`), and all of them become visible at once (`reveal`). Until then searches see the old state;
planning the same documents again finds the plan, and goes on with what is not read yet. The backend is brought into line afterwards:
`in_line` is false from the moment documents change until the backend has them all.

Metadata are columns whose declared type says what they hold: TEXT a text, NUMERIC a number, BOOLEAN true or false.

Legend: rows are the numbers by which an index knows its documents, never used twice.
"""

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimodal.search.filters import FIELD, WORDS, Filter, Kind, column

TYPES: dict[Kind, str] = {"text": "TEXT", "number": "NUMERIC", "flag": "BOOLEAN"}
KINDS: dict[str, Kind] = {declared: kind for kind, declared in TYPES.items()}
LARGEST = 2**53  # beyond it not every whole number has a float of its own

Id = int | str
Metadata = Mapping[str, str | int | float | bool | None]


class Document(NamedTuple):
    """What hits call a document, what it is in words, and its metadata without empty values."""

    id: Id
    document: Any
    metadata: dict[str, Any]


class Catalogue:
    """The documents of an index, in a file that is made where it is missing."""

    def __init__(self, path: Path, part: int) -> None:
        self.part = part
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute("pragma case_sensitive_like = on")
        with self._transaction():
            self.db.execute(
                "create table if not exists documents (row integer primary key, id not null, document text not null, "
                "pending integer not null, read integer not null, error text)"
            )
            self.db.execute("create unique index if not exists visible on documents (id) where pending = 0")
            self.db.execute("create table if not exists facts (name text primary key, value integer not null)")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("begin immediate")
        try:
            yield
        except BaseException:
            self.db.execute("rollback")
            raise
        self.db.execute("commit")

    # Facts.

    def fact(self, name: str) -> int:
        found = self.db.execute("select value from facts where name = ?", (name,)).fetchone()
        return found[0] if found else 0

    def _set(self, name: str, value: int) -> None:
        self.db.execute("insert or replace into facts values (?, ?)", (name, value))

    @property
    def built(self) -> bool:
        """Whether the first documents are all there."""
        return bool(self.fact("built"))

    @property
    def in_line(self) -> bool:
        """Whether the backend holds exactly the visible documents."""
        return bool(self.fact("in_line"))

    def set_in_line(self) -> None:
        with self._transaction():
            self._set("in_line", 1)

    @property
    def fields(self) -> dict[str, Kind]:
        """The metadata that documents have, and what their values are."""
        columns = self.db.execute("pragma table_info(documents)").fetchall()
        return {name[2:]: KINDS[declared] for _, name, declared, *_ in columns if name.startswith(column(""))}

    # Adding.

    def plan(self, documents: Sequence[Document]) -> None:
        """Write down what is going to be read; what an interrupted run planned is kept where it is the same."""
        if documents and [pending for _, pending in self.pending()] == list(documents):
            return
        with self._transaction():
            self.db.execute("delete from documents where pending = 1")
            known = self.fields
            for field, kind in kinds_of([document.metadata for document in documents], known).items():
                if field not in known:
                    self.db.execute(f"alter table documents add column `{column(field)}` {TYPES[kind]}")
            fields = list(self.fields)
            names = ["row", "id", "document", "pending", "read", *(f"`{column(field)}`" for field in fields)]
            first = self.fact("next_part") * self.part
            self.db.executemany(
                f"insert into documents ({', '.join(names)}) values ({', '.join('?' * len(names))})",
                (
                    (first + i, one.id, _text(one.document), 1, 0, *(one.metadata.get(field) for field in fields))
                    for i, one in enumerate(documents)
                ),
            )
            self._set("next_part", self.fact("next_part") - (-len(documents) // self.part))

    def pending(self) -> list[tuple[int, Document]]:
        """(row, document) of what is planned and not visible yet."""
        return self._documents("pending = 1 order by row")

    def unread(self) -> list[int]:
        """Rows that are planned and not read."""
        return [
            row for (row,) in self.db.execute("select row from documents where pending = 1 and read = 0 order by row")
        ]

    def read(self, rows: Sequence[int], errors: Mapping[int, str]) -> None:
        """These rows are read and their part is on the disk, but for those with an error."""
        with self._transaction():
            self.db.executemany(
                "update documents set read = 1, error = ? where row = ?", [(errors.get(row), row) for row in rows]
            )

    def reveal(self) -> None:
        """Everything planned becomes visible, in place of visible documents with the same ids."""
        with self._transaction():
            self.db.execute(
                "delete from documents where pending = 0 and id in (select id from documents where pending = 1)"
            )
            self.db.execute("update documents set pending = 0 where pending = 1")
            self._set("built", 1)
            self._set("in_line", 0)

    def delete(self, ids: Sequence[Id]) -> None:
        with self._transaction():
            self.db.executemany("delete from documents where pending = 0 and id = ?", [(one,) for one in ids])
            self._set("in_line", 0)

    # Asking.

    def __len__(self) -> int:
        return self.db.execute("select count(*) from documents where pending = 0 and error is null").fetchone()[0]

    def rows(self, where: Filter | None = None) -> np.ndarray:
        """Rows of the visible documents that a filter lets through, [n] int64, in order."""
        more = "" if where is None else f"and {where.sql()}"
        found = self.db.execute(f"select row from documents where pending = 0 and error is null {more} order by row")
        return np.fromiter((row for (row,) in found), np.int64)

    def parts(self) -> set[int]:
        """Numbers of the parts that hold a document, visible or not."""
        return {part for (part,) in self.db.execute(f"select distinct row / {self.part} from documents")}

    def documents(self, rows: Sequence[int] | None = None) -> dict[int, Document]:
        """By row; all visible ones without `rows`."""
        if rows is None:
            return dict(self._documents("pending = 0 and error is null order by row"))
        return dict(self._documents(f"row in ({', '.join(str(int(row)) for row in rows)})"))

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

    def next_id(self) -> int:
        """The first whole number above all ids that are one."""
        question = "select coalesce(max(id), -1) + 1 from documents where pending = 0 and typeof(id) = 'integer'"
        return self.db.execute(question).fetchone()[0]

    def _documents(self, where: str) -> list[tuple[int, Document]]:
        fields = self.fields
        names = "".join(f", `{column(field)}`" for field in fields)
        out = []
        for row, one, document, *values in self.db.execute(
            f"select row, id, document{names} from documents where {where}"
        ):
            metadata = {
                field: bool(value) if kind == "flag" else value
                for (field, kind), value in zip(fields.items(), values)
                if value is not None
            }
            out.append((row, Document(one, json.loads(document), metadata)))
        return out

    def close(self) -> None:
        self.db.close()


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


def _text(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False)
