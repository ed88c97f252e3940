"""Two stages on plain arrays: cosine finds candidates in the whole gallery, a pair score orders the best of them again.

The pair score replaces the cosine within the candidates (ALBEF, arXiv 2107.07651) or is added to it (BLIP-2, arXiv
2301.12597). All that was not scored as a pair stays below, in its first order.

Legend: Q queries, G gallery items, N vectors per item, E embedding width, P pairs.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Combine = Literal["replace", "sum"]


class Found(NamedTuple):
    """A gallery row, the score that orders it, its cosine, and its match probability where it was scored."""

    row: int
    score: float
    first_score: float
    rerank_score: float | None


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of unit vectors, [A, E] or [A, N, E] against [B, E] or [B, N, E] -> [A, B], float32.

    Where an item has N vectors, the best of them counts.
    """
    a, b = a.float(), b.float()
    best = a.new_full((len(a), len(b)), -torch.inf)
    for x in a.unbind(1) if a.ndim == 3 else (a,):
        for y in b.unbind(1) if b.ndim == 3 else (b,):
            best = torch.maximum(best, x @ y.T)
    return best


def two_stage(
    queries: Tensor,
    gallery: Tensor,
    match: Callable[[list[tuple[int, int]]], Tensor] | None,
    *,
    top_k: int,
    rerank_top_k: int,
    combine: Combine = "replace",
    match_scale: float = 1.0,
) -> list[list[Found]]:
    """The best `top_k` of the gallery for each query, best first.

    Args:
        queries: unit vectors [Q, E] or [Q, N, E].
        gallery: unit vectors [G, E] or [G, N, E].
        match: match logits [P] of pairs (query, gallery row); None leaves out the second stage.
        top_k: at most so many per query.
        rerank_top_k: how many of the first stage's best are scored as pairs.
        combine: `replace` orders by the logit alone, `sum` by cosine + match_scale * logit.
        match_scale: weight of the logit under `sum`.

    Raises:
        ValueError: top_k below 1, a negative depth, or an unknown `combine`.
    """
    if top_k < 1 or rerank_top_k < 0:
        raise ValueError(f"expected top_k >= 1 and rerank_top_k >= 0, got {top_k} and {rerank_top_k}")
    if combine not in get_args(Combine):
        raise ValueError(f"combine: expected 'replace' or 'sum', got {combine!r}")
    if len(queries) == 0 or len(gallery) == 0:
        return [[] for _ in range(len(queries))]
    first, rows = similarity(queries, gallery).topk(min(max(top_k, rerank_top_k), len(gallery)))  # [Q, k]
    depth = min(rerank_top_k, rows.shape[1]) if match else 0
    candidates = [[Found(row, s, s, None) for row, s in zip(*pair)] for pair in zip(rows.tolist(), first.tolist())]
    if not match or not depth:
        return [found[:top_k] for found in candidates]
    pairs = [(query, found.row) for query, some in enumerate(candidates) for found in some[:depth]]
    logits = match(pairs).view(len(queries), depth)
    # Ordered by logits, which still differ where probabilities have both become 1.
    order = (first[:, :depth] + match_scale * logits if combine == "sum" else logits).sort(descending=True, stable=True)
    out = []
    for some, scores, places, chance in zip(candidates, order.values, order.indices, logits.sigmoid()):
        again = []
        for score, place in zip(scores.tolist(), places.tolist()):
            probability = float(chance[place])
            final = score if combine == "sum" else probability
            again.append(some[place]._replace(score=final, rerank_score=probability))
        out.append((again + some[depth:])[:top_k])
    return out
