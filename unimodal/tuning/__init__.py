"""Parameter-efficient tuning: named adapters on the modules of a model, of which some are in use.

peft makes those that replace a layer by one that adds to it (LoRA, DoRA, IA3, tuning of norms). Its prompt learning needs one of the
tasks of transformers, and bottlenecks it does not have: those are in `unimodal.tuning.modules`.

Names: peft moves a layer's own weights to `<layer>.base_layer.*` (`base_name` undoes it); the parameters of the adapter NAME are
`<layer>.lora_A.NAME.*`, `<layer>.ia3_l.NAME`, `<layer>.adapted_prompt.adapters.NAME` and so on. A stage's patterns call all of them
`adapters.NAME`.
"""

import fnmatch
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unimodal.config import AdapterConfig, nearest
from unimodal.tuning.modules import Addition, Bottlenecks, PrefixTokens, PromptTokens, is_attention, plain

ADDITIONS: dict[str, type[Addition]] = {
    "bottleneck": Bottlenecks,
    "prompt": PromptTokens,
    "prefix": PrefixTokens,
}
WRAPPER = ".base_layer."
BESIDE = "adapted"  # an addition's name in the module that it sits beside
PLACE = re.compile(rf"\.(?:lora_\w+|ia3_l|ln_tuning_layers|{BESIDE}_\w+\.adapters)\.(\w+)(?:\.|$)")


