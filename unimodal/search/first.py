"""The first stage: a backend finds candidates, full embeddings say how near they are.

A first pass that reads fewer dimensions or fewer bits is asked for more candidates than are wanted; their cosines are computed from the
full embeddings, so that it costs candidates at most, never the order among them.

Legend: Q queries, N vectors per item, E embedding width, R rows.
"""

from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from unimodal.search.backends import VectorIndex
from unimodal.search.filters import Selection
from unimodal.search.twostage import similarity

# How many candidates are asked for each one wanted, and how many more.
MORE = {"float32": (1, 0), "int8": (1, 32), "binary": (4, 1000)}
MORE_NARROW = (4, 64)  # on top where fewer dimensions are read


class FirstStage:
    """A backend and the embeddings behind it.

    Args:
        backend: holds the first `width` dimensions of every vector; vector n of row r has the key r N + n.
        embeddings: rows [R] -> unit vectors [R, E] or [R, N, E].
        precision: in which the backend keeps its vectors.
        width: how many dimensions it keeps.
        each: N, vectors per row.
    """

    def __init__(
        self,
        backend: VectorIndex,
        embeddings: Callable[[np.ndarray], Tensor],
        *,
        precision: str,
        width: int,
        each: int = 1,
    ) -> None:
        self.backend, self.embeddings, self.width, self.each = backend, embeddings, width, each
        self.more = MORE[precision]

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Keys of all vectors of rows [R], [R N]."""
        return (rows[:, None] * self.each + np.arange(self.each)).ravel()

    def narrow(self, vectors: Tensor) -> np.ndarray:
        """The dimensions that the backend keeps, [n, E] -> unit vectors [n, width] float32."""
        full = self.width == vectors.shape[-1]
        return (vectors if full else F.normalize(vectors[..., : self.width], dim=-1)).float().numpy()

    def candidates(self, queries: Tensor, k: int, selection: Selection | None = None) -> list[list[tuple[int, float]]]:
        """For each of the queries, [Q, E] or [Q, N, E], up to k rows with their cosines, best first."""
        if not len(self.backend) or not len(queries):
            return [[] for _ in queries]
        factor, more = self.more
        if self.width < queries.shape[-1]:
            factor, more = factor * MORE_NARROW[0], more + MORE_NARROW[1]
        wanted = min((k * factor + more) * self.each, len(self.backend))
        if selection is not None and len(selection.keys) <= wanted:  # few enough to look at every one
            keys = np.tile(selection.keys, (len(queries), 1))
        else:
            flat = self.narrow(queries.reshape(-1, queries.shape[-1]))
            keys = self.backend.search(flat, wanted, selection)[0].reshape(len(queries), -1)
        out = []
        for query, some in zip(queries, keys):
            rows = np.unique(some[some >= 0] // self.each)
            cosines = similarity(query[None], self.embeddings(rows))[0]
            order = cosines.argsort(descending=True, stable=True)[:k]
            out.append(list(zip(rows[order.numpy()].tolist(), cosines[order].tolist())))
        return out
