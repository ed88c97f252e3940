"""Hinge of triplets in which samples have mass and attract each other: heavy and near ones count most.

Our reading of the gravitation loss of CIMN, of which the abstract alone is public: it brings the mass of a sample into the objective and
does not treat all samples alike, as a triplet loss does. Legend: B pairs of all ranks together, E
embedding width, N items.
"""

import torch
from torch import Tensor

from unimodal.layers import at_least_float32

LIGHTEST, HEAVIEST = 0.5, 2.0


@torch.no_grad()
def masses(image: Tensor, text: Tensor, *, neighbours: int = 5, kappa: float = 1.0) -> tuple[Tensor, Tensor]:
    """How central each item is in its batch, without gradient: masses of images [B] and of texts [B], of mean 1 before they are held
    between 0.5 and 2.

    | Inputs      | Shape  | Meaning                                                                    |
    |-------------|--------|----------------------------------------------------------------------------|
    | image, text | [B, E] | unit vectors                                                               |
    | neighbours  | number | the nearest items of either side, whose mean similarity makes the mass      |
    | kappa       | number | how much that adds to 1                                                    |
    """
    items = at_least_float32(torch.cat([image, text]))  # [2 B, E]
    similarity = (items @ items.T).fill_diagonal_(float("-inf"))
    nearest = similarity.topk(min(neighbours, len(items) - 1), 1).values
    mass = 1 + kappa * nearest.mean(1)
    mass = (mass / mass.mean()).clamp(LIGHTEST, HEAVIEST)
    return mass[: len(image)], mass[len(image) :]


def gravitation_loss(
    scores: Tensor,
    row_mass: Tensor,
    column_mass: Tensor,
    image_id: Tensor | None = None,
    *,
    margin: float = 0.2,
    softening: float = 0.1,
    hardest: bool = False,
) -> Tensor:
    """Hinges of all rows in both directions, each times the mass of its query and the attraction of its negative; a scalar.

    | Inputs      | Shape              | Meaning                                                                      |
    |-------------|--------------------|------------------------------------------------------------------------------|
    | scores      | [B, B]             | cosines of row i with column j; the diagonal are the true pairs              |
    | row_mass    | [B]                | how much each row counts                                                     |
    | column_mass | [B]                | how much each column counts                                                  |
    | image_id    | [B], default none  | pairs of equal ids are no negatives                                          |
    | margin      | number             | how much nearer the true partner must be                                     |
    | softening   | number             | added to the squared distance; where it is large, all are attracted alike    |
    | hardest     | bool               | only each query's worst offender counts, else the sum of all                 |

    Attraction is mass times mass over (1 - cosine) squared plus the softening, relative to the query's most attracted negative; no gradient
    flows through it. With equal masses and a large softening this is `triplet_loss`.
    Raises ValueError for scores that are not square, or masses or ids that do not fit.
    """
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"Got scores {tuple(scores.shape)}; expected [B, B], true pairs on the diagonal.")
    ids = torch.arange(len(scores), device=scores.device) if image_id is None else image_id
    if not row_mass.shape == column_mass.shape == ids.shape == scores.shape[:1]:
        raise ValueError(
            f"Got masses {tuple(row_mass.shape)} and {tuple(column_mass.shape)}, image_id {tuple(ids.shape)} for scores "
            f"{tuple(scores.shape)}; expected [B] each."
        )
    scores = at_least_float32(scores)
    same = ids[:, None] == ids[None]
    row_mass, column_mass = row_mass.detach().to(scores.dtype), column_mass.detach().to(scores.dtype)
    force = row_mass[:, None] * column_mass / ((1 - scores.detach()).square() + softening)
    force = force.masked_fill(same, 0)

    def direction(scores: Tensor, force: Tensor, mass: Tensor) -> Tensor:
        """Row: a query, column: its candidates."""
        tiny = torch.finfo(force.dtype).tiny  # a query without negatives is attracted by none
        weight = force / force.amax(1, keepdim=True).clamp(min=tiny)
        hinge = (margin + scores - scores.diagonal()[:, None]).clamp(min=0).masked_fill(same, 0)
        pull = weight * hinge
        return (mass * (pull.amax(1) if hardest else pull.sum(1))).sum()

    return direction(scores, force, row_mass) + direction(scores.T, force.T, column_mass)
