"""Cosine matching of images and texts that share a category, both ways: whatever has a category in common belongs together.

The multi-positive cross-entropy of Li et al. 2021 (ALBEF, arXiv 2107.07651) with categories in place of image ids. Items with several
categories make no groups: two that share none may each share one with a third. Legend: B local pairs, K categories, E embedding width.
Across ranks: see `unimodal.distributed`.
"""

import torch.nn.functional as F
from torch import Tensor

from unimodal import distributed
from unimodal.retrieval import similarity


def category_loss(
    image: Tensor, text: Tensor, labels: Tensor, image_id: Tensor, *, scale: Tensor | float, gather: bool = True
) -> Tensor:
    """Cross-entropy of the uniform distribution over a row's positives, the mean over rows and both directions; a scalar.

    | Inputs      | Shape  | Meaning                                                                            |
    |-------------|--------|------------------------------------------------------------------------------------|
    | image, text | [B, E] | unit vectors of true pairs                                                         |
    | labels      | [B, K] | 1 for each category that a pair has; a pair without any matches its own image alone |
    | image_id    | [B]    | rows of the same image match                                                       |
    | scale       | scalar | multiplies the cosine                                                              |
    | gather      | bool   | compare the pairs of all ranks, with gradient; else the local ones                 |

    Raises ValueError on shapes that do not fit.
    """
    if labels.dim() != 2 or len(labels) != len(image) or image.shape != text.shape or image_id.shape != image.shape[:1]:
        raise ValueError(
            f"Got embeddings {tuple(image.shape)} and {tuple(text.shape)}, labels {tuple(labels.shape)}, image_id "
            f"{tuple(image_id.shape)}; expected [B, E] twice, [B, K] and [B]."
        )
    if gather:
        image, text = distributed.gather_with_grad(image), distributed.gather_with_grad(text)
        labels, image_id = distributed.gather(labels), distributed.gather(image_id)
    labels = labels.to(image.dtype)
    positive = (labels @ labels.T > 0) | (image_id[:, None] == image_id[None])  # [R * B, R * B], symmetric
    target = positive / positive.sum(1, keepdim=True)
    logits = scale * similarity(image, text)
    return (F.cross_entropy(logits, target.to(logits.dtype)) + F.cross_entropy(logits.T, target.to(logits.dtype))) / 2
