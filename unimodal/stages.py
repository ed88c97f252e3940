"""A stage trains some parameters and leaves the rest exactly as they were: the choice by name patterns, and the proof.

The proof has two halves: every frozen tensor has the same bytes at the end as at the start, and every head that nothing on its path trains
gives the same bits for the same input.
"""

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from unimodal.backbones import move_pixels
from unimodal.config import nearest
from unimodal.heads import Reads
from unimodal.heads.base import LAYERS
from unimodal.model import UnimodalModel
from unimodal.sharding import whole
from unimodal.tuning import adapter_of, base_name


def paths(model: UnimodalModel) -> dict[str, tuple[str, ...]]:
    """What the output of each head depends on, as patterns."""
    backbone = model.backbone
    towers = (*backbone.tower("image"), *backbone.tower("text"))
    reads = Reads(*_named(backbone.sees, backbone.reads, towers, backbone.own))
    parts = {"embedding": model.embeds, "matching": model.matcher, "captioning": model.captioner}
    out = {head: part.path(reads) for head, part in parts.items() if part is not None}
    if "generation" in model.jobs:
        out["generation"] = (*reads.texts, *LAYERS, "bridge.query_sets.generate", "heads.generation.*")
    return out


def _named(*parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Patterns over the backbone's parameter names, as patterns over the model's."""
    return (tuple(f"backbone.{pattern}" for pattern in part) for part in parts)


def called(name: str) -> tuple[str, ...]:
    """What a pattern may call a parameter: by its name, its name without adapters around it, and `adapters.NAME` of its adapter NAME."""
    adapter = adapter_of(name)
    return (name, base_name(name), *([] if adapter is None else [f"adapters.{adapter}"]))


GROUPS = ("towers.", "projections.", "around.")


def placed(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """What else a pattern may call a parameter of a model, by where it stands: `towers.image` and `towers.text` if raw features of the
    backbone depend on it, `projections.image` and `projections.text` if it turns them into tokens that the model reads. Projections and all
    that stands behind the backbone are also called `around.` and their name."""
    if not isinstance(model, UnimodalModel):
        return {}
    backbone = model.backbone
    out: dict[str, tuple[str, ...]] = {}
    kinds = [kind for kind in backbone.modalities if model.system is None or kind in model.system.towers]
    tokens = {"image": backbone.sees, "text": backbone.reads}
    for name, _ in model.named_parameters():
        own = base_name(name).removeprefix("backbone.")
        if not name.startswith("backbone."):
            out[name] = (f"around.{name}",)
        elif tower := next((kind for kind in backbone.modalities if _matches(own, backbone.tower(kind))), None):
            out[name] = (f"towers.{tower}",)
        elif kind := next((kind for kind in kinds if _matches(own, tokens.get(kind, ()))), None):
            out[name] = (f"projections.{kind}", f"around.{name}")
    return out


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def rates(model: nn.Module, trainable: dict[str, float]) -> dict[str, float]:
    """Learning-rate factor of every parameter; 0 is frozen. The last pattern that matches a name (`called`, `placed`) decides.

    Raises:
        ValueError: for a pattern that matches no parameter (names the nearest), or when nothing trains.
    """
    places = placed(model)
    names = {name: (*called(name), *places.get(name, ())) for name, _ in model.named_parameters()}
    for pattern in trainable:
        if not (pattern.startswith(GROUPS) or any(fnmatch.filter(forms, pattern) for forms in names.values())):
            tops = {".".join(form.split(".")[:2]) for forms in names.values() for form in forms}
            raise ValueError(f"trainable pattern {pattern!r} matches no parameter; {nearest(pattern, tops)}")
    out = {}
    for name, forms in names.items():
        factors = [factor for pattern, factor in trainable.items() if fnmatch.filter(forms, pattern)]
        out[name] = factors[-1] if factors else 0.0
    if not any(out.values()):
        raise ValueError(
            f"this stage trains nothing: trainable is {trainable}; give at least one pattern a factor above 0"
        )
    return out


def freeze(model: nn.Module, factors: dict[str, float]) -> None:
    """Let the parameters with a factor above 0 require gradients, and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(factors[name] > 0)


def quiet_frozen(model: nn.Module) -> None:
    """Put every module whose parameters are all frozen into evaluation mode: no dropout, no running statistics that move."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Hash of every frozen tensor: parameters that do not train, and buffers of modules in which nothing trains."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for prefix, module in model.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            frozen |= {f"{prefix}.{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    return {name: hashlib.sha256(_bytes(whole(tensor))).hexdigest()[:16] for name, tensor in frozen.items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def moved(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names whose frozen tensors differ between two `fingerprints`."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def untouched_heads(model: UnimodalModel) -> list[str]:
    """Heads with no trained parameter on their path."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return [
        head for head, path in paths(model).items() if not any(fnmatch.filter(trained, pattern) for pattern in path)
    ]


@torch.no_grad()
def probe(model: UnimodalModel, heads: Iterable[str]) -> dict[str, Tensor]:
    """Outputs of `heads` for a fixed random picture and text, in evaluation mode."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    device = model.log_scale.device
    generator = torch.Generator().manual_seed(0)
    pixels = move_pixels(model.backbone.random_pixels(2, generator), device)
    ids = torch.randint(0, model.backbone.vocab_size, (2, 8), generator=generator).to(device)
    image, text = model.encode_image(pixels), model.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
    out: dict[str, Tensor] = {}
    for head in heads:
        if head == "embedding":
            out["embedding.image"], out["embedding.text"] = model.image_embedding(image), model.text_embedding(text)
        elif head == "matching":
            out["matching"] = model.head(head).probe(model, pixels, image, text)
        elif head == "captioning":
            out["captioning"] = model.head(head).probe(model, pixels, image, ids)
        else:
            network = model.head("generation")
            noise = torch.randn(2, *network.latent_shape, generator=generator).to(device)
            out["generation"] = network(noise, torch.full((2,), 0.5, device=device), model.generation_condition(text))
    for module, mode in was_training.items():
        module.training = mode
    return {name: tensor.cpu() for name, tensor in out.items()}


def table(model: nn.Module, factors: dict[str, float], depth: int = 2) -> list[dict[str, object]]:
    """One row per part of the model: its parameters, how many of them train, and the learning-rate factors."""
    rows: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[: depth + (name.startswith("bridge.query_sets."))])
        if "." not in name:
            part = name
        row = rows.setdefault(part, {"part": part, "parameters": 0, "trained": 0, "factors": set()})
        row["parameters"] += parameter.numel()
        if factors[name] > 0:
            row["trained"] += parameter.numel()
            row["factors"].add(factors[name])
    return [{**row, "factors": sorted(row["factors"])} for row in rows.values()]
