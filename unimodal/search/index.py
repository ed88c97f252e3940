"""An index of images or texts: their embeddings, and the tokens by which the matching head reranks them.

What a search needs of the documents is in here, so that no image is opened or read by the model at query time. A backend finds candidates
(`unimodal.search.first`), which the matching head scores again.

Legend: G documents, N vectors or tokens per image, T image tokens, E embedding width, W and D token widths.
"""

import tempfile
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor

from unimodal.config import MatchingConfig
from unimodal.data.items import Item, as_items, is_single
from unimodal.data.texts import UnknownWordsWarning
from unimodal.search.backends import VectorIndex, open_backend
from unimodal.search.catalogue import Catalogue, Document, Id, Metadata, kinds_of
from unimodal.search.encoder import Encoder, batches, progress
from unimodal.search.filters import Filter, Selection, parse
from unimodal.search.first import FirstStage
from unimodal.search.reader import OnError, lay_out, open_item, read_items
from unimodal.search.store import (
    Arrays,
    Manifest,
    copy_folder,
    map_part,
    part_file,
    read_manifest,
    write_manifest,
    write_part,
)
from unimodal.search.twostage import Combine, check_depths, rerank

SYNC = 8192  # vectors handed to a backend at a time


class Hit(TypedDict):
    """One result: see `Index.search`."""

    id: Id
    document: Any
    metadata: dict[str, Any]
    rank: int
    score: float
    first_score: float
    rerank_score: float | None


