"""How alike items are: the inner product of their embeddings, and where an item has N of them that of the best (BLIP-2, arXiv 2301.12597).

Inner products of unit vectors are cosines. They are computed in float32 at least, even under autocast: bfloat16 cosines near 1 come in
steps of 1/256, which at a scale of 100 are steps of 0.4 in a logit.

Legend: A, B items, K others of one row, N and M vectors of an item, E embedding width.
"""

import torch
from torch import Tensor

from unimodal.layers import at_least_float32


def similarity(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """All A with all B, [A, E] or [A, N, E] with [B, E] or [B, M, E] -> [A, B].

    Without gradient no product of all vectors is held, [A, B] is the most.

    Args:
        a, b: embeddings.
        out: where to write the result [A, B]; for embeddings without gradient.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = at_least_float32(a), at_least_float32(b)
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            best = a.flatten(0, -2) @ b.flatten(0, -2).T  # [A N, B M]
            best = best if a.ndim == 2 else best.unflatten(0, a.shape[:2]).max(1).values
            return best if b.ndim == 2 else best.unflatten(1, b.shape[:2]).max(2).values
        pairs = [(x, y) for x in _vectors(a) for y in _vectors(b)]
        found = torch.mm(pairs[0][0], pairs[0][1].T, out=out)
        for x, y in pairs[1:]:
            torch.maximum(found, x @ y.T, out=found)
        return found


def row_similarity(row: Tensor, others: Tensor) -> Tensor:
    """Each row with its own K others, [B, E] or [B, N, E] with [B, K, E] or [B, K, M, E] -> [B, K]."""
    with torch.autocast(row.device.type, enabled=False):
        row, others = at_least_float32(row), at_least_float32(others)
        products = torch.einsum("b...e,bke->b...k", row, others.flatten(1, -2))  # [B, K M] or [B, N, K M]
        best = products if row.ndim == 2 else products.amax(1)
        return best if others.ndim == 3 else best.unflatten(1, others.shape[1:3]).amax(2)


def _vectors(x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if x.ndim == 2 else x.unbind(1)
