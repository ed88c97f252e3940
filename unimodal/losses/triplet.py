"""Hinge of triplets: the true partner must be nearer than a wrong one by a margin.

VSE++ (Faghri et al. 2018, arXiv 1707.05612); as SCAN uses it, Lee et al. 2018 (arXiv 1803.08024). Legend: B pairs of all ranks together.
"""

import torch
from torch import Tensor

from unimodal.layers import at_least_float32


def triplet_loss(
    scores: Tensor, image_id: Tensor | None = None, *, margin: float = 0.2, hardest: bool = True
) -> Tensor:
    """Hinges of all rows in both directions, summed over the batch as SCAN does; a scalar.

    | Inputs   | Shape              | Meaning                                                                            |
    |----------|--------------------|------------------------------------------------------------------------------------|
    | scores   | [B, B]             | of image i with text j; the diagonal are the true pairs                            |
    | image_id | [B], default none  | pairs of equal ids are no negatives; without, only the diagonal is none, as in SCAN |
    | margin   | number             | how much nearer the true partner must be                                           |
    | hardest  | bool               | only each row's worst offender counts, else the sum of all                         |

    Raises ValueError for scores that are not square, or ids that do not fit.
    """
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"Got scores {tuple(scores.shape)}; expected [B, B], true pairs on the diagonal.")
    if image_id is not None and image_id.shape != scores.shape[:1]:
        raise ValueError(f"Got image_id {tuple(image_id.shape)} for scores {tuple(scores.shape)}; expected [B].")
    scores = at_least_float32(scores)
    ids = torch.arange(len(scores), device=scores.device) if image_id is None else image_id
    same = ids[:, None] == ids[None, :]
    true = scores.diagonal()
    to_text = (margin + scores - true[:, None]).clamp(min=0).masked_fill(same, 0)  # row: an image, column: a wrong text
    to_image = (margin + scores - true[None, :]).clamp(min=0).masked_fill(same, 0)
    if hardest:
        return to_text.amax(1).sum() + to_image.amax(0).sum()
    return to_text.sum() + to_image.sum()
