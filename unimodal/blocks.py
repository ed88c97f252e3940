"""The repeated blocks of a model, and what is done to one at a time: recomputed in the backward, compiled, sharded (`unimodal.sharding`).

A block is a member of a list of alike modules: a layer of the bridge, of a transformers or timm tower, of a head's decoder.
Nothing here adds a module, so that parameters keep their names.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from unimodal.layers import KeyValues


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks that have parameters: members of a `ModuleList`, or of a `Sequential` of several, all of one class."""
    for child in model.children():
        alike = len({type(member) for member in child.children()}) == 1
        several = isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and len(child) > 1)
        if alike and several and not isinstance(child[0], nn.ModuleList):  # type: ignore[index]
            yield from (block for block in child.children() if next(block.parameters(), None) is not None)
        else:
            yield from blocks(child)


def recompute(model: nn.Module) -> None:
    """Keep nothing of a block but its inputs, and run it once more in the backward (Chen et al. 2016, arXiv 1604.06174).

    The second run repeats the first: with its random state, its attention kernels and caches as they were, and no running
    statistic moves twice.
    """
    for block in blocks(model):
        _replace_forward(block, _recomputed(block))


def compile_blocks(model: nn.Module) -> None:
    """Let `torch.compile` fuse the training pass of every block; without gradient a block runs as it is."""
    for block in blocks(model):
        _replace_forward(block, torch.compile(block.forward))


def _replace_forward(block: nn.Module, learning: Callable[..., Any]) -> None:
    """`learning` in place of the forward of `block`, where there is a gradient to take."""
    plain = block.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (learning if torch.is_grad_enabled() else plain)(*args, **kwargs)

    block.forward = forward


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]

    def run(*args: Any, **kwargs: Any) -> Any:
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, KeyValues)]
        before, kernels = [list(cache.layers) for cache in caches], _attention_kernels()

        @contextmanager
        def as_it_was() -> Iterator[None]:
            after, counted = (
                [cache.layers for cache in caches],
                [(norm.momentum, norm.num_batches_tracked) for norm in norms],
            )
            for cache, layers in zip(caches, before):
                cache.layers = list(layers)
            for norm in norms:
                norm.momentum, norm.num_batches_tracked = 0.0, None
            try:
                with sdpa_kernel(kernels):
                    yield
            finally:
                for cache, layers in zip(caches, after):
                    cache.layers = layers
                for norm, values in zip(norms, counted):
                    norm.momentum, norm.num_batches_tracked = values

        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), as_it_was()), **kwargs
        )

    return run


def _attention_kernels() -> list[SDPBackend]:
    """Those that torch may choose from here."""
    enabled = {
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, yes in enabled.items() if yes]
