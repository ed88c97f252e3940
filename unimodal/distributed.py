"""What losses need from other ranks: rows of the global batch, with gradient.

The only file that touches torch.distributed. One convention, shared by every loss of `unimodal`: **averaged over ranks,
a loss has the value and the gradient that one process would compute on the global batch** (the local batches one after
another, in rank order). Averaging gradients is what DistributedDataParallel does, so nothing is to be rescaled, neither
here nor in the training loop. It follows that

- every rank brings the same number of rows (a mean of means is the mean only then), which exchanges check;
- the backward of an exchange *sums* what all ranks want from a row: each of R ranks differentiates its own loss, the
  sum is R times the gradient of their mean, and DDP divides by R.

Without a process group every function is the identity (or the local value), so a loss is written once.

Gather with gradient: Radford et al. 2021 (CLIP). Ring exchange: Zhai et al. 2023 (SigLIP, arXiv 2303.15343).
Legend: B local batch, R ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [B, ...] -> [R * B, ...], without gradient.

    Raises ValueError on every rank, naming the shapes, if ranks bring different ones.
    """
    if world_size() == 1:
        return x.detach()
    _require_equal(_of_all_ranks(tuple(x.shape)))
    return _rows_of_all(x)


def gather_with_grad(x: Tensor) -> Tensor:
    """Like `gather`; the gradient of a row, summed over the ranks that used it, flows back to the rank that owns it."""
    if world_size() == 1:
        return x
    _require_equal(_of_all_ranks(tuple(x.shape)))
    return _Gather.apply(x)


def gather_padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Like `gather_with_grad`, of tensors that may be longer on some ranks: dimensions after the first are filled up with zeros (False in a
    mask) to the longest of all ranks, [B, L, ...] -> [R * B, longest L, ...]."""
    if world_size() == 1:
        return tensors
    out = []
    for x, shapes in zip(tensors, zip(*_of_all_ranks([tuple(x.shape) for x in tensors]))):
        _require_equal([shape[:1] for shape in shapes])
        missing = [most - size for size, most in zip(x.shape, _longest(shapes))]
        x = F.pad(x, [side for size in reversed(missing[1:]) for side in (0, size)])
        out.append(_Gather.apply(x) if x.is_floating_point() else _rows_of_all(x))
    return tuple(out)


def local_rows(x: Tensor) -> Tensor:
    """The rows of a gathered tensor that this rank brought, [R * B, ...] -> [B, ...]: undoes `gather`."""
    rows = x.shape[0] // world_size()
    return x[rank() * rows : (rank() + 1) * rows]


@torch.no_grad()
def shared(x: Tensor) -> Tensor:
    """The first rank's `x`, on every rank: what is drawn at random for the global batch must be drawn once."""
    if world_size() > 1:
        dist.broadcast(x := x.contiguous(), src=0)
    return x


def random_rows(shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers of this shape [B, ...] for the rows of this rank, cut out of one draw for the global batch: a row gets the numbers
    that it gets in one process. Ranks may bring different lengths after the first dimension."""
    if world_size() == 1:
        return torch.rand(*shape, device=device)
    rows, *longest = _longest(_of_all_ranks(tuple(shape)))
    drawn = shared(torch.rand(world_size() * rows, *longest, device=device))
    return local_rows(drawn)[tuple(slice(size) for size in shape)]


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """Element-wise sum over ranks, without gradient: how many real tokens does the global batch hold?"""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def ring_exchange(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors of this rank, then those of every other rank, one rank at a time, passed on around a ring.

    Holds one block at a time where a gather holds all of them. Gradients travel back around the ring to their owner.
    All ranks must consume the iterator to its end. Raises ValueError, naming the shapes, if ranks bring different ones.
    """
    if world_size() > 1:
        for shapes in zip(*_of_all_ranks([tuple(x.shape) for x in tensors])):
            _require_equal(shapes)
    yield tensors
    for _ in range(world_size() - 1):
        tensors = tuple(_RingStep.apply(x) for x in tensors)
        yield tensors


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _rows_of_all(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        own = torch.empty_like(local_rows(grad), memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


class _RingStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _pass_on(x, step=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _pass_on(grad, step=-1)


def _rows_of_all(x: Tensor) -> Tensor:
    """Rows of all ranks, which bring equal shapes, [B, ...] -> [R * B, ...]."""
    rows = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.contiguous())
    return rows


def _pass_on(x: Tensor, step: int) -> Tensor:
    """Send x to the rank `step` ahead and return what the rank `step` behind sent."""
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    ahead, behind = (rank() + step) % world_size(), (rank() - step) % world_size()
    send, receive = dist.P2POp(dist.isend, x.contiguous(), ahead), dist.P2POp(dist.irecv, received, behind)
    for request in dist.batch_isend_irecv([send, receive]):
        request.wait()
    return received


def _of_all_ranks(given: Any) -> list[Any]:
    """What the ranks bring, in rank order."""
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, given)
    return out


def _longest(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Of each dimension the most that a rank brings."""
    return tuple(map(max, zip(*shapes, strict=True)))


def _require_equal(shapes: Sequence[Any]) -> None:
    """Unequal shapes would hang some backends and mix up rows on others, so ranks compare them first."""
    for other, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"Rank 0 brought shape {shapes[0]}, rank {other} brought {shape}; every rank must bring the same "
                "shape. Drop the last uneven batch (drop_last=True); if only lengths differ, pad all to one length first."
            )