class Index:
    """Documents that one model has read: what `build_index` makes and `Index.load` opens. One process at a time may change an index.

    An index of images, or of texts, keeps their tokens for reranking. One that mixes them, or holds documents that are
    both, searches by embeddings only.

    Args:
        encoder: the model that read the documents.
        folder: where everything is kept.
        manifest: what `index.json` says.
        home: the temporary folder, where it is one; it goes when the index does.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        manifest: Manifest,
        home: tempfile.TemporaryDirectory | None = None,
    ) -> None:
        folder = folder.absolute()  # the working folder may change
        self.encoder, self.folder, self.manifest, self.home = encoder, folder, manifest, home
        self.catalogue = Catalogue(folder / "documents.sqlite", manifest["part"])
        self.backend: VectorIndex = open_backend(
            manifest["backend"],
            folder / manifest["backend"],
            manifest["first_width"],
            manifest["first_precision"],
            manifest["uri"],
        )
        self._parts: dict[int, Arrays] = {}
        self._count = len(self.catalogue)

    @property
    def first(self) -> FirstStage:
        """What finds candidates."""
        precision, width = self.manifest["first_precision"], self.manifest["first_width"]
        return FirstStage(self.backend, self._embeddings, precision=precision, width=width, each=self._each)

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> list[Id]:
        """What hits are called, in the order in which they were added."""
        return [document.id for document in self.catalogue.documents().values()]

    @property
    def documents(self) -> list[Any]:
        """In the order of `ids` the text, path or URL; None for an image that was passed as pixels."""
        return [document.document for document in self.catalogue.documents().values()]

    @property
    def skipped(self) -> list[Id]:
        """Ids of the documents that could not be read and are not in the index."""
        return list(self.catalogue.skipped())

    @property
    def embedding(self) -> Tensor:
        """[G, E] float32, or [G, N, E] where the model keeps N vectors per image; reads all of them."""
        return self._embeddings(self.catalogue.rows())

    @property
    def _each(self) -> int:
        """Vectors per document."""
        several = self.encoder.model.embedding.pool == "query" and self.manifest["kind"] == "image"
        return len(self.encoder.model.bridge.query_sets["image"]) if several else 1

    # Changing.

    def add(
        self,
        documents: Any,
        ids: Sequence[Id] | None = None,
        metadata: Sequence[Metadata] | None = None,
        *,
        replace: bool = False,
        batch_size: int = 32,
        on_error: OnError = "raise",
        show_progress_bar: bool | None = None,
    ) -> None:
        """Read more documents into the index. Searches see all of them or, after an interruption, none; calling again with the same ones
        continues.

        Args:
            documents: items of the kind that the index holds.
            ids: what hits are called; whole numbers above those that are there where not given.
            metadata: per document a dict for filters and hits.
            replace: put documents in place of those that have their ids.
            batch_size: documents at a time.
            on_error: as in `build_index`.
            show_progress_bar: None shows one for several batches on a terminal.

        Raises:
            ValueError: an id that is there already, another kind of document; also what `build_index` raises for ids, metadata and items.
        """
        items = as_items(documents, check_files=on_error == "raise")
        if ids is None:
            start = self.catalogue.next_id()
            ids = range(start, start + len(items))
        planned = self._plan(items, ids, metadata)
        if not replace and (there := self.catalogue.there([one.id for one in planned])):
            raise ValueError(
                f"{len(there)} of {len(planned)} ids are in the index already, for example {next(iter(there))!r}; give "
                "other ids, or replace=True to put the new documents in their place"
            )
        kind = kind_of(items)
        if not len(self):
            self.manifest = {**self.manifest, "kind": kind}
            write_manifest(self.folder, self.manifest)
        elif items and self.manifest["kind"] != "mixed" and kind != self.manifest["kind"]:
            raise ValueError(
                f"this index keeps {self.manifest['kind']} documents with their tokens, got {kind} ones; build another index"
            )
        self._fill(items, planned, batch_size, on_error, show_progress_bar)

    def delete(self, ids: Sequence[Id]) -> None:
        """Take documents out of the index, or out of the list of those that could not be read.

        Raises:
            ValueError: an id that is not there; nothing is deleted then.
        """
        wanted = list(ids) if not isinstance(ids, str) else [ids]
        known = self.catalogue.there(wanted) | self.catalogue.skipped().keys()
        if missing := [one for one in wanted if one not in known]:
            raise ValueError(f"{len(missing)} of {len(wanted)} ids are not in the index, for example {missing[0]!r}")
        self.catalogue.delete(wanted)
        self._bring_in_line()

    def build(
        self,
        items: Sequence[Item],
        ids: Sequence[Id] | None,
        metadata: Sequence[Metadata] | None,
        *,
        batch_size: int,
        on_error: OnError,
        show_progress_bar: bool | None,
    ) -> None:
        """The first documents of an index: see `unimodal.search.build_index`. One that was built from the same documents stays as it is."""
        self.encoder.check_one_shape(items)
        planned = self._plan(items, range(len(items)) if ids is None else ids, metadata)
        begun = self.catalogue.listed() if self.catalogue.built else [one for _, one in self.catalogue.pending()]
        if begun and begun != planned or (self.catalogue.built and not begun and planned):
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
        if self.catalogue.built:
            self._bring_in_line()
            self._warn()
        else:
            self._fill(items, planned, batch_size, on_error, show_progress_bar)

    def _plan(self, items: Sequence[Item], ids: Sequence[Id], metadata: Sequence[Metadata] | None) -> list[Document]:
        names = _check_ids(ids, len(items))
        if metadata is not None and len(metadata) != len(items):
            raise ValueError(f"metadata: expected {len(items)} dicts, one per document, got {len(metadata)}")
        held = [
            {name: value for name, value in one.items() if value is not None} for one in metadata or [{}] * len(items)
        ]
        kinds_of(held, self.catalogue.fields)
        return [Document(one, item.document, extra) for one, item, extra in zip(names, items, held)]

    def _fill(
        self, items: Sequence[Item], planned: list[Document], batch_size: int, on_error: OnError, show: bool | None
    ) -> None:
        """Read what is planned and not read yet, a part at a time, then let it be seen."""
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        self.encoder.check_one_shape(items)
        self.catalogue.plan(planned)
        size = self.manifest["part"]
        item_of = {row: item for (row, _), item in zip(self.catalogue.pending(), items)}
        steps = []
        for number, rows in groupby(self.catalogue.unread(), key=lambda row: row // size):
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
                    options = (self.manifest["precision"], keep, self.manifest.get("prompt"))
                    arrays = read_items(self.encoder, list(good.values()), *options)
                    read.append(([row % size for row in good], arrays))
            write_part(part_file(self.folder, number), lay_out(read, done[-1] % size + 1))
            self.catalogue.read(done, errors)
        self.catalogue.reveal()
        self._bring_in_line()
        self._warn([document.id for document in planned])

    def _warn(self, ids: Sequence[Id] | None = None) -> None:
        problems = {one: why for one, why in self.catalogue.skipped().items() if ids is None or one in set(ids)}
        if problems:
            total = len(self.catalogue.listed() if ids is None else ids)
            warnings.warn(
                f"{len(problems)} of {total} documents could not be read and are not in the index: "
                + "; ".join(f"{one!r}: {why}" for one, why in list(problems.items())[:5]),
                stacklevel=4,
            )

    def _bring_in_line(self) -> None:
        """Give the backend what it lacks and take from it what is gone; whatever was interrupted, the catalogue is right."""
        self._count = len(self.catalogue)
        if self.catalogue.in_line:
            return
        each, first = self._each, self.first
        wanted, here = first.keys(self.catalogue.rows()), self.backend.keys()
        if len(gone := np.setdiff1d(here, wanted)):
            self.backend.delete(gone)
        lacking = np.unique(np.setdiff1d(wanted, here) // each)
        self.backend.delete(first.keys(lacking))  # a document's vectors come together
        for batch in batches(len(lacking), SYNC):
            some = lacking[batch]
            metadata = self.catalogue.documents(some.tolist())
            vectors = self._embeddings(some).reshape(len(some) * each, -1)
            self.backend.add(
                first.keys(some),
                first.narrow(vectors),
                [metadata[row].metadata for row in some.tolist() for _ in range(each)],
            )
        self.catalogue.set_in_line()
        alive = self.catalogue.parts()
        for path in self.folder.glob("part-*.safetensors"):
            if (number := int(path.stem.removeprefix("part-"))) not in alive:
                self._parts.pop(number, None)
                path.unlink()

    # Reading what is kept.

    def _part(self, number: int) -> Arrays:
        if number not in self._parts:
            self._parts[number] = map_part(part_file(self.folder, number))
        return self._parts[number]

    def _embeddings(self, rows: np.ndarray) -> Tensor:
        """Embeddings of rows [n] in order, [n, E] or [n, N, E]."""
        size, width = self.manifest["part"], self.encoder.model.embedding.dim
        shape = (len(rows), self._each, width) if self._each > 1 else (len(rows), width)
        out = np.empty(shape, np.float32)
        numbers = rows // size
        for number in np.unique(numbers):
            here = numbers == number
            out[here] = self._part(int(number))["embedding"][rows[here] % size]
        return torch.from_numpy(out)

    def tokens(self, row: int) -> Tensor:
        """What the matching head reads of a document: [length, W] float32, or ids [length]."""
        number, place = divmod(row, self.manifest["part"])
        part = self._part(number)
        where = slice(part["end"][place - 1] if place else 0, part["end"][place])
        if len(part["scale"]):
            return torch.from_numpy(part["tokens"][where] * part["scale"][where, None])
        return torch.from_numpy(np.array(part["tokens"][where]))

    # Searching.

    def search(
        self,
        queries: Any,
        top_k: int = 10,
        rerank_top_k: int = 100,
        *,
        filter: str | None = None,
        combine: Combine | None = None,
        match_scale: float | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        prompt: str | None = None,
    ) -> Any:
        """Hits of each query, best first. No document is opened.

        The embedding finds candidates, the matching head orders the best `rerank_top_k` of them again. It judges a text
        against images, or an image against texts; other queries keep the order of the first stage, and so does, with an
        `UnknownWordsWarning`, a text none of whose words the model knows.

        Args:
            queries: one item or several, see `unimodal.data.items`.
            top_k: hits per query; all documents where there are fewer.
            rerank_top_k: depth of reranking; 0 leaves it out. Hits beyond it follow in their first order.
            filter: only documents whose metadata pass, for example "year >= 2020"; see `unimodal.search.filters`.
            combine: `replace` orders by the match score alone, `sum` by cosine + match_scale * logit; None is as the model's configuration
                says (`matching.combine`).
            match_scale: weight of the logit under `sum`; None is the model's (`matching.scale`).
            batch_size: queries at a time, and pairs at a time.
            show_progress_bar: None shows one for several batches on a terminal.
            prompt: put before the text of every query; to a vision-language model the instruction by which queries are read, which need
                not be that of the documents.

        Returns:
            A list of hits per query (for a single query, its list of hits). A hit is a dict with `id`, `document`, `metadata`,
            `rank` from 1, `first_score` (cosine), `rerank_score` (match probability, calibrated where the model is; None
            where the pair was not scored) and `score`, the one that decided: match probability, sum, or cosine.

        Raises:
            ValueError: top_k below 1, a negative depth, an unknown `combine`, a filter that cannot be read; also what
                `as_items` raises.
        """
        matching = self.encoder.model.config.matching or MatchingConfig()
        combine = matching.combine if combine is None else combine
        match_scale = matching.scale if match_scale is None else match_scale
        check_depths(top_k, rerank_top_k, combine)
        items = as_items(queries)
        selection = None if filter is None else Selection(parse(filter, self.catalogue.fields), self._keys)
        partner = {"image": "text", "text": "image"}.get(self.manifest["kind"])
        said = [self.encoder.unknown_words(item) for item in items]
        for message in said:
            if message:
                warnings.warn(message, UnknownWordsWarning, stacklevel=2)
        kinds = [(item.kind, bool(message)) for item, message in zip(items, said)]
        groups = [[row for row in range(len(items)) if kinds[row] == kind] for kind in dict.fromkeys(kinds)]
        steps = [group[rows] for group in groups for rows in batches(len(group), batch_size)]
        hits: list[list[Hit]] = [[] for _ in items]
        for rows in progress(steps, "Searching", show_progress_bar):
            read = self.encoder.read([items[row] for row in rows], prompt)

            def match(pairs: list[tuple[int, int]], tokens: list[Tensor] = read.tokens) -> Tensor:
                cached = {row: self.tokens(row) for row in {row for _, row in pairs}}
                both = [(tokens[query], cached[row]) for query, row in pairs]
                return self.encoder.match(both if partner == "image" else [(d, q) for q, d in both], batch_size)

            can_match = self.encoder.matches and kinds[rows[0]] == (partner, False)
            found = rerank(
                self.first.candidates(read.embedding.cpu(), max(top_k, rerank_top_k), selection),
                match if can_match else None,
                top_k=top_k,
                rerank_top_k=rerank_top_k,
                combine=combine,
                match_scale=match_scale,
                probability=self.encoder.probability,
            )
            known = self.catalogue.documents([one.row for some in found for one in some])
            for query, some in zip(rows, found):
                hits[query] = [
                    {
                        **known[one.row]._asdict(),  # type: ignore[typeddict-item]
                        "rank": rank,
                        "score": one.score,
                        "first_score": one.first_score,
                        "rerank_score": one.rerank_score,
                    }
                    for rank, one in enumerate(some, start=1)
                ]
        return hits[0] if is_single(queries) else hits

    def _keys(self, where: Filter) -> np.ndarray:
        return self.first.keys(self.catalogue.rows(where))

    # Keeping.

    def save(self, folder: str | Path) -> None:
        """Copy the index to another folder; an index that was there stays until the new one is complete.

        Raises:
            ValueError: the folder holds something else, or the vectors are on a server.
        """
        if self.manifest["uri"]:
            raise ValueError(
                "the vectors of this index are on a Milvus server, which a folder cannot copy; build it with folder=..."
            )
        if Path(folder).resolve() != self.folder.resolve():
            copy_folder(self.folder, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder) -> "Index":
        """Open an index with the model that made it.

        Raises:
            FileNotFoundError: no index there.
            ValueError: the index is incomplete, of another format, or made by another model.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        require_same_model(str(folder), manifest["model"], encoder)
        index = cls(encoder, folder, manifest)
        if not index.catalogue.built:
            parts = {row // manifest["part"] for row, _ in index.catalogue.pending()}
            missing = sorted({row // manifest["part"] for row in index.catalogue.unread()})
            first = part_file(folder, missing[0] if missing else 0).name
            raise ValueError(
                f"{folder} is incomplete: {len(missing)} of {len(parts)} parts are missing, first {first}; build it "
                "again with the same documents and this folder, and it continues there"
            )
        index._bring_in_line()
        return index


def require_same_model(name: str, made_by: str, encoder: Encoder) -> None:
    """Raises:
    ValueError: another model than this one made the index.
    """
    if made_by != (fingerprint := encoder.fingerprint()):
        raise ValueError(
            f"{name} was made by model {made_by}, this is model {fingerprint}: their vectors cannot be "
            "compared. Load the model that made it (same weights, dtype, preprocessing), or build the index again"
        )


def kind_of(items: Sequence[Item]) -> str:
    """What an index of these items holds: `image`, `text` or `mixed`."""
    kinds = {item.kind for item in items}
    return kinds.pop() if kinds in ({"image"}, {"text"}) else "mixed"


def _check_ids(ids: Sequence[Id], count: int) -> list[Id]:
    ids = list(ids)
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int | str)]:
        raise ValueError(f"ids: expected int or str, got {type(wrong[0]).__name__} {wrong[0]!r}")
    if large := [i for i in ids if isinstance(i, int) and not -(2**63) <= i < 2**63]:
        raise ValueError(f"ids: whole numbers have up to 64 bits, got {large[0]}; pass it as a text")
    if len(ids) != count or len(set(ids)) != count:
        raise ValueError(
            f"ids: expected {count} different ones, one per document, got {len(ids)} of which {len(set(ids))} differ"
        )
    return ids
