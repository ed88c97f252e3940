"""How every loss averages: over what is real, over all ranks."""

from torch import Tensor

from unimodal.distributed import sum_over_ranks, world_size


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
