"""Contrast against a slow teacher's features and a queue of earlier ones, with soft targets: Li et al. 2021 (ALBEF, arXiv 2107.07651); the
queue, He et al. 2019 (MoCo, arXiv 1911.05722).

Legend: B local pairs, Q queued features of each side, E embedding width. Across ranks: see `unimodal.distributed`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal import distributed
from unimodal.layers import at_least_float32


def momentum_contrast(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    queue_image: Tensor,
    queue_text: Tensor,
    image_id: Tensor,
    queue_id: Tensor,
    *,
    temperature: Tensor | float,
    alpha: float,
    gather: bool = True,
) -> Tensor:
    """Each image finds its texts among the teacher's batch and the queue, each text its images; the mean of both directions, a scalar.

    | Inputs                      | Shape  | Meaning                                                                     |
    |-----------------------------|--------|-----------------------------------------------------------------------------|
    | image, text                 | [B, E] | unit vectors of the student                                                 |
    | teacher_image, teacher_text | [B, E] | of the teacher, without gradient                                            |
    | queue_image, queue_text     | [Q, E] | earlier ones of the teacher                                                 |
    | image_id, queue_id          | [B], [Q] | which image a row shows; targets are uniform over equal ids               |
    | temperature                 | scalar | divides the cosine                                                          |
    | alpha                       | number | share of the teacher's own distribution in the targets                      |
    | gather                      | bool   | the batches of all ranks, with gradient of the student's; else the local one |

    The queue is the same on all ranks. With alpha 0 and an empty queue, and the student as its own teacher, it is symmetric InfoNCE.
    Raises ValueError on shapes that do not fit.
    """
    if not len(image) == len(text) == len(teacher_image) == len(teacher_text) == len(image_id):
        raise ValueError(
            f"Got {len(image)} images, {len(text)} texts, {len(teacher_image)} and {len(teacher_text)} of the teacher and "
            f"{len(image_id)} ids; expected one of each for every pair."
        )
    if not len(queue_image) == len(queue_text) == len(queue_id):
        raise ValueError(
            f"Got queues of {len(queue_image)} images, {len(queue_text)} texts and {len(queue_id)} ids; expected equal lengths."
        )
    if gather:
        image, text = distributed.gather_with_grad(image), distributed.gather_with_grad(text)
        teacher_image, teacher_text, image_id = map(distributed.gather, (teacher_image, teacher_text, image_id))
    positive = image_id[:, None] == torch.cat([image_id, queue_id])[None]  # [R * B, R * B + Q]
    hard = positive / positive.sum(1, keepdim=True)

    def direction(student: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
        others = at_least_float32(others)
        with torch.no_grad():
            soft = (at_least_float32(teacher) @ others.T / temperature).softmax(1)
            target = alpha * soft + (1 - alpha) * hard
        logits = at_least_float32(student) @ others.T / temperature
        return -(target * F.log_softmax(logits, 1)).sum(1).mean()

    to_text = direction(image, teacher_image, torch.cat([teacher_text, queue_text]))
    to_image = direction(text, teacher_text, torch.cat([teacher_image, queue_image]))
    return (to_text + to_image) / 2
