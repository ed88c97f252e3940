"""A device that is only pretended: tensors compute on the CPU and say that they are elsewhere. An operation that mixes two devices
fails, as it would on a GPU. Unlike `FakeTensorMode` it has values, so that steps run whose shapes depend on them.

The pretended device is called `meta`, a name that torch takes without any driver.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
# What torch lets mix devices: lengths and copies, and indices on the CPU of what is elsewhere.
MIXING = ("_pack_padded_sequence", "_pad_packed_sequence", "copy_", "_to_copy")
# What takes a number on the CPU, a tensor without dimensions, beside tensors elsewhere, apart from what works point by point.
TAKING_NUMBERS = (
    "masked_fill",
    "masked_fill_",
    "index_fill",
    "index_fill_",
    "fill_",
    "where",
    "index_put",
    "index_put_",
    "_index_put_impl_",
)
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Elsewhere(Tensor):
    """A tensor of the pretended device; `value` is where it computes."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "Elsewhere":
        out = Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), dtype=value.dtype, device=ELSEWHERE, requires_grad=False
        )
        out.value = value
        return out

    def new_tensor(self, data: Any, **given: Any) -> Tensor:  # type: ignore[override]
        return Elsewhere(self.value.new_tensor(data, **given))

    def tolist(self) -> Any:
        return self.value.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """The operation, on the values; its result is elsewhere where its inputs are, or where it is told to be.

    Raises:
        RuntimeError: it mixes devices.
    """
    name = function.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    numbers = torch.Tag.pointwise in function.tags or name in TAKING_NUMBERS
    here = [x for x in tensors if not isinstance(x, Elsewhere) and (x.ndim > 0 or not numbers)]
    first_is_away = bool(tensors) and isinstance(tensors[0], Elsewhere)
    if function._schema.is_mutable and not first_is_away:  # nothing elsewhere changes a tensor on the CPU
        here += tensors[:1]
    allowed = name in MIXING or (
        name in INDEXED and first_is_away and all(x.dtype in (torch.long, torch.bool) for x in here)
    )
    if away and here and not allowed:
        raise RuntimeError(
            f"{name} mixes devices: {[tuple(x.shape) for x in here]} are on the CPU, {len(away)} tensors are not"
        )
    told = kwargs.get("device")
    if isinstance(kwargs.get("generator"), torch.Generator) and (
        told is not None and torch.device(told) == ELSEWHERE or away
    ):
        raise RuntimeError(f"{name} mixes devices: it draws elsewhere from a generator on the CPU")
    kwargs = {**kwargs, **({} if told is None else {"device": "cpu"})}
    real_args, real_kwargs = tree_map(lambda x: x.value if isinstance(x, Elsewhere) else x, (args, kwargs))
    result = function(*real_args, **real_kwargs)
    if function._schema.is_mutable:  # it says itself which tensor it returns
        pairs = {id(x.value): x for x in away}
        return tree_map(lambda x: pairs.get(id(x), x), result)
    if name == "_pack_padded_sequence":  # the lengths of a packed sequence are always on the CPU
        return Elsewhere(result[0]) if away else result[0], result[1]
    elsewhere = bool(away) if told is None else torch.device(told) == ELSEWHERE
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) and elsewhere else x, result)


class _Factories(TorchDispatchMode):
    """Operations without a tensor of the device among their inputs come this way."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


@contextmanager
def elsewhere(*modules: nn.Module) -> Iterator[None]:
    """A block in which these modules are on the pretended device."""
    for module in modules:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(Elsewhere(parameter.data), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = Elsewhere(buffer)
    autocast, tensor = (
        torch.autocast,
        torch.tensor,
    )  # one does not know the device, the other makes tensors without a dispatch

    def made(data: Any, *, device: Any = None, **given: Any) -> Tensor:
        value = tensor(data, **given)
        return Elsewhere(value) if device is not None and torch.device(device) == ELSEWHERE else value

    def cast(kind: str, **given: Any) -> Any:
        return autocast("cpu" if kind == ELSEWHERE.type else kind, **given)

    def inference(mode: bool) -> Any:  # its tensors take no wrapper; without gradients they compute the same
        return torch.set_grad_enabled(not mode)

    patches = (torch, "autocast", cast), (torch, "tensor", made), (torch._C, "_InferenceMode", inference)
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        stack.enter_context(_Factories())
        yield


def moved(parts: Sequence[Any]) -> Any:
    """The same structure with its tensors on the pretended device."""
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, parts)
