"""Captions of the same image are alike: the third term of OmniBridge's retrieval loss (arXiv 2509.19018).

Legend: M texts, E embedding dim. Across ranks: see `unimodal.distributed`.
"""

import torch
from torch import Tensor

from unimodal import distributed
from unimodal.layers import at_least_float32
from unimodal.retrieval import similarity


def text_to_text_loss(
    text: Tensor,
    image_id: Tensor,
    *,
    scale: Tensor | float,
    self_in_denominator: bool = False,
    gather: bool = True,
) -> Tensor:
    """Each caption finds the other captions of its image among all other texts; a scalar.

    | Inputs              | Shape  | Meaning                                                                          |
    |---------------------|--------|----------------------------------------------------------------------------------|
    | text                | [M, E] | unit vectors                                                                     |
    | image_id            | [M]    | which image a text describes                                                     |
    | scale               | scalar | 1 / temperature                                                                  |
    | self_in_denominator | bool   | whether a text also competes with itself, as in the authors' code; the loss then |
    |                     |        | stays above log 2, however alike the captions are                                |
    | gather              | bool   | compare with the texts of all ranks, with gradient; else the local ones          |

    Targets are uniform over a text's other captions. The mean is over texts that have one; 0 if none has.

    Raises ValueError on shapes that do not fit.
    """
    if text.dim() != 2 or image_id.shape != text.shape[:1]:
        raise ValueError(
            f"Got texts {tuple(text.shape)} and image_id {tuple(image_id.shape)}; expected [M, E] and [M]."
        )
    text = at_least_float32(text)
    if gather:
        text, image_id = distributed.gather_with_grad(text), distributed.gather(image_id)
    itself = torch.eye(len(text), dtype=torch.bool, device=text.device)
    positive = (image_id[:, None] == image_id[None, :]) & ~itself
    counted = positive.any(1)
    if not counted.any():
        return text.sum() * 0.0
    logits = scale * similarity(text, text)  # [M, M]
    columns = logits if self_in_denominator else logits.masked_fill(itself, float("-inf"))
    target = logits.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
    return (columns.logsumexp(1) - target)[counted].mean()
