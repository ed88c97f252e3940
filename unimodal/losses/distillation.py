"""Distillation: an embedding learns to order candidates as a reranker does.

The objective of Qwen3-VL-Embedding's last stage (arXiv 2601.04720, 2026, section 3.3).
Legend: B queries, C candidates per query (its positive and its hard negatives).
"""

import torch
from torch import Tensor

from unimodal.layers import at_least_float32


def distillation_loss(
    logits: Tensor, teacher: Tensor, given: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """`-sum_c P_teacher(c) log P_student(c)`, the mean over queries; a scalar.

    | Inputs      | Shape                | Meaning                                                                  |
    |-------------|----------------------|--------------------------------------------------------------------------|
    | logits      | [B, C]               | the student's: scale times cosine                                        |
    | teacher     | [B, C]               | the reranker's logits; no gradient flows into them                       |
    | given       | [B, C], default all  | which candidates are there                                               |
    | temperature | number               | divides the teacher's logits: above 1 it tells more about the also-rans  |

    Both distributions are softmaxes over the candidates that are there. A query with a single candidate has nothing to
    order and adds 0.

    Raises ValueError on shapes that differ, and for a query without any candidate.
    """
    given = torch.ones_like(logits, dtype=torch.bool) if given is None else given
    if logits.dim() != 2 or logits.shape != teacher.shape or logits.shape != given.shape:
        raise ValueError(
            f"Got logits {tuple(logits.shape)}, teacher {tuple(teacher.shape)} and given {tuple(given.shape)}; "
            "expected [B, C] for all."
        )
    if len(empty := (~given.any(dim=1)).nonzero()):
        raise ValueError(f"Query {int(empty[0])} has no candidate to order; give each at least its positive.")
    lowest = torch.finfo(torch.float32).min  # not minus infinity, which times a probability of 0 is no number
    target = (at_least_float32(teacher.detach()) / temperature).masked_fill(~given, lowest).softmax(dim=1)
    student = at_least_float32(logits).masked_fill(~given, lowest).log_softmax(dim=1)
    return -(target * student).masked_fill(~given, 0).sum(dim=1).mean()
