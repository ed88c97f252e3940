"""An index of images or texts: their embeddings, and the tokens by which the matching head reranks them.

What a search needs of the documents is in here, so that no image is opened or read by the model at query time. A backend finds candidates
(`unimodal.search.first`), which the matching head scores again.

One process and thread at a time changes an index; a second one waits a while and is told by an `InUseError`. Any number search it
meanwhile, each on the newest whole state at the beginning of its search (`unimodal.search.state`).
"""

import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from unimodal import arguments
from unimodal.data.folders import require_unicode
from unimodal.data.items import as_items, is_single
from unimodal.data.texts import UnknownWordsWarning
from unimodal.files import LOCK, InUseError, locked, replacing_contents, restore
from unimodal.search.backends import VectorIndex, open_backend
from unimodal.search.catalogue import PATIENCE, Catalogue, Id, Metadata
from unimodal.search.copying import copy_index
from unimodal.search.encoder import Encoder
from unimodal.search.first import FirstStage
from unimodal.search.hits import search
from unimodal.search.reader import OnError
from unimodal.search.state import State, newest, stage_of, stamp_of
from unimodal.search.store import Manifest, is_ours, read_manifest, require_place, require_replaceable, write_manifest
from unimodal.search.twostage import Combine
from unimodal.search.writer import Writer

WAIT = 30  # seconds to wait for another writer
TRIES = 5  # of a search whose backend shows at once what others change


