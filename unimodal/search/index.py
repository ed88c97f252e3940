"""An index of images or texts: their embeddings, and the tokens by which the matching head reranks them.

What a search needs of the documents is in here, so that no image is opened or read by the model at query time. A backend finds candidates
(`unimodal.search.first`), which the matching head scores again.

One process and thread at a time changes an index; a second one waits a while and is told by an `InUseError`. Any number search it
meanwhile, each on the newest whole state at the beginning of its search (`unimodal.search.state`).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from unimodal import arguments
from unimodal.data.folders import require_unicode
from unimodal.data.items import as_items, is_single
from unimodal.data.texts import UnknownWordsWarning
from unimodal.files import replacing_contents, restore
from unimodal.retrieval import Combine, rule_for
from unimodal.search.access import Access
from unimodal.search.backends import VectorIndex
from unimodal.search.catalogue import Catalogue, Id, Metadata
from unimodal.search.copying import copy_index
from unimodal.search.encoder import Encoder
from unimodal.search.first import FirstStage
from unimodal.search.hits import search
from unimodal.search.reader import OnError
from unimodal.search.store import Manifest, is_ours, read_manifest, require_replaceable

TRIES = 5  # of a search whose backend shows at once what others change


class Index(Access):
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

    # What there is.

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
        rerank_top_k: int | None = None,
        *,
        filter: str | None = None,
        combine: Combine | None = None,
        match_scale: float | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        prompt: str | None = None,
    ) -> Any:
        """Hits of each query, best first. No document is opened.

        The model's scoring rule says how (`ModelConfig.scoring`), unless the call says otherwise: the embedding finds candidates, the
        matching head orders the best of them again. It judges a text
        against images, or an image against texts; other queries keep the order of the first stage, and so does, with an
        `UnknownWordsWarning`, a text none of whose words the model knows.

        Args:
            queries: one item or several, see `unimodal.data.items`.
            top_k: hits per query; all documents where there are fewer.
            rerank_top_k: depth of reranking; None is the rule's (`scoring.k`), 0 leaves it out. Hits beyond it follow in their first
                order.
            filter: only documents whose metadata pass, for example "year >= 2020"; see `unimodal.search.filters`.
            combine: `replace` orders by the match score alone, `sum` by cosine + match_scale * logit; None is the rule's
                (`scoring.combine`).
            match_scale: weight of the logit under `sum`; None is the rule's (`scoring.scale`).
            batch_size: queries at a time, and pairs at a time.
            show_progress_bar: None shows one for several batches on a terminal.
            prompt: put before the text of every query; to a vision-language model the instruction by which queries are read, which need
                not be that of the documents.

        Returns:
            A list of hits per query (for a single query, its list of hits). A hit is a dict with `id`, `document`, `metadata`,
            `rank` from 1, `first_score` (cosine), `rerank_score` (match probability, calibrated where the model is; None
            where the pair was not scored) and `score`, the one that decided: match probability, sum, or cosine.

        Raises:
            TypeError, ValueError: top_k below 1, a negative depth, an unknown `combine`, a rule that the model or its index cannot follow,
                a filter that cannot be read; also what `as_items` raises.
        """
        other: dict[str, Any] = {
            "k": arguments.optional(arguments.integer, rerank_top_k, "rerank_top_k", least=0),
            "combine": arguments.optional(arguments.choice, combine, "combine", get_args(Combine)),
            "scale": arguments.optional(arguments.number, match_scale, "match_scale"),
        }
        asked: dict[str, Any] = {
            "rule": rule_for(self.encoder.model.config, **other),
            "top_k": arguments.integer(top_k, "top_k"),
            "filter": arguments.optional(arguments.text, filter, "filter", empty=True),
            "batch_size": arguments.integer(batch_size, "batch_size"),
            "prompt": arguments.optional(arguments.text, prompt, "prompt", empty=True),
        }
        if asked["rule"].first == "pair" and self.encoder.judges:
            raise ValueError(
                "scoring.first is 'pair', and this model's matching head reads each pair as one conversation, which no index can keep; "
                "use rank, or set scoring.first to 'embed'"
            )
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
        manifest = read_manifest(folder)
        index = cls(encoder, folder, uri=uri)
        index._require_model(manifest)
        index.state  # noqa: B018
        return index


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
