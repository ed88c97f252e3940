"""An exact index of images or texts: their embeddings, and the tokens by which the matching head reranks them.

What a search needs of the documents is in here, so that no image is opened or read by the model at query time.

Legend: G documents, N vectors or tokens per image, T image tokens, E embedding width, W and D token widths.
"""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from unimodal.data.items import as_items, is_single
from unimodal.search.encoder import Encoder, batches, progress
from unimodal.search.store import Arrays, join, read_folder, replace_folder
from unimodal.search.twostage import Combine, two_stage


class Hit(TypedDict):
    """One result: see `Index.search`."""

    id: int | str
    document: Any
    rank: int
    score: float
    first_score: float
    rerank_score: float | None


class Index:
    """Documents that one model has read: what `build_index` makes and `Index.load` opens.

    An index of images, or of texts, keeps their tokens for reranking. One that mixes them, or holds documents that are
    both, searches by embeddings only.

    Attributes:
        ids: what hits are called.
        documents: per row the text, path or URL; None for an image that was passed as pixels.
        skipped: ids of the documents that could not be read and are not in the index.
        embedding: [G, E] float32, or [G, N, E] where the model keeps N vectors per image.
    """

    def __init__(self, encoder: Encoder, manifest: dict[str, Any], parts: list[Arrays]) -> None:
        self.encoder, self.manifest = encoder, manifest
        self.arrays = arrays = join(parts, encoder.model.config.embedding.dim)
        rows = arrays["row"].tolist()
        self.ids: list[int | str] = [manifest["ids"][row] for row in rows]
        self.documents: list[Any] = [manifest["documents"][row] for row in rows]
        self.skipped: list[int | str] = [
            manifest["ids"][r] for r in sorted(set(range(len(manifest["ids"]))) - set(rows))
        ]
        self.embedding = torch.from_numpy(arrays["embedding"])
        self.ends = np.cumsum(arrays["length"])  # [G], where the tokens of each document end

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, row: int) -> Tensor:
        """What the matching head reads of a document: [length, W] float32, or ids [length]."""
        where = slice(self.ends[row] - self.arrays["length"][row], self.ends[row])
        tokens = torch.from_numpy(self.arrays["tokens"][where])
        if tokens.dtype == torch.int8:
            return tokens.float() * torch.from_numpy(self.arrays["scale"][where])[:, None]
        return tokens

    def search(
        self,
        queries: Any,
        top_k: int = 10,
        rerank_top_k: int = 100,
        *,
        combine: Combine = "replace",
        match_scale: float = 1.0,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Hits of each query, best first. No document is opened.

        The embedding finds candidates, the matching head orders the best `rerank_top_k` of them again. It judges a text
        against images, or an image against texts; other queries keep the order of the first stage.

        Args:
            queries: one item or several, see `unimodal.data.items`.
            top_k: hits per query; all documents where there are fewer.
            rerank_top_k: depth of reranking; 0 leaves it out. Hits beyond it follow in their first order.
            combine: `replace` orders by the match score alone, `sum` by cosine + match_scale * logit.
            match_scale: weight of the logit under `sum`.
            batch_size: queries at a time, and pairs at a time.
            show_progress_bar: None shows one for several batches on a terminal.

        Returns:
            A list of hits per query (for a single query, its list of hits). A hit is a dict with `id`, `document`,
            `rank` from 1, `first_score` (cosine), `rerank_score` (match probability; None where the pair was not
            scored) and `score`, the one that decided: match probability, sum, or cosine.

        Raises:
            ValueError: top_k below 1, a negative depth, an unknown `combine`; also what `as_items` raises.
        """
        items = as_items(queries)
        partner = {"image": "text", "text": "image"}.get(self.manifest["kind"])
        groups = [[row for row, item in enumerate(items) if item.kind == kind] for kind in ("image", "text", "both")]
        steps = [group[rows] for group in groups for rows in batches(len(group), batch_size)]
        hits: list[list[Hit]] = [[] for _ in items]
        for rows in progress(steps, "Searching", show_progress_bar):
            read = self.encoder.read([items[row] for row in rows])

            def match(pairs: list[tuple[int, int]], tokens: list[Tensor] = read.tokens) -> Tensor:
                cached = {row: self.tokens(row) for row in {row for _, row in pairs}}
                both = [(tokens[query], cached[row]) for query, row in pairs]
                return self.encoder.match(both if partner == "image" else [(d, q) for q, d in both], batch_size)

            can_match = self.encoder.matches and items[rows[0]].kind == partner
            found = two_stage(
                read.embedding.cpu(),
                self.embedding,
                match if can_match else None,
                top_k=top_k,
                rerank_top_k=rerank_top_k,
                combine=combine,
                match_scale=match_scale,
            )
            for row, some in zip(rows, found):
                hits[row] = [self._hit(rank, *one) for rank, one in enumerate(some, start=1)]
        return hits[0] if is_single(queries) else hits

    def _hit(self, rank: int, row: int, score: float, first_score: float, rerank_score: float | None) -> Hit:
        return {
            "id": self.ids[row],
            "document": self.documents[row],
            "rank": rank,
            "score": score,
            "first_score": first_score,
            "rerank_score": rerank_score,
        }

    def save(self, folder: str | Path) -> None:
        """Write the index as a folder; an index that was there stays until the new one is complete.

        Raises:
            ValueError: the folder holds something else.
        """
        replace_folder(Path(folder), {**self.manifest, "part": max(1, len(self.manifest["ids"]))}, [self.arrays])

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder) -> "Index":
        """Open an index with the model that made it.

        Raises:
            FileNotFoundError: no index there.
            ValueError: the index is incomplete, of another format, or made by another model.
        """
        manifest, parts = read_folder(Path(folder))
        if manifest["model"] != (fingerprint := encoder.fingerprint()):
            raise ValueError(
                f"{folder} was made by model {manifest['model']}, this is model {fingerprint}: their vectors cannot be "
                "compared. Load the model that made it (same weights, dtype, preprocessing), or build the index again"
            )
        return cls(encoder, manifest, parts)
