"""The catalogue of an index in its file, as the one who writes it holds it: see `unimodal.search.catalogue`."""

import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from unimodal.search.catalogue import PATIENCE, TYPES, Catalogue, Document, Id, kinds_of
from unimodal.search.filters import column


class Ledger(Catalogue):
    """The catalogue in its file, for the one who writes; made where it is missing."""

    def __init__(self, path: Path, part: int) -> None:
        super().__init__(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False), part)
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

    def _set(self, name: str, value: int) -> None:
        self.db.execute("insert or replace into facts values (?, ?)", (name, value))

    def _changed(self) -> None:
        self._set("generation", secrets.randbits(62))
        self._set("in_line", 0)

    def set_in_line(self) -> None:
        with self._transaction():
            self._set("in_line", 1)

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

    def read(self, rows: Sequence[int], errors: Mapping[int, str]) -> None:
        """These rows are read and their part is on the disk, but for those with an error."""
        with self._transaction():
            self.db.executemany(
                "update documents set read = 1, error = ? where row = ?", [(errors.get(row), row) for row in rows]
            )

    def visible(self) -> list[int]:
        """Rows of all visible documents, with those that could not be read, in order."""
        return [row for (row,) in self.db.execute("select row from documents where pending = 0 order by row")]

    def arriving(self) -> np.ndarray:
        """Rows that are visible or about to be, [n] int64, in order: all that are read but for those with an error."""
        found = self.db.execute(
            "select row from documents where (pending = 0 or read = 1) and error is null order by row"
        ).fetchall()
        return np.fromiter((row for (row,) in found), np.int64, len(found))

    def reveal(self) -> None:
        """Everything planned becomes visible, in place of visible documents with the same ids."""
        with self._transaction():
            self.db.execute(
                "delete from documents where pending = 0 and id in (select id from documents where pending = 1)"
            )
            self.db.execute("update documents set pending = 0 where pending = 1")
            self._set("built", 1)
            self._changed()

    def delete(self, ids: Sequence[Id]) -> None:
        with self._transaction():
            self.db.executemany("delete from documents where pending = 0 and id = ?", [(one,) for one in ids])
            self._changed()

    def forget_plan(self) -> None:
        """Forget what was planned and is not visible, and take nothing of the backend for granted."""
        with self._transaction():
            self.db.execute("delete from documents where pending = 1")
            self._set("in_line", 0)

    def next_id(self) -> int:
        """The first whole number above all ids that are one."""
        question = "select coalesce(max(id), -1) + 1 from documents where pending = 0 and typeof(id) = 'integer'"
        return self.db.execute(question).fetchone()[0]


def _text(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False)
