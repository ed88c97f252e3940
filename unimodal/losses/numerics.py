"""How every loss computes and averages: in float32 at least, over what is real, over all ranks."""

import torch
from torch import Tensor

from unimodal.distributed import sum_over_ranks, world_size


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over_real(total: Tensor, mask: Tensor) -> Tensor:
    """`total`, summed over the True entries of `mask` on this rank, divided by their mean number per rank.

    Ranks hold different numbers of real tokens. Dividing by the local number would give a token of a rank with short
    texts more weight than others; dividing by the mean number makes the average over ranks the mean over all tokens.
    Raises ValueError if no rank has a real entry.
    """
    real = sum_over_ranks(mask.sum())
    if real == 0:
        raise ValueError(
            f"The mask of shape {tuple(mask.shape)} has no real entry to average over; expected at least one True."
        )
    return total * world_size() / real
