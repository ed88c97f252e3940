"""The first stage: a backend finds candidates, full embeddings say how near they are.

A first pass that reads fewer dimensions or fewer bits is asked for more candidates than are wanted; their cosines are computed from the
full embeddings, so that it costs candidates at most, never the order among them. A backend may hold vectors of rows that nobody may see yet
or any more: it is asked for more until it has given enough of the others. Equal cosines are ordered by id, whatever the backend and the
order in which documents came.

Legend: Q queries, N vectors per item, E embedding width, R rows.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from unimodal.retrieval import similarity
from unimodal.search.backends import VectorIndex
from unimodal.search.catalogue import Document
from unimodal.search.encoder import batches
from unimodal.search.filters import Selection

# How many candidates are asked for each one wanted, and how many more.
MORE = {"float32": (1, 8), "int8": (1, 32), "binary": (4, 1000)}
MORE_NARROW = (4, 64)  # on top where fewer dimensions are read
SYNC = 8192  # vectors handed to a backend at a time
EQUAL = 1e-6  # scores of a backend that differ by less may be equal


class FirstStage:
    """A backend and the embeddings behind it.

    Args:
        backend: holds the first `width` dimensions of every vector; vector n of row r has the key r N + n.
        embeddings: rows [R] -> unit vectors [R, E] or [R, N, E].
        rows: [R] int64, rising: what may be found.
        precision: in which the backend keeps its vectors.
        width: how many dimensions it keeps.
        each: N, vectors per row.
        ranks: rows -> their places in the order of ids; None where the rows themselves are in this order.
    """

    def __init__(
        self,
        backend: VectorIndex,
        embeddings: Callable[[np.ndarray], Tensor],
        rows: np.ndarray,
        *,
        precision: str,
        width: int,
        each: int = 1,
        ranks: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.backend, self.embeddings, self.rows, self.ranks = backend, embeddings, rows, ranks
        self.width, self.each = width, each
        self.more = MORE[precision]

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Keys of all vectors of rows [R], [R N]."""
        return (rows[:, None] * self.each + np.arange(self.each)).ravel()

    def narrow(self, vectors: Tensor) -> np.ndarray:
        """The dimensions that the backend keeps, [n, E] -> unit vectors [n, width] float32."""
        full = self.width == vectors.shape[-1]
        return (vectors if full else F.normalize(vectors[..., : self.width], dim=-1)).float().numpy()

    # What the backend holds.

    def lacks(self, rows: np.ndarray) -> bool:
        """Whether the backend lacks a vector of these rows, or has one twice. A database that others change too is only counted."""
        if self.backend.shared:
            return len(self.backend) < len(rows) * self.each
        here = np.sort(self.backend.keys())
        return bool((here[1:] == here[:-1]).any()) or not np.isin(self.keys(rows), here).all()

    def hold(self, rows: np.ndarray, documents: Callable[[Sequence[int]], Mapping[int, Document]]) -> None:
        """Give the backend the vectors of these rows that it lacks, once each, with the metadata of their documents."""
        here, count = np.unique(self.backend.keys(), return_counts=True)
        wanted = self.keys(rows)
        lacking = np.unique(wanted[~np.isin(wanted, here[count == 1])] // self.each)
        if len(lacking):
            self.backend.delete(self.keys(lacking))  # a document's vectors come together
        for batch in batches(len(lacking), SYNC):
            some = lacking[batch]
            known = documents(some.tolist())
            vectors = self.embeddings(some).reshape(len(some) * self.each, -1)
            metadata = [known[row].metadata for row in some.tolist() for _ in range(self.each)]
            self.backend.add(self.keys(some), self.narrow(vectors), metadata)

    def hold_only(self, rows: np.ndarray) -> None:
        """Take from the backend what is not of these rows."""
        here = self.backend.keys()
        if len(gone := here[~np.isin(here, self.keys(rows))]):
            self.backend.delete(gone)

    # Searching.

    def candidates(self, queries: Tensor, k: int, selection: Selection | None = None) -> list[list[tuple[int, float]]]:
        """For each of the queries, [Q, E] or [Q, N, E], up to k rows with their cosines, best first; equal ones by id."""
        allowed = self.keys(self.rows) if selection is None else selection.keys
        found: list[list[tuple[int, float]]] = [[] for _ in queries]
        if not len(allowed):
            return found
        factor, more = self.more
        if self.width < queries.shape[-1]:
            factor, more = factor * MORE_NARROW[0], more + MORE_NARROW[1]
        wanted = (k * factor + more) * self.each
        left = list(range(len(queries)))
        exhausted = selection is not None and len(allowed) <= wanted  # few enough to look at every one
        while left:
            keys: list[np.ndarray | None] = [allowed] * len(left)
            if not exhausted:
                keys = self._ask(queries[left], wanted, k, allowed, selection)
            for query, some in zip(left, keys):
                if some is not None:
                    found[query] = self._ordered(queries[query], np.unique(some // self.each), k)
            left = [query for query, some in zip(left, keys) if some is None]
            exhausted, wanted = wanted >= len(allowed), 2 * wanted
        return found

    def _ask(
        self, queries: Tensor, wanted: int, k: int, allowed: np.ndarray, selection: Selection | None
    ) -> list[np.ndarray | None]:
        """Allowed keys that the backend finds for each query; None where it has to be asked for more: too few of the first ones are
        allowed, or the next one may be as near as the last."""
        flat = self.narrow(queries.reshape(-1, queries.shape[-1]))
        asked = min(wanted, len(self.backend))
        if not asked:
            return [None] * len(queries)
        try:
            keys, scores = self.backend.search(flat, asked, selection)
        except ValueError:
            if selection is None:
                raise
            return [allowed] * len(queries)  # a filter that this backend cannot evaluate: every one is looked at
        place = np.searchsorted(allowed, keys).clip(max=len(allowed) - 1)
        good = (keys >= 0) & (allowed[place] == keys)
        enough = min(k * self.each, len(allowed))
        out: list[np.ndarray | None] = []
        per_query = len(flat) // len(queries)
        for start in range(0, len(flat), per_query):
            rows = range(start, start + per_query)
            sure = all(good[row].sum() >= enough and _ends_clearly(scores[row], good[row], enough) for row in rows)
            whole = all(good[row].sum() == len(allowed) for row in rows)
            out.append(keys[rows.start : rows.stop][good[rows.start : rows.stop]] if sure or whole else None)
        return out

    def _ordered(self, query: Tensor, rows: np.ndarray, k: int) -> list[tuple[int, float]]:
        """The best k of rows by their cosine with one query [E] or [N, E]: in float64, so that equal embeddings have equal cosines."""
        exact = similarity(self.embeddings(rows).double(), query.double()[None])[:, 0]
        cosines = exact.float().clamp(-1, 1).numpy()
        tied = len(np.unique(cosines)) < len(cosines)
        ranks = self.ranks(rows) if tied and self.ranks is not None else rows
        order = np.lexsort((ranks, -cosines))[:k]
        return list(zip(rows[order].tolist(), cosines[order].tolist()))


def _ends_clearly(scores: np.ndarray, good: np.ndarray, enough: int) -> bool:
    """Whether the last score is below that of the last good one that is needed."""
    needed = scores[good][enough - 1]
    return bool(scores[-1] < needed - EQUAL * max(1.0, abs(float(needed))))
