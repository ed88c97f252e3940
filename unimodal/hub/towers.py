"""Checkpoints without their towers: these are named by source and hash, and taken from there unchanged."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unimodal.config import ModelConfig
from unimodal.hub.contents import Source
from unimodal.hub.weights import CheckpointError
from unimodal.model import UnimodalModel
from unimodal.tuning import base_name, fingerprint


def require_unchanged(model: UnimodalModel) -> None:
    """Refuse to leave out towers that could not be got back.

    Raises:
        ValueError: if a tower has no source, or its weights are no longer the source's.
    """
    for tower in model.parts:
        if tower not in model.sources:
            raise ValueError(
                f"include_backbone=False: the {tower} tower was not loaded from a source, so nobody could get it back; "
                "save with include_backbone=True"
            )
    origin = UnimodalModel(replace(model.config, adapters={}), pretrained=True).state_dict()
    state = {base_name(name): tensor for name, tensor in model.tower_state().items()}
    for tower, prefix in model.parts.items():
        weights = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        changed = [name for name, tensor in weights.items() if not torch.equal(tensor.cpu(), origin[name])]
        if changed:
            raise ValueError(
                f"include_backbone=False: the {tower} tower was trained, {len(changed)} of its {len(weights)} tensors "
                f"are no longer those of {model.sources[tower]['source']}, for example {changed[0]}; "
                "save with include_backbone=True"
            )


def locate(config: ModelConfig, sources: dict[str, Source], given: dict[str, str], folder: Path) -> ModelConfig:
    """The configuration with the sources to load the towers from: the Hub ids it names, or the local places given.

    Raises:
        CheckpointError: if a tower came from a local file, and none is given or it does not exist.
    """
    places: dict[str, Any] = {}
    for tower, source in sources.items():
        if tower in given and not Path(given[tower]).exists():
            raise CheckpointError(f"backbone_sources: {tower} tower at {given[tower]}: no such file or folder")
        if tower not in given and source.local:
            raise CheckpointError(
                f"{folder} holds no {tower} tower; it was the local {source.source!r} (sha256 {source.sha256}). "
                f'Give its place: backbone_sources={{"{tower}": path}}'
            )
        place = given.get(tower, source.source)
        places[tower] = {"source": place, "revision": None if tower in given else source.revision}
    backbone, captioning = config.backbone, config.captioning
    if "language_model" in places and captioning is not None and captioning.language_model is not None:
        language_model = replace(captioning.language_model, **places.pop("language_model"))
        captioning = replace(captioning, language_model=language_model)
    towers = {tower: replace(getattr(backbone, tower), **place) for tower, place in places.items()}
    return replace(config, backbone=replace(backbone, **towers), captioning=captioning)


def require_same(model: UnimodalModel, sources: dict[str, Source], folder: Path) -> None:
    """Compare the towers that were loaded with those that the checkpoint was trained on.

    Raises:
        CheckpointError: if a hash differs.
    """
    for tower, source in sources.items():
        found = model.sources[tower]
        if found["sha256"] != source.sha256:
            raise CheckpointError(
                f"{folder} was trained on the {tower} tower of {source.source} with sha256 {source.sha256}, but "
                f"{found['source']} has {found['sha256']}; give those weights in backbone_sources"
            )


def named_parts(config: ModelConfig, model: UnimodalModel) -> list[str]:
    """Which parts a configuration on this model's backbone has."""
    writes = config.captioning is not None and config.captioning.language_model is not None
    return [*model.backbone.parts, *(["language_model"] if writes else [])]


def require_fingerprint(model: UnimodalModel, expected: str, folder: Path, parts: Iterable[str]) -> None:
    """Compare these parts of a model, as they are now, with those that a folder without them was saved beside.

    Raises:
        CheckpointError: they are others.
    """
    found = fingerprint(model.tower_state(parts))
    if found != expected:
        dtype = next(iter(model.tower_state().values())).dtype
        hint = (
            ""
            if dtype == torch.float32
            else f", or open it in float32, not {dtype}, and convert the whole afterwards: to(dtype={dtype})"
        )
        raise CheckpointError(
            f"{folder} belongs to a backbone with fingerprint {expected}, this one ({model.config.backbone.label}) has {found}: "
            f"its adapters and heads would compute nonsense here. Open the model that they were trained on and load_adapter them{hint}"
        )


def share(model: UnimodalModel, other: UnimodalModel) -> None:
    """Put the towers of `model` in place of those of `other`, one in memory for both."""
    for prefix in other.parts.values():
        holder, _, name = prefix.rstrip(".").rpartition(".")
        setattr(other.get_submodule(holder), name, model.get_submodule(prefix.rstrip(".")))
    other.sources = {part: source for part, source in model.sources.items() if part in other.parts}
