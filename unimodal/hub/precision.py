"""Weights kept in fewer bits: matrices and kernels as float16, or as int8 with a scale for each row; vectors stay float32.

They come back as float32, so a model computes as it always does, with rounded weights. What int8 loses is at most half a step of a 127th of
the largest value in a row (symmetric, per output channel; Jacob et al. 2018, arXiv 1712.05877).
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["float32", "half", "int8"]
SCALE = ".int8_scale"  # after the name of an int8 tensor, the name of its scales


def shrink(weights: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """What a file holds of these weights; int8 tensors have their scales [rows] beside them.

    Raises:
        ValueError: for another precision, or a weight that half precision cannot hold.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}")
    out: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if precision == "float32" or weight.ndim < 2 or not weight.is_floating_point():
            out[name] = weight
        elif precision == "half":
            out[name] = weight.half()
            if not out[name].isfinite().all():
                raise ValueError(f"{name}: values up to {weight.abs().max():.3g} are beyond half precision; take int8")
        else:
            scale = weight.float().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            out[name] = torch.round(weight.float() / _beside(scale, weight)).to(torch.int8)
            out[name + SCALE] = scale
    return out


def restore(value: Tensor, scale: Tensor | None) -> Tensor:
    """A tensor from a file, with its scales where it is int8 -> floating point."""
    return value if scale is None else value.float() * _beside(scale, value)


def rounded(weights: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The weights as they come back from a file in this precision."""
    stored = shrink(weights, precision)
    return {name: restore(stored[name], stored.get(name + SCALE)).to(weight.dtype) for name, weight in weights.items()}


def _beside(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))
