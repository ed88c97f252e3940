"""Quantisation-aware training: every loss is also taken on embeddings as an index would store them, in int8 and in one bit.

Learned step size: Esser et al. 2020 (LSQ, arXiv 1902.08153). Straight-through rounding: Bengio et al. 2013
(arXiv 1308.3432). Both for embeddings: the report of Qwen3-VL-Embedding (arXiv 2601.04720, 2026).
Legend: E embedding dim, Q largest code.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.layers import at_least_float32

LEVELS = 127  # Q of a symmetric int8 code


def lsq(x: Tensor, step: Tensor, levels: int = LEVELS) -> Tensor:
    """`clip(round(x / step), -Q, Q) * step`, with the gradients of LSQ; the shape of x [..., E].

    | Inputs | Shape    | Meaning                               |
    |--------|----------|---------------------------------------|
    | x      | [..., E] | what is stored                        |
    | step   | scalar   | learned; its sign does not matter     |
    | levels | number   | Q, codes run from -Q to Q             |

    x receives the gradient where it is not clipped. The step receives `round(x / step) - x / step` where x is not
    clipped, else -Q or Q, all times `1 / sqrt(E Q)`, which keeps its updates in proportion to those of the weights.
    """
    x, step = at_least_float32(x), step.abs()
    gradient_scale = 1 / math.sqrt(x.shape[-1] * levels)
    step = step * gradient_scale + (step - step * gradient_scale).detach()  # the value of step, a share of its gradient
    code = (x / step).clamp(-levels, levels)
    return (code + (code.round() - code).detach()) * step


def one_bit(x: Tensor) -> Tensor:
    """1 where x is positive, else -1; the gradient passes as if nothing had happened (straight-through)."""
    return x + (torch.where(x > 0, 1.0, -1.0) - x).detach()


def quantised(loss_fn: Callable[..., Tensor], *embeddings: Tensor, step: Tensor) -> Tensor:
    """Mean of `loss_fn` over embeddings as they are, in int8 and in one bit, each back at unit norm; a scalar.

    | Inputs     | Shape    | Meaning                                                               |
    |------------|----------|-----------------------------------------------------------------------|
    | loss_fn    | function | takes the embeddings in the given order; bind the rest with `partial` |
    | embeddings | [..., E] | unit vectors                                                          |
    | step       | scalar   | LSQ's, in units of the root mean square coordinate, 1 / sqrt(E)       |

    In these units one step fits every prefix width: `matryoshka(partial(quantised, loss_fn, step=step), image, text,
    dims=[...])` takes every loss on every prefix in every precision.
    """
    total = loss_fn(*embeddings)
    for quantise in (lambda x: lsq(x, step), one_bit):
        total = total + loss_fn(*(F.normalize(quantise(x * math.sqrt(x.shape[-1])), dim=-1) for x in embeddings))
    return total / 3
