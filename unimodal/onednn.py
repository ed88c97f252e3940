"""Inference whose float32 linear layers run through oneDNN on a CPU.

torch hands float32 matrix products on a CPU to MKL, whose AVX-512 kernels serve the processors of its own maker alone, and convolutions to
oneDNN, whose kernels serve all. A linear layer is a convolution of size 1, in float32 the same to rounding; on an AMD EPYC with AVX-512 it
takes half the time. Training stays with torch: the backward pass of such a convolution is slower where there are few rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 64  # below, a convolution costs more to set up than it gains


@contextmanager
def inference() -> Iterator[None]:
    """`torch.inference_mode`, with linear layers as above. Also a decorator."""
    with torch.inference_mode(), _Linear():
        yield


class _Linear(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _suits(*args):
            return _as_convolution(*args)
        return func(*args, **(kwargs or {}))


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        all(type(value) in (Tensor, torch.nn.Parameter) and value.dtype == torch.float32 for value in (x, weight))
        and x.device.type == weight.device.type == "cpu"
        and weight.ndim == 2
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I] -> [..., O]. Rows lie in memory as the places of a picture whose channels come last."""
    picture = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, I, rows, 1]
    out = F.conv2d(picture, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
