"""Large batches on small memory: a batch is read chunk by chunk, and only what leaves the model is kept.

GradCache (Gao et al. 2021, arXiv 2101.06983): read every chunk without keeping its activations, take the loss on all
embeddings, then read each chunk once more, now for its gradient. That is activation checkpointing of a chunk, so torch's
own does it: the second reading happens inside `backward`, one chunk at a time, under the random state of the first, and
optimisation, gradient clipping, mixed precision and data parallelism go on as always.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Rows = (
    Tensor | dict[str, Tensor] | None
)  # of one input: a tensor [B, ...], or named ones (pictures of any size), or nothing


def at(rows: Rows, index: Any) -> Any:
    """Some rows of an input: `index` is a slice, or a mask over the first dimensions."""
    if isinstance(rows, dict):
        return {name: part[index] for name, part in rows.items()}
    return None if rows is None else rows[index]


def by_chunks(read: Callable[..., Any], *inputs: Rows, size: int | None) -> Any:
    """`read(*inputs)` over rows of the inputs, `size` at a time; the gradient is that of the same chunks kept in memory.

    Args:
        read: takes what `inputs` are, by rows, and returns a tensor of as many rows or a NamedTuple of such.
        inputs: tensors [B, ...], named ones, or None.
        size: rows at a time; None reads all at once and keeps their activations.
    """
    if size is None:
        return read(*inputs)
    first = next(x for x in inputs if x is not None)
    count = len(next(iter(first.values())) if isinstance(first, dict) else first)
    chunks = [
        checkpoint(read, *(at(x, slice(start, start + size)) for x in inputs), use_reentrant=False)
        for start in range(0, count, size)
    ]
    return (
        torch.cat(chunks) if isinstance(chunks[0], Tensor) else type(chunks[0])(*map(_join, zip(*chunks, strict=True)))
    )


def _join(parts: tuple[Any, ...]) -> Tensor | None:
    if parts[0] is None:
        return None
    if not isinstance(parts[0], Tensor):
        raise ValueError(
            f"mini_batch_size cannot join {type(parts[0]).__name__}, what a captioner in the bridge keeps of its pictures; "
            "train its captions in a stage without mini_batch_size"
        )
    return torch.cat(parts)


def refuse_coupled_rows(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse modules in which rows of a batch depend on each other, so that chunks would compute something else.

    Raises:
        ValueError: names the first batch normalisation that trains.
    """
    for name, module in modules:
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"mini_batch_size reads a batch in chunks, but {name} is a batch normalisation that trains: it would "
                "normalise each chunk by itself. Freeze its tower (trainable: {backbone.vision*: 0}), take a tower with "
                "layer normalisation, or leave mini_batch_size out"
            )
