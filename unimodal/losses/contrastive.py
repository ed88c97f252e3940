"""Contrastive losses between image and text embeddings: softmax over the batch (InfoNCE) and pairwise sigmoid.

A batch may hold several captions of one image: whatever shares an image id is a positive, never a negative. Beside the
batch, each image may bring texts that are wrong for it, and each text images that are wrong for it: hard negatives that
were mined. They are compared with their own row alone, the one they are known to be wrong for.

InfoNCE: Radford et al. 2021 (CLIP, arXiv 2103.00020). Uniform targets over equal image ids: Li et al. 2021 (ALBEF,
arXiv 2107.07651). Maximum over queries: Li et al. 2023 (BLIP-2, arXiv 2301.12597). Sigmoid: Zhai et al. 2023 (SigLIP,
arXiv 2303.15343). Row by row, so that no matrix of the whole batch exists: Gao et al. 2021 (GradCache, arXiv 2101.06983).
Legend: I images, T texts (often I = T = B), N queries, E embedding dim, K wrong items per row. Across ranks: see
`unimodal.distributed`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unimodal import distributed
from unimodal.layers import at_least_float32
from unimodal.retrieval import row_similarity, similarity


class Wrong(NamedTuple):
    """Items that are wrong for one row each: embeddings [B, K, E] (or [B, K, N, E]), and a mask [B, K] of what is there."""

    embedding: Tensor
    given: Tensor


def info_nce(
    image: Tensor,
    text: Tensor,
    image_id: Tensor,
    text_image_id: Tensor | None = None,
    *,
    scale: Tensor | float,
    label_smoothing: float = 0.0,
    wrong_text: Wrong | None = None,
    wrong_image: Wrong | None = None,
    rows: int | None = None,
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
    | label_smoothing | number in [0, 1)     | share of each target row that is spread evenly over the batch's columns |
    | wrong_text      | [I, K, E], [I, K]    | further columns of each image's row alone; never a target               |
    | wrong_image     | [T, K, E], [T, K]    | further columns of each text's row alone; never a target                |
    | rows            | number, default all  | rows compared at a time; fewer take less memory and are computed twice  |
    | gather          | bool                 | score the batches of all ranks, with gradient; else the local one       |

    Targets are uniform over equal ids, `Q_ij = P_ij / sum_j P_ij`, and the two directions are averaged (OmniBridge sums
    them: multiply by 2). With unique ids this is the loss of CLIP. Every rank returns the value of the global batch.

    Raises ValueError on shapes that do not fit and if, with `text_image_id`, an image or a text has no partner.
    """
    text_id = _text_ids(image, text, image_id, text_image_id)
    image, text = at_least_float32(image), at_least_float32(text)
    image_wrong = _wrong_logits(image, wrong_text, scale)  # [I, K] or None
    text_wrong = _wrong_logits(text, wrong_image, scale)
    if gather:
        image, text = distributed.gather_with_grad(image), distributed.gather_with_grad(text)
        image_id, text_id = distributed.gather(image_id), distributed.gather(text_id)
        image_wrong, text_wrong = (
            x if x is None else distributed.gather_with_grad(x) for x in (image_wrong, text_wrong)
        )

    def direction(
        score: Callable[[slice], Tensor], ids: Tensor, others: Tensor, wrong: Tensor | None, row: str
    ) -> Tensor:
        def block(part: slice) -> Tensor:
            positive = ids[part, None] == others[None, :]
            if text_image_id is not None:  # by default text i describes image i, so that nobody can be alone
                _require_partner(positive, part.start, *((row, "text") if row == "image" else (row, "image")))
            return _cross_entropy(
                scale * score(part), positive, None if wrong is None else wrong[part], label_smoothing
            )

        return _by_rows(block, len(ids), rows) / len(ids)

    to_text = direction(lambda part: similarity(image[part], text), image_id, text_id, image_wrong, "image")
    to_image = direction(lambda part: similarity(image, text[part]).T, text_id, image_id, text_wrong, "text")
    return (to_text + to_image) / 2


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    image_id: Tensor,
    text_image_id: Tensor | None = None,
    *,
    scale: Tensor | float,
    bias: Tensor | float,
    wrong_text: Wrong | None = None,
    wrong_image: Wrong | None = None,
    rows: int | None = None,
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
    | wrong_text    | [I, K, E], [I, K]    | one more pair with z = -1 for each that is there                        |
    | wrong_image   | [T, K, E], [T, K]    | one more pair with z = -1 for each that is there                        |
    | rows          | number, default all  | images compared at a time; fewer take less memory, are computed twice   |
    | gather        | bool                 | pair local images with the texts of all ranks (a ring); else local ones |

    z is +1 for equal ids, else -1. Summed over texts, averaged over **images**: divided by I rows, not by I * T pairs.
    A rank returns the mean over its own images; the mean over ranks is the value of the global batch.

    Raises ValueError on shapes that do not fit.
    """
    text_id = _text_ids(image, text, image_id, text_image_id)
    image, text = at_least_float32(image), at_least_float32(text)
    total = torch.zeros((), device=image.device)
    for logits in (_wrong_logits(image, wrong_text, scale, bias), _wrong_logits(text, wrong_image, scale, bias)):
        if logits is not None:
            total = total - F.logsigmoid(-logits).sum()

    def pairs(others: Tensor, other_id: Tensor, part: slice) -> Tensor:
        same = image_id[part, None] == other_id[None, :]  # [rows, T]
        return pairwise_sigmoid(similarity(image[part], others), same, scale=scale, bias=bias)

    for others, other_id in distributed.ring_exchange(text, text_id) if gather else [(text, text_id)]:
        total = total + _by_rows(partial(pairs, others, other_id), len(image), rows)
    return total / image.shape[0]


def pairwise_sigmoid(scores: Tensor, same: Tensor, *, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """`-log sigmoid(z (scale s + bias))`, summed over pairs, z = +1 where `same`, else -1: scores and `same` of equal shape -> a scalar."""
    sign = torch.where(same, 1.0, -1.0)
    return -F.logsigmoid(sign * (scale * at_least_float32(scores) + bias)).sum()


def _by_rows(block: Callable[[slice], Tensor], count: int, rows: int | None) -> Tensor:
    """Sum of `block` over slices of so many rows. What a slice needs for its gradient is computed again, not kept."""
    if rows is None or rows >= count:
        return block(slice(0, count))
    parts = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    return torch.stack([checkpoint(block, part, use_reentrant=False, preserve_rng_state=False) for part in parts]).sum()


def _cross_entropy(logits: Tensor, positive: Tensor, wrong: Tensor | None, smoothing: float) -> Tensor:
    """Summed over rows: cross-entropy of the uniform distribution over a row's positives; `wrong` are columns of no target."""
    columns = logits if wrong is None else torch.cat([logits, wrong], dim=1)
    target = torch.where(positive, logits, 0).sum(dim=1) / positive.sum(dim=1)
    if smoothing:
        target = (1 - smoothing) * target + smoothing * logits.mean(dim=1)
    return (columns.logsumexp(dim=1) - target).sum()


def _wrong_logits(row: Tensor, wrong: Wrong | None, scale: Tensor | float, bias: Tensor | float = 0.0) -> Tensor | None:
    """Logits [B, K] of each row with its own wrong items, minus infinity where there is none."""
    if wrong is None:
        return None
    if wrong.given.shape != wrong.embedding.shape[:2] or len(row) != len(wrong.given):
        raise ValueError(
            f"Got wrong items {tuple(wrong.embedding.shape)} with a mask {tuple(wrong.given.shape)} for "
            f"{len(row)} rows; expected [B, K, E] (or [B, K, N, E]) and [B, K] with one row each."
        )
    return (scale * row_similarity(row, wrong.embedding) + bias).masked_fill(~wrong.given, float("-inf"))


def _require_partner(positive: Tensor, start: int, row: str, column: str) -> None:
    alone = (~positive.any(dim=1)).nonzero()
    if len(alone):
        raise ValueError(
            f"The {row} at row {start + int(alone[0])} of the batch has no {column} with its image id, so there is "
            f"nothing to move it toward. Give every {row} at least one {column}, or check image_id and text_image_id."
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
