"""The second stage on plain numbers: a pair score orders the first stage's best candidates again.

The pair score replaces the cosine within the candidates (ALBEF, arXiv 2107.07651) or is added to it (BLIP-2, arXiv
2301.12597). All that was not scored as a pair stays below, in its first order.

Legend: P pairs.
"""

from collections.abc import Callable, Sequence
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


def check_depths(top_k: int, rerank_top_k: int, combine: str) -> None:
    """Raises:
    ValueError: top_k below 1, a negative depth, or an unknown `combine`.
    """
    if top_k < 1 or rerank_top_k < 0:
        raise ValueError(f"expected top_k >= 1 and rerank_top_k >= 0, got {top_k} and {rerank_top_k}")
    if combine not in get_args(Combine):
        raise ValueError(f"combine: expected 'replace' or 'sum', got {combine!r}")


def rerank(
    candidates: Sequence[Sequence[tuple[int, float]]],
    match: Callable[[list[tuple[int, int]]], Tensor] | None,
    *,
    top_k: int,
    rerank_top_k: int,
    combine: Combine = "replace",
    match_scale: float = 1.0,
    probability: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> list[list[Found]]:
    """The best `top_k` for each query, best first.

    Args:
        candidates: per query (gallery row, cosine), best first.
        match: match logits [P] of pairs (query, gallery row); None leaves out the second stage.
        top_k: at most so many per query.
        rerank_top_k: how many of the first stage's best are scored as pairs.
        combine: `replace` orders by the logit alone, `sum` by cosine + match_scale * logit.
        match_scale: weight of the logit under `sum`.
        probability: what turns logits into match probabilities.

    Raises:
        ValueError: as `check_depths`.
    """
    check_depths(top_k, rerank_top_k, combine)
    depths = [min(rerank_top_k, len(some)) if match else 0 for some in candidates]
    pairs = [(query, row) for query, some in enumerate(candidates) for row, _ in some[: depths[query]]]
    logits = match(pairs) if match and pairs else torch.empty(0)
    out = []
    for some, scores in zip(candidates, logits.split(depths)):
        first = torch.tensor([cosine for _, cosine in some[: len(scores)]])
        # Ordered by logits, which still differ where probabilities have both become 1.
        key = first + match_scale * scores if combine == "sum" else scores
        chance = probability(scores)
        shown = key if combine == "sum" else chance
        again = [
            Found(some[place][0], float(shown[place]), some[place][1], float(chance[place]))
            for place in key.argsort(descending=True, stable=True).tolist()
        ]
        out.append((again + [Found(row, cosine, cosine, None) for row, cosine in some[len(scores) :]])[:top_k])
    return out
