"""Which images stand together in a batch, planned for a whole epoch from (seed, epoch) alone, so that any step can be resumed exactly.

`hard_batches` puts each image beside its mined neighbours, so that every in-batch loss meets hard negatives without reading one more image
(the batch construction of ELIP, arXiv 2502.15682).
"""

import torch
from torch import Tensor


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def random_batches(count: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Random batches [steps, batch_size] of distinct image indices; the incomplete last batch is left out of this epoch.

    Raises:
        ValueError: when there are fewer images than a batch holds.
    """
    if count < batch_size:
        raise ValueError(
            f"{count} images cannot fill a batch of {batch_size}; lower data.batch_size or give more images"
        )
    order = torch.randperm(count, generator=_generator(seed, epoch))
    steps = count // batch_size
    return order[: steps * batch_size].view(steps, batch_size)


def hard_batches(neighbours: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Batches [steps, batch_size] grown from random seeds by mined `neighbours` [count, k] (indices, nearest first).

    Every image appears at most once. A batch takes a random unused image, then its unused neighbours, then the next random image.
    """
    count = len(neighbours)
    if count < batch_size:
        raise ValueError(
            f"{count} images cannot fill a batch of {batch_size}; lower data.batch_size or give more images"
        )
    order = torch.randperm(count, generator=_generator(seed, epoch)).tolist()
    near = neighbours.tolist()
    used = [False] * count
    sequence: list[int] = []
    for start in order:
        for index in (start, *near[start]):
            if not used[index]:
                used[index] = True
                sequence.append(index)
    steps = count // batch_size
    batches = torch.tensor(sequence[: steps * batch_size]).view(steps, batch_size)
    return batches[torch.randperm(steps, generator=_generator(seed + 1, epoch))]