class Index:
    """Documents that one model has read: what `build_index` makes and `Index.load` opens.

    Everything that is asked of an index is answered from its newest whole state: what this object, another thread or another process has
    added is there when the call that added it has returned.

    An index of images, or of texts, keeps their tokens for reranking. One that mixes them, or holds documents that are
    both, searches by embeddings only.

    Args:
        encoder: the model that read the documents.
        folder: where everything is kept.
        home: the temporary folder, where it is one; it goes when the index does.
        uri: address of the server that holds the vectors, where one does.
    """

    def __init__(
        self, encoder: Encoder, folder: Path, home: tempfile.TemporaryDirectory | None = None, uri: str | None = None
    ) -> None:
        self.encoder, self.folder, self.home, self.uri = encoder, folder.absolute(), home, uri
        self._own = threading.local()  # the writer, in the thread that writes
        self._spare: tempfile.TemporaryDirectory | None = None

        self._process, self._lock = os.getpid(), threading.Lock()
        self._state: State | None = None

    def _notice_fork(self) -> None:
        """A lock and a database of another process are of no use after a fork."""
        if self._process != os.getpid():
            self._own, self._process, self._lock, self._state = threading.local(), os.getpid(), threading.Lock(), None

    # What there is.

    @property
    def state(self) -> State:
        """The newest whole state."""
        self._notice_fork()
        with self._lock:
            if self._state is None or self._state.stamp != stamp_of(self.folder):
                self._state = self._take(self._state)
            return self._state

    def _take(self, held: State | None) -> State:
        shared = held.backend if held is not None and held.backend.shared else None
        state = newest(self.folder, self.encoder, self.uri, shared)
        if held is None or held.manifest["model"] != state.manifest["model"]:
            require_same_model(str(self.folder), state.manifest["model"], self.encoder)
        if state.sound and state.catalogue.in_line:
            return state
        try:  # a kill or a lost file left something, which a writer mends when it begins; or another one writes just now
            with self.writing(wait=0 if state.sound else PATIENCE):
                pass
        except InUseError:
            if state.sound:
                return state
            raise
        except PermissionError:
            return state if state.sound else self._mended_elsewhere(state)
        state = newest(self.folder, self.encoder, self.uri, shared)
        if not state.sound:
            raise ValueError(
                f"{self.folder / state.manifest['backend']} is damaged and could not be mended; delete it, and it is made again"
            )
        return state

    def _mended_elsewhere(self, state: State) -> State:
        """A state whose backend is made anew in a temporary folder, where its own cannot be written."""
        name, manifest = state.manifest["backend"], state.manifest
        self._spare = tempfile.TemporaryDirectory(prefix="unimodal-index-")
        backend = open_backend(
            name, Path(self._spare.name, name), manifest["first_width"], manifest["first_precision"], manifest["uri"]
        )
        first = stage_of(manifest, backend, state.parts, state.catalogue, state.catalogue.rows())
        first.hold(first.rows, state.catalogue.documents)
        warnings.warn(
            f"{self.folder / name} is damaged and cannot be written: its vectors are made again each time that the index is opened; open "
            "it once where you may write it",
            stacklevel=4,
        )
        return State(manifest, state.catalogue, state.parts, first, True, state.stamp)

    @property
    def manifest(self) -> Manifest:
        """What `index.json` says."""
        return self.state.manifest

    @property
    def catalogue(self) -> Catalogue:
        """The documents."""
        return self.state.catalogue

    @property
    def backend(self) -> VectorIndex:
        """What searches the vectors."""
        return self.state.backend

    @property
    def first(self) -> FirstStage:
        """What finds candidates."""
        return self.state.stage

    def __len__(self) -> int:
        return len(self.catalogue)

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
        state = self.state
        return state.parts.embeddings(state.catalogue.rows())

    # Changing.

    @contextmanager
    def writing(self, wait: float | None = None, begin: Manifest | None = None) -> Iterator[Writer]:
        """Hold the index as the only one who writes it while the block runs; `add` and `delete` within the block write as the same one.

        Args:
            wait: seconds to wait for another writer; None is half a minute.
            begin: what `index.json` says of an index that may have to be begun.

        Raises:
            InUseError: another process or thread writes the index.
            PermissionError: the folder cannot be written.
        """
        self._notice_fork()
        if (writer := getattr(self._own, "writer", None)) is not None:
            yield writer
            return
        if begin is not None:
            require_place(self.folder, begin)
            self.folder.mkdir(parents=True, exist_ok=True)
        restore(self.folder)
        with self._holding(WAIT if wait is None else wait):
            if begin is not None and require_place(self.folder, begin) is None:
                write_manifest(self.folder, begin)
            shared = self._state.backend if self._state is not None and self._state.backend.shared else None
            writer = self._own.writer = Writer(self.folder, self.encoder, shared)
            try:
                yield writer
            finally:
                self._own.writer = None
                writer.close()

    @contextmanager
    def _holding(self, wait: float) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / LOCK, f"the index {self.folder}", wait))
            except InUseError:
                raise
            except OSError as error:
                raise PermissionError(
                    f"{self.folder}: the index cannot be changed ({error.strerror}); save it to a folder that you may write, and change "
                    "that one"
                ) from error
            yield

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
            InUseError: another process or thread writes the index.
            ValueError: an id that is there already, another kind of document; also what `build_index` raises for ids, metadata and items.
        """
        arguments.choice(on_error, "on_error", get_args(OnError))
        batch_size = arguments.integer(batch_size, "batch_size")
        replace = arguments.flag(replace, "replace")
        items = as_items(documents, check_files=on_error == "raise")
        with self.writing() as writer:
            planned = writer.planned(items, writer.free_ids(len(items)) if ids is None else ids, metadata)
            writer.add(items, planned, replace, batch_size, on_error, show_progress_bar)
            warn_of_skipped(writer.ledger, [document.id for document in planned])

    def delete(self, ids: Sequence[Id]) -> None:
        """Take documents out of the index, or out of the list of those that could not be read.

        Raises:
            InUseError: another process or thread writes the index.
            TypeError: something that is no id.
            ValueError: an id that is not there; nothing is deleted then.
        """
        wanted = arguments.ids([ids] if isinstance(ids, str) else ids)
        with self.writing() as writer:
            known = writer.ledger.there(wanted) | writer.ledger.skipped().keys()
            if missing := [one for one in wanted if one not in known]:
                raise ValueError(
                    f"{len(missing)} of {len(wanted)} ids are not in the index, for example {missing[0]!r:.80}"
                )
            writer.delete(wanted)

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
            TypeError, ValueError: top_k below 1, a negative depth, an unknown `combine`, a filter that cannot be read; also what
                `as_items` raises.
        """
        asked: dict[str, Any] = {
            "top_k": arguments.integer(top_k, "top_k"),
            "rerank_top_k": arguments.integer(rerank_top_k, "rerank_top_k", least=0),
            "filter": arguments.optional(arguments.text, filter, "filter", empty=True),
            "combine": arguments.optional(arguments.choice, combine, "combine", get_args(Combine)),
            "match_scale": arguments.optional(arguments.number, match_scale, "match_scale"),
            "batch_size": arguments.integer(batch_size, "batch_size"),
            "prompt": arguments.optional(arguments.text, prompt, "prompt", empty=True),
        }
        items = as_items(queries)
        said = [self.encoder.unknown_words(item) for item in items]
        for message in said:
            if message:
                warnings.warn(message, UnknownWordsWarning, stacklevel=2)
        for _ in range(TRIES):
            state = self.state
            hits = search(
                self.encoder,
                state,
                items,
                [not message for message in said],
                show_progress_bar=show_progress_bar,
                **asked,
            )
            if not state.backend.shared or self.state is state:
                break
        return hits[0] if is_single(queries) else hits

    # Keeping.

    def save(self, folder: str | Path) -> None:
        """Copy the index to another folder; an index that was there stays until the new one is complete.

        Raises:
            InUseError: another process or thread writes the index in that folder.
            OSError: the folder cannot be written; what was there is intact.
            ValueError: the folder holds something else, or the vectors are on a server.
        """
        folder = arguments.path(folder, "folder")
        state = self.state
        if state.manifest["uri"]:
            raise ValueError(
                "the vectors of this index are on a Milvus server, which a folder cannot copy; build it with folder=..."
            )
        if folder.resolve() != self.folder.resolve():
            require_replaceable(folder)
            with replacing_contents(folder, is_ours) as fresh:
                copy_index(state, self.folder, fresh, self.encoder)

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder, uri: str | None = None) -> "Index":
        """Open an index with the model that made it. A sound index is only read, and may lie in a folder that cannot be written.

        Args:
            folder: where it is kept.
            encoder: the model that made it.
            uri: address of the Milvus server that holds its vectors. An index that names another server, or one that was not asked for,
                is not opened: whoever wrote it could see all that is searched.

        Raises:
            FileNotFoundError: no index there.
            PermissionError: a file of it may not be read.
            ValueError: the index is incomplete, of another format, made by another model, or names a server that was not asked for.
        """
        folder = arguments.path(folder, "folder")
        require_unicode(folder)
        if not isinstance(encoder, Encoder):
            raise TypeError(arguments.refused("encoder", "an Encoder", encoder, "Unimodal.load_index passes its own"))
        restore(folder)
        require_same_model(str(folder), read_manifest(folder)["model"], encoder)
        index = cls(encoder, folder, uri=uri)
        index.state  # noqa: B018
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


def warn_of_skipped(catalogue: Catalogue, ids: Sequence[Id] | None = None) -> None:
    """Warn of the documents that could not be read, all of them or those of `ids`."""
    problems = {one: why for one, why in catalogue.skipped().items() if ids is None or one in set(ids)}
    if problems:
        total = len(catalogue.listed() if ids is None else ids)
        warnings.warn(
            f"{len(problems)} of {total} documents could not be read and are not in the index: "
            + "; ".join(f"{one!r}: {why}" for one, why in list(problems.items())[:5]),
            stacklevel=3,
        )
