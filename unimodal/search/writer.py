"""The one who writes an index. It holds the lock of the folder; everybody else reads states (`unimodal.search.state`).

A writer begins by bringing the index in line: what a kill or a lost file left is mended from the parts, which hold every embedding. Vectors
come to the backend before their documents become visible, and go after them, so that every state that a reader may take is whole.

Legend: n documents.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np

from unimodal import arguments
from unimodal.data.items import Item
from unimodal.files import InUseError
from unimodal.search.backends import VectorIndex, discard_backend
from unimodal.search.catalogue import Document, Id, Metadata, kinds_of
from unimodal.search.encoder import Encoder, batches, progress
from unimodal.search.first import FirstStage
from unimodal.search.ledger import Ledger
from unimodal.search.reader import OnError, lay_out, open_item, read_items
from unimodal.search.state import backend_of, shape_of, stage_of
from unimodal.search.store import (
    Arrays,
    LostPartsError,
    Manifest,
    Parts,
    part_file,
    read_manifest,
    write_manifest,
    write_part,
)


class Writer:
    """Changes an index. Whoever makes one holds the lock, and closes it.

    Args:
        folder: of the index; `index.json` is there.
        encoder: the model that made it.
        shared: its backend, where that is open already and shows by itself what others change.

    Attributes:
        ledger: the documents.
        lost: numbers of the parts of visible documents that are not there, or not whole.
    """

    def __init__(self, folder: Path, encoder: Encoder, shared: VectorIndex | None = None) -> None:
        self.folder, self.encoder, self.shared = folder, encoder, shared
        self.manifest: Manifest = read_manifest(folder)
        self._remove_unfinished()
        try:
            self.ledger = Ledger(folder / "documents.sqlite", self.manifest["part"])
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{folder / 'documents.sqlite'} is damaged ({error}); copy it back from a backup, or build the index again in another "
                "folder"
            ) from error
        self._set_out()
        self.lost: set[int] = set()
        self._mend()

    def _set_out(self) -> None:
        self.parts = Parts(self.folder, self.manifest["part"], shape_of(self.encoder, self.manifest["kind"]))
        self.first: FirstStage | None = None

    def _remove_unfinished(self) -> None:
        """What a kill left of files that were being written."""
        for path in self.folder.glob(".unfinished-*"):
            path.unlink(missing_ok=True)

    def _stage(self) -> FirstStage:
        if self.first is None:
            backend = backend_of(self.folder, self.manifest) if self.shared is None else self.shared
            self.first = stage_of(self.manifest, backend, self.parts, self.ledger, np.empty(0, np.int64))
        return self.first

    def _mend(self) -> None:
        """Bring the backend in line with the visible documents, but for those whose part is lost."""
        rows = self.ledger.rows()
        numbers = rows // self.manifest["part"]
        try:
            self.parts.map(np.unique(numbers).tolist())
        except LostPartsError as error:
            self.lost = set(error.numbers)
            rows = rows[~np.isin(numbers, error.numbers)]
        try:
            sound = not self._stage().lacks(rows)
        except (ImportError, PermissionError, InUseError):
            raise
        except Exception:  # each library has its own for files that are cut or gone
            self._close_backend()
            discard_backend(self.manifest["backend"], self.folder / self.manifest["backend"])
            sound = False
        if not sound:
            self._stage().hold(rows, self.ledger.documents)
        if not self.lost and (not sound or not self.ledger.in_line):
            self.tidy()

    # Changing.

    def free_ids(self, count: int) -> range:
        """Whole numbers above all ids that are one."""
        start = self.ledger.next_id()
        return range(start, start + count)

    def planned(self, items: Sequence[Item], ids: Sequence[Id], metadata: Sequence[Metadata] | None) -> list[Document]:
        """Documents with their ids and metadata, checked.

        Raises:
            TypeError: an id or a value of metadata of a kind that no document has.
            ValueError: ids or metadata that do not fit.
        """
        names = arguments.ids(ids)
        if len(names) != len(items) or len(set(names)) != len(items):
            raise ValueError(
                f"ids: expected {len(items)} different ones, one per document, got {len(names)} of which {len(set(names))} differ"
            )
        held = [{} for _ in items] if metadata is None else arguments.metadata(metadata, len(items))
        kinds_of(held, self.ledger.fields)
        return [Document(one, item.document, extra) for one, item, extra in zip(names, items, held)]

    def build(
        self, items: Sequence[Item], planned: list[Document], batch_size: int, on_error: OnError, show: bool | None
    ) -> None:
        """The first documents. Where the same ones are there already, only those whose part is lost are read again.

        Raises:
            ValueError: other documents are there, or begun.
        """
        ledger = self.ledger
        begun = ledger.listed() if ledger.built else [one for _, one in ledger.pending()]
        if begun and begun != planned or (ledger.built and not begun and planned):
            names = [
                name
                for name in Document._fields
                if [getattr(a, name) for a in begun] != [getattr(b, name) for b in planned]
            ]
            differ = ", ".join({"id": "ids", "document": "documents"}.get(name, name) for name in names)
            raise ValueError(
                f"{self.folder} holds another index: other {differ}; choose another folder, delete it, or open it with "
                "Index.load to add and delete documents"
            )
        if not ledger.built:
            self._fill(items, planned, batch_size, on_error, show)
        elif self.lost:
            item_of = dict(zip(ledger.visible(), items))
            rows = [row for row in item_of if row // self.manifest["part"] in self.lost]
            self._read(rows, item_of, batch_size, on_error, show)
            self.lost = set()
            self._mend()

    def add(
        self,
        items: Sequence[Item],
        planned: list[Document],
        replace: bool,
        batch_size: int,
        on_error: OnError,
        show: bool | None,
    ) -> None:
        """More documents: see `unimodal.search.Index.add`."""
        if not replace and (there := self.ledger.there([one.id for one in planned])):
            raise ValueError(
                f"{len(there)} of {len(planned)} ids are in the index already, for example {next(iter(there))!r}; give "
                "other ids, or replace=True to put the new documents in their place"
            )
        kind = kind_of(items)
        if not len(self.ledger):
            self._set_kind(kind)
        elif items and self.manifest["kind"] != "mixed" and kind != self.manifest["kind"]:
            raise ValueError(
                f"this index keeps {self.manifest['kind']} documents with their tokens, got {kind} ones; build another index"
            )
        self._fill(items, planned, batch_size, on_error, show)

    def _set_kind(self, kind: str) -> None:
        """What an index that is empty is going to hold."""
        if kind != self.manifest["kind"]:
            self._close_backend()
            self.manifest = {**self.manifest, "kind": kind}
            write_manifest(self.folder, self.manifest)
            self._set_out()

    def _fill(
        self, items: Sequence[Item], planned: list[Document], batch_size: int, on_error: OnError, show: bool | None
    ) -> None:
        """Read what is planned and not read yet, a part at a time, then let it be seen."""
        self.encoder.check_one_shape(items)
        self.ledger.plan(planned)
        item_of = {row: item for (row, _), item in zip(self.ledger.pending(), items)}
        self._read(self.ledger.unread(), item_of, batch_size, on_error, show)
        self._stage().hold(self.ledger.arriving(), self.ledger.documents)
        self.ledger.reveal()
        self.tidy()

    def _read(
        self, unread: Sequence[int], item_of: dict[int, Item], batch_size: int, on_error: OnError, show: bool | None
    ) -> None:
        """Read the items of rows, a part at a time."""
        size = self.manifest["part"]
        steps = []
        for number, rows in groupby(unread, key=lambda row: row // size):
            of_part = list(rows)
            steps += [(number, of_part[batch]) for batch in batches(len(of_part), batch_size)]
        for number, group in groupby(progress(steps, "Indexing", show), key=lambda step: step[0]):
            read: list[tuple[list[int], Arrays]] = []
            done: list[int] = []
            errors: dict[int, str] = {}
            for _, batch in group:
                opened = {row: open_item(item_of[row], on_error) for row in batch}
                errors |= {row: item for row, item in opened.items() if isinstance(item, str)}
                good = {row: item for row, item in opened.items() if isinstance(item, Item)}
                done += batch
                if good:
                    keep = self.manifest["kind"] != "mixed"
                    options = (self.manifest["precision"], keep, self.manifest["prompt"])
                    arrays = read_items(self.encoder, list(good.values()), *options)
                    read.append(([row % size for row in good], arrays))
            self.parts.forget(number)
            write_part(part_file(self.folder, number), lay_out(read, done[-1] % size + 1))
            self.ledger.read(done, errors)

    def delete(self, ids: Sequence[Id]) -> None:
        """Take documents out, all at once."""
        self.ledger.delete(ids)
        self.tidy()

    def tidy(self) -> None:
        """Remove the vectors and the parts of documents that are gone."""
        self._stage().hold_only(self.ledger.rows())
        alive = self.ledger.parts()
        for path in self.folder.glob("part-*.safetensors"):
            number = path.stem.removeprefix("part-")
            if number.isdecimal() and int(number) not in alive:
                self.parts.forget(int(number))
                with suppress(PermissionError):  # Windows keeps a file that another process has mapped
                    path.unlink()
        self.ledger.set_in_line()

    def _close_backend(self) -> None:
        if self.first is not None and self.shared is None:
            self.first.backend.close()
        self.first = None

    def close(self) -> None:
        self._close_backend()
        self.ledger.close()


def kind_of(items: Sequence[Item]) -> str:
    """What an index of these items holds: `image`, `text` or `mixed`."""
    kinds = {item.kind for item in items}
    return kinds.pop() if kinds in ({"image"}, {"text"}) else "mixed"
