"""Building the model of a configuration that comes from anyone: held against the weights beside it before anything is allocated.

Its numbers are bounded first. Then the model is built on torch's `meta` device, where tensors have shapes and no memory, and is
compared with the headers of the files. Only a model that fits them is built in memory, without the random numbers that the files replace.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from unimodal.config import ModelConfig, require_finite
from unimodal.hub.weights import CheckpointError
from unimodal.model import UnimodalModel

LARGEST_PICTURE = 2048  # side in pixels
LARGEST_NUMBER = 1 << 24  # of what has a size; the largest vocabularies have 2**18 entries
MOST_ENTRIES = 100_000  # of all lists and mappings of a configuration together
FEWEST_LAYERS = 1024  # that any configuration may name, whatever is in the files
LAYERS = re.compile(r"(layer|depth|block|stage|repeat)s?$|^n_layer|^num_.*(layers|blocks)")
UNBOUNDED = re.compile(r"theta|base|seed|_id$|_ids$")  # numbers that nothing has as its size


def require_bounded(values: Mapping[str, Any], where: str, tensors: int) -> None:
    """Refuse a configuration, as plain JSON values, that no model of so many tensors can have.

    Raises:
        ValueError: it has more layers than tensors, a number beyond all sizes, one that is not finite, or too many entries.
    """
    require_finite(dict(values), where)
    entries = 0
    waiting: list[tuple[str, str, Any]] = [(where, "", values)]
    while waiting:
        place, key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{place}.{name}", str(name), part) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{i}]", key, part) for i, part in enumerate(value)]
        elif isinstance(value, bool) and LAYERS.search(key) and "num" in key:
            raise ValueError(f"{place}: expected a number of layers, got {value}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _require_size(place, key, value, tensors)
        entries += 1
        if entries + len(waiting) > MOST_ENTRIES:
            raise ValueError(f"{where} has more than {MOST_ENTRIES} entries, no configuration of a model has as many")


def _require_size(place: str, key: str, value: float, tensors: int) -> None:
    least = 0
    if LAYERS.search(key):
        limit, why = max(tensors, FEWEST_LAYERS), f"the weights beside it have {tensors} tensors"
    elif key in ("image_size", "size"):
        limit, why = LARGEST_PICTURE, "pictures of models are no larger"
    elif UNBOUNDED.search(key):
        return
    else:
        limit, why = LARGEST_NUMBER, "no model has anything of that size"
        least = -limit
    if not least <= value <= limit:
        raise ValueError(f"{place}: expected {least} to {limit}, since {why}, got {value}")


RANDOM = {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_}
RANDOM |= {getattr(nn.init, f"{name}_{kind}_") for name in ("kaiming", "xavier") for kind in ("normal", "uniform")}
# What leaves shapes as they are, and takes long to say so on the `meta` device.
SAME_SHAPE = {F.batch_norm, F.layer_norm, F.relu6, F.hardtanh, F.silu, F.gelu, nn.init.zeros_, nn.init.ones_}


class _Without(TorchFunctionMode):
    """Leaves out these functions of tensors: what they would return is their first argument."""

    def __init__(self, functions: Set[Any]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self.functions:
            first = args[0] if args else next(iter((kwargs or {}).values()))
            # `nn.init.trunc_normal_` draws until every number lies within its bounds, which what lay in memory may never do.
            return first.zero_() if func is Tensor.normal_ else first
        return func(*args, **(kwargs or {}))


@contextmanager
def few_parts(tensors: int) -> Iterator[None]:
    """A block in which this thread builds a model of about so many tensors, and is stopped when it becomes one of many more.

    What is built may be larger than what is kept: some networks are cut to their first blocks.
    """
    left, thread = 20 * tensors + 20_000, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise ValueError(
                    f"it has many times the parts of a model of {tensors} tensors, as the weights beside it have"
                )

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def build(config: ModelConfig, folder: Path, tensors: int, *, pretrained: bool = False) -> UnimodalModel:
    """The model of a configuration; without `pretrained` its weights are not even random.

    Raises:
        CheckpointError: it describes none.
        OSError: a source of its towers cannot be read.
    """
    try:
        with few_parts(tensors):
            if pretrained:
                return UnimodalModel(config, pretrained=True)
            with _Without(RANDOM):
                return UnimodalModel(config)
    except OSError:
        raise
    except Exception as error:  # numbers of anyone reach constructors of timm, transformers and diffusers
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model that cannot be built: {error or type(error).__name__}"
        ) from error


def sketch(config: ModelConfig, folder: Path, tensors: int) -> UnimodalModel | None:
    """The model of a configuration on the `meta` device; None where a part of it cannot be built there.

    Raises:
        CheckpointError: as `build`.
    """
    try:
        with torch.device("meta"), _Without(SAME_SHAPE):
            return build(config, folder, tensors)
    except CheckpointError as error:
        if isinstance(error.__cause__, NotImplementedError) or "meta" in str(error.__cause__):
            return None
        raise
