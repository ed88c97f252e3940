"""Contrastive losses between image and text embeddings: softmax over the batch (InfoNCE) and pairwise sigmoid.

A batch may hold several captions of one image: whatever shares an image id is a positive, never a negative.

InfoNCE: Radford et al. 2021 (CLIP, arXiv 2103.00020). Uniform targets over equal image ids: Li et al. 2021 (ALBEF,
arXiv 2107.07651). Maximum over queries: Li et al. 2023 (BLIP-2, arXiv 2301.12597). Sigmoid: Zhai et al. 2023 (SigLIP,
arXiv 2303.15343).
Legend: I images, T texts (often I = T = B), N queries, E embedding dim. Across ranks: see `unimodal.distributed`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal import distributed
from unimodal.losses.numerics import at_least_float32


def similarity(image: Tensor, text: Tensor) -> Tensor:
    """Inner products of all images and all texts, [I, E] or [I, N, E] with [T, E] -> [I, T]; cosines for unit vectors.

    An image with N query embeddings is as similar to a text as its best query (BLIP-2). Computed in float32 even under
    autocast: bfloat16 cosines near 1 come in steps of 1/256, which at a scale of 100 are steps of 0.4 in a logit.
    """
    with torch.autocast(image.device.type, enabled=False):
        products = at_least_float32(image) @ at_least_float32(text).T  # [I, T] or [I, N, T]
    return products if image.dim() == 2 else products.max(dim=1).values


def info_nce(
    image: Tensor,
    text: Tensor,
    image_id: Tensor,
    text_image_id: Tensor | None = None,
    *,
    scale: Tensor | float,
    label_smoothing: float = 0.0,
    gather: bool = True,
) -> Tensor:
    """Symmetric, multi-positive InfoNCE: each image finds its texts among all texts, each text its images; a scalar.

    | Inputs          | Shape                | Meaning                                                                 |
    |-----------------|----------------------|-------------------------------------------------------------------------|
    | image           | [I, E] or [I, N, E]  | unit vectors; with N queries per image the best query counts            |
    | text            | [T, E]               | unit vectors                                                            |
    | image_id        | [I]                  | which image a row shows                                                 |
    | text_image_id   | [T], default image_id| which image a text describes                                            |
    | scale           | scalar               | multiplies the cosine, e.g. `logit_scale.exp()`; 1 / temperature        |
    | label_smoothing | number in [0, 1)     | share of each target row that is spread evenly over all columns         |
    | gather          | bool                 | score the batches of all ranks, with gradient; else the local one       |

    Targets are uniform over equal ids, `Q_ij = P_ij / sum_j P_ij`, and the two directions are averaged (OmniBridge sums
    them: multiply by 2). With unique ids this is the loss of CLIP. Every rank returns the value of the global batch.

    Raises ValueError on shapes that do not fit and if, with `text_image_id`, an image or a text has no partner.
    """
    text_id = _text_ids(image, text, image_id, text_image_id)
    image, text = at_least_float32(image), at_least_float32(text)
    if gather:
        image, text = distributed.gather_with_grad(image), distributed.gather_with_grad(text)
        image_id, text_id = distributed.gather(image_id), distributed.gather(text_id)

    logits = scale * similarity(image, text)  # [I, T]
    positive = (image_id[:, None] == text_id[None, :]).to(logits.dtype)  # [I, T]
    if text_image_id is not None:  # by default text i describes image i, so that nobody can be alone
        _require_partner(positive, "image", "text")
        _require_partner(positive.T, "text", "image")
    to_text = F.cross_entropy(logits, _uniform(positive), label_smoothing=label_smoothing)
    to_image = F.cross_entropy(logits.T, _uniform(positive.T), label_smoothing=label_smoothing)
    return (to_text + to_image) / 2


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    image_id: Tensor,
    text_image_id: Tensor | None = None,
    *,
    scale: Tensor | float,
    bias: Tensor | float,
    gather: bool = True,
) -> Tensor:
    """Pairwise sigmoid loss: every pair is its own yes/no question, `-log sigmoid(z (scale s + bias))`; a scalar.

    | Inputs        | Shape                | Meaning                                                                 |
    |---------------|----------------------|-------------------------------------------------------------------------|
    | image         | [I, E] or [I, N, E]  | unit vectors; with N queries per image the best query counts            |
    | text          | [T, E]               | unit vectors                                                            |
    | image_id      | [I]                  | which image a row shows                                                 |
    | text_image_id | [T], default image_id| which image a text describes                                            |
    | scale, bias   | scalars              | logit = scale * cosine + bias; the paper starts at 10 and -10           |
    | gather        | bool                 | pair local images with the texts of all ranks (a ring); else local ones |

    z is +1 for equal ids, else -1. Summed over texts, averaged over **images**: divided by I rows, not by I * T pairs.
    A rank returns the mean over its own images; the mean over ranks is the value of the global batch.

    Raises ValueError on shapes that do not fit.
    """
    text_id = _text_ids(image, text, image_id, text_image_id)
    text = at_least_float32(text)
    blocks = distributed.ring_exchange(text, text_id) if gather else [(text, text_id)]
    total = torch.zeros((), device=image.device)
    for block, block_id in blocks:
        logits = scale * similarity(image, block) + bias  # [I, T]
        sign = torch.where(image_id[:, None] == block_id[None, :], 1.0, -1.0)
        total = total - F.logsigmoid(sign * logits).sum()
    return total / image.shape[0]


def _uniform(positive: Tensor) -> Tensor:
    """Target distribution of each row: the same probability for each of its positives."""
    return positive / positive.sum(dim=1, keepdim=True)


def _require_partner(positive: Tensor, row: str, column: str) -> None:
    alone = (positive.sum(dim=1) == 0).nonzero()
    if len(alone):
        raise ValueError(
            f"The {row} at row {int(alone[0])} of the batch has no {column} with its image id, so there is nothing to "
            f"move it toward. Give every {row} at least one {column}, or check image_id and text_image_id."
        )


def _text_ids(image: Tensor, text: Tensor, image_id: Tensor, text_image_id: Tensor | None) -> Tensor:
    """The ids of the texts, after checking that all shapes fit each other."""
    if image.dim() not in (2, 3) or text.dim() != 2 or image.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"Got image embeddings {tuple(image.shape)} and text embeddings {tuple(text.shape)}; "
            "expected [I, E] or [I, N, E] and [T, E] with the same E."
        )
    ids = image_id if text_image_id is None else text_image_id
    for what, rows, given in (("image_id", image, image_id), ("text_image_id (default: image_id)", text, ids)):
        if given.shape != rows.shape[:1]:
            raise ValueError(
                f"Got {what} of shape {tuple(given.shape)} for embeddings {tuple(rows.shape)}; expected one id per row."
            )
    return ids
