"""Matryoshka: train prefixes of an embedding, so that it can be cut to any of `dims` after training.

Kusupati et al. 2022 (arXiv 2205.13147). Legend: E embedding dim.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def matryoshka(
    loss_fn: Callable[..., Tensor], *embeddings: Tensor, dims: Sequence[int], weights: Sequence[float] | None = None
) -> Tensor:
    """Weighted mean of `loss_fn` over prefixes of all embeddings, each prefix brought back to unit norm; a scalar.

    | Inputs     | Shape              | Meaning                                                                |
    |------------|--------------------|------------------------------------------------------------------------|
    | loss_fn    | function           | takes the embeddings in the given order; bind the rest with `partial`  |
    | embeddings | [..., E]           | unit vectors of one width E                                            |
    | dims       | numbers in 1 ... E | prefix lengths; include E to train the full vector                     |
    | weights    | one per dim        | relative importance, default equal; only their ratios count            |

    At `dims=[E]` this is `loss_fn(*embeddings)`. The mean, rather than the sum, keeps the size of the loss, and with it
    the learning rate, independent of how many prefixes are trained.

        matryoshka(partial(info_nce, image_id=ids, scale=scale), image, text, dims=[64, 128, 256])

    Raises ValueError on embeddings of unlike width, dims outside 1 ... E, or weights that do not fit dims.
    """
    widths = {x.shape[-1] for x in embeddings}
    if len(widths) != 1:
        raise ValueError(
            f"Got embeddings of shapes {[tuple(x.shape) for x in embeddings]}; expected one common last dimension."
        )
    width = widths.pop()
    if not dims or min(dims) < 1 or max(dims) > width:
        raise ValueError(
            f"Got dims {list(dims)} for embeddings of width {width}; expected at least one, each from 1 to {width}."
        )
    weights = [1.0] * len(dims) if weights is None else weights
    if len(weights) != len(dims) or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(
            f"Got weights {list(weights)} for dims {list(dims)}; expected one per dim, none negative, not all zero."
        )

    total = torch.zeros((), device=embeddings[0].device)
    for dim, weight in zip(dims, weights):
        total = total + weight * loss_fn(*(F.normalize(x[..., :dim], dim=-1) for x in embeddings))
    return total / sum(weights)
