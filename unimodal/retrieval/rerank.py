"""The second stage: pair scores order the first stage's best candidates again, as the scoring rule says.

All that was not scored as a pair stays below, in its first order.

Legend: P pairs, Q queries, k candidates.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimodal.config import ScoringRule


class Found(NamedTuple):
    """A gallery row, the score that orders it, its first score, and its match probability where it was scored as a pair."""

    row: int
    score: float
    first_score: float
    rerank_score: float | None


def depth(rule: ScoringRule, gallery: int) -> int:
    """How many of a gallery's items are scored as pairs with each query."""
    return gallery if rule.first == "pair" else min(rule.k, gallery)


def combined(rule: ScoringRule, first: Tensor, pair: Tensor) -> Tensor:
    """What orders candidates: their pair scores, or under `sum` their first scores plus `scale` times the pair scores; any one shape."""
    return first + rule.scale * pair if rule.combine == "sum" else pair


def rerank(
    candidates: Sequence[Sequence[tuple[int, float]]],
    match: Callable[[list[tuple[int, int]]], Tensor] | None,
    rule: ScoringRule,
    *,
    top_k: int,
    probability: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> list[list[Found]]:
    """The best `top_k` for each query, best first.

    Args:
        candidates: per query (gallery row, first score), best first.
        match: match logits [P] of pairs (query, gallery row); None leaves out the second stage.
        rule: how many are scored as pairs, and what their scores do.
        top_k: at most so many per query.
        probability: what turns logits into match probabilities.
    """
    depths = [depth(rule, len(some)) if match else 0 for some in candidates]
    pairs = [(query, row) for query, some in enumerate(candidates) for row, _ in some[: depths[query]]]
    logits = match(pairs) if match and pairs else torch.empty(0)
    out = []
    for some, scores in zip(candidates, logits.split(depths)):
        # Ordered by logits, which still differ where probabilities have both become 1.
        key = combined(rule, torch.tensor([score for _, score in some[: len(scores)]]), scores)
        chance = probability(scores)
        shown = key if rule.combine == "sum" else chance
        again = [
            Found(some[place][0], float(shown[place]), some[place][1], float(chance[place]))
            for place in key.argsort(descending=True, stable=True).tolist()
        ]
        out.append((again + [Found(row, score, score, None) for row, score in some[len(scores) :]])[:top_k])
    return out