def base_name(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.replace(WRAPPER, ".")


def adapter_of(name: str) -> str | None:
    """The adapter that a parameter is of; None for the model's own."""
    found = PLACE.search(name)
    return found[1] if found else None


def renamed(name: str, adapters: dict[str, str]) -> str:
    """The name of a parameter when adapters are called otherwise: `adapters` gives their new names."""
    found = PLACE.search(name)
    if found is None or found[1] not in adapters:
        return name
    return name[: found.start(1)] + adapters[found[1]] + name[found.end(1) :]


def tuned(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of everything that holds adapters, whether peft's or ours."""
    for name, module in model.named_modules():
        if isinstance(module, Addition) or hasattr(module, "adapter_layer_names"):
            yield name, module


def names_in(module: Any) -> set[str]:
    """The adapters that a module of `tuned` holds."""
    if isinstance(module, Addition):
        return set(module.adapters)
    return {name for attribute in module.adapter_layer_names for name in getattr(module, attribute)}


def in_use(model: nn.Module) -> set[str]:
    """The adapters that are."""
    return {
        name
        for _, module in tuned(model)
        for name in (module.names if isinstance(module, Addition) else module.active_adapters)
    }


def add_adapter(model: nn.Module, name: str, config: AdapterConfig) -> None:
    """Add an adapter to the modules that it targets; which parameters require a gradient stays as it was, the new ones do.

    Raises:
        ValueError: for a name that cannot be one or is taken, a pattern that matches no module of the kind's, or a module that has adapters
            of another kind already.
    """
    _require_free_name(model, name)
    targets = _targets(model, config)
    with _keeping_gradients(model):
        if config.kind in ADDITIONS:
            _add_beside(model, name, config, targets)
        else:
            _inject(model, name, config, targets)


def use_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Use these adapters and no others. Nothing happens where that is so already."""
    for _, module in tuned(model):
        wanted = [name for name in names if name in names_in(module)]
        if isinstance(module, Addition):
            module.names = tuple(wanted)
        elif list(module.active_adapters) != wanted:
            with _keeping_gradients(module):
                module.set_adapter(wanted)


def remove_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Forget adapters; what peft wrapped around a layer stays, and adds nothing."""
    for _, module in tuned(model):
        for name in names_in(module) & set(names):
            if isinstance(module, Addition):
                del module.adapters[name]
            else:
                with _keeping_gradients(module):
                    module.delete_adapter(name)


def merge_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Fold adapters into the weights around them, and forget all others: the model computes the same without any.

    Raises:
        ValueError: for kinds that no weight can take up.
    """
    found = list(tuned(model))
    for place, module in found:
        if isinstance(module, Addition) and (kept := names_in(module) & set(names)):
            raise ValueError(
                f"{place}: {', '.join(sorted(kept))} cannot be merged; lora, dora, ia3 and layer_norm can. Keep it as it is"
            )
    for place, module in found:
        parent, _, last = place.rpartition(".")
        if isinstance(module, Addition):
            module.detach()
            delattr(model.get_submodule(parent), last)
        else:
            if chosen := [name for name in names if name in names_in(module)]:
                module.merge(safe_merge=True, adapter_names=chosen)
            setattr(model.get_submodule(parent), last, module.get_base_layer())


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Hash of weights by name, shape and content, whatever adapters are around them: 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted((base_name(name), value) for name, value in tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_free_name(model: nn.Module, name: str) -> None:
    parts = {part for parameter, _ in model.named_parameters() for part in parameter.split(".")}
    if not name.isidentifier() or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"adapter {name!r}: expected a name of letters, digits and _, and none of Python's dict methods"
        )
    if name in parts:
        raise ValueError(
            f"adapter {name!r}: the model has a part of that name, so patterns could not tell them apart; choose another"
        )


def _targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that a configuration tunes, by name, without what peft wrapped around them."""
    modules = dict(model.named_modules())
    inner = tuple(f"{name}." for name, _ in tuned(model))
    modules = {name: module for name, module in modules.items() if name and not name.startswith(inner)}
    chosen: dict[str, nn.Module] = {}
    for pattern in config.target:
        matched = {name: plain(module) for name, module in modules.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            tops = {".".join(name.split(".")[:2]) for name in modules}
            raise ValueError(f"adapter target {pattern!r} matches no module; {nearest(pattern, tops)}")
        fitting = {name: module for name, module in matched.items() if _fits(config.kind, name, module, modules)}
        if not fitting:
            raise ValueError(
                f"adapter target {pattern!r} matches {len(matched)} modules, for example {next(iter(matched))}, but none that "
                f"{config.kind} tunes: it takes {TAKES[config.kind]}"
            )
        chosen |= fitting
    return chosen


TAKES = {
    **dict.fromkeys(("lora", "dora", "ia3"), "linear layers and convolutions without groups"),
    "layer_norm": "layer and RMS normalisations",
    "bottleneck": "linear layers",
    "prompt": "transformer blocks of the backbone",
    "prefix": "attention layers of the backbone with linear layers for keys and values",
}


def _fits(kind: str, name: str, module: Any, modules: dict[str, nn.Module]) -> bool:
    if kind == "layer_norm":
        return isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
    if kind == "prefix":
        return name.startswith("backbone.") and is_attention(module)
    if kind == "prompt":
        return name.startswith("backbone.") and _is_block(name, module)
    # torch's own attention takes the weights of its last layer itself: what is wrapped around that would never run.
    within = modules.get(name.rpartition(".")[0])
    convolution = kind != "bottleneck" and isinstance(module, nn.Conv2d) and module.groups == 1
    return (isinstance(module, nn.Linear) or convolution) and not isinstance(within, nn.MultiheadAttention)


def _is_block(name: str, module: nn.Module) -> bool:
    """A numbered module with an attention layer in it, and no such module in it."""
    inside = [part for part, inner in module.named_modules() if part and is_attention(inner)]
    return name.rpartition(".")[2].isdigit() and len(inside) == 1


def _add_beside(model: nn.Module, name: str, config: AdapterConfig, targets: dict[str, nn.Module]) -> None:
    for place, module in targets.items():
        _refuse_other_kind(place, model.get_submodule(place), None)
        attribute = f"{BESIDE}_{config.kind}"
        if not hasattr(module, attribute):
            module.add_module(attribute, ADDITIONS[config.kind](module))  # type: ignore[call-arg]
        addition: Any = getattr(module, attribute)
        if config.kind == "bottleneck":
            addition.add(name, config.r, config.dropout)
        else:
            addition.add(name, config.tokens)
        addition.adapters.to(next(module.parameters()).device)
        addition.names = (*addition.names, name)


def _inject(model: nn.Module, name: str, config: AdapterConfig, targets: dict[str, nn.Module]) -> None:
    from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, inject_adapter_in_model

    for place in targets:
        _refuse_other_kind(place, model.get_submodule(place), HOLDS[config.kind])
    places: Any = {"target_modules": list(targets)}
    settings: PeftConfig
    if config.kind == "layer_norm":
        settings = LNTuningConfig(**places)
    elif config.kind == "ia3":
        settings = IA3Config(**places, feedforward_modules=[])
    else:
        settings = LoraConfig(
            **places,
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # a number in its formulas
            lora_dropout=config.dropout,
            use_dora=config.kind == "dora",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Unsupported layer type"
        )  # of the width of norms, which it does not use
        inject_adapter_in_model(settings, model, adapter_name=name)
    del model.peft_config  # peft's note of it; the configuration of the model says the same


HOLDS = {"lora": "lora_A", "dora": "lora_A", "ia3": "ia3_l", "layer_norm": "ln_tuning_layers"}  # where peft keeps them


def _refuse_other_kind(place: str, module: nn.Module, holds: str | None) -> None:
    wrapped = hasattr(module, "adapter_layer_names") and (holds is None or not hasattr(module, holds))
    beside = holds is not None and any(name.startswith(BESIDE) for name, _ in module.named_children())
    if wrapped or beside:
        raise ValueError(
            f"{place} has an adapter of another kind already; give each module adapters of one kind, in whatever number"
        )


@contextmanager
def _keeping_gradients(model: nn.Module) -> Iterator[None]:
    """peft decides what trains wherever it adds or chooses; here stages do."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    yield
    for parameter, required in before.items():
        parameter.requires_grad_(required)


def own(tensors: dict[str, Tensor], adapters: Iterable[str]) -> dict[str, Tensor]:
    """A state without the tensors of other adapters than these."""
    kept = {None, *adapters}
    return {name: tensor for name, tensor in tensors.items() if adapter_of(name) in kept}
