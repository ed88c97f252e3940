"""A system as a part of a model: built from the model's configuration on the model's backbone, and the heads that the system is by itself.

Legend: B images, M texts, T image tokens, L text length, C width of the tokens, E embedding width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from unimodal.backbones import Backbone
from unimodal.config import (
    CaptioningConfig,
    EmbeddingConfig,
    MatchingConfig,
    ScoringRule,
    SystemConfig,
    WordsConfig,
    nearest,
)
from unimodal.systems.base import Images, System
from unimodal.systems.encoders import BackboneEncoders
from unimodal.systems.table import SYSTEMS


def class_of(config: SystemConfig) -> type[System]:
    """The class that a configuration names.

    Raises:
        ValueError: there is no system of the name, or its class does not take a setting; the message has the nearest known.
    """
    if config.name not in SYSTEMS:
        raise ValueError(f"system.name: no system {config.name!r}; {nearest(config.name, SYSTEMS)}")
    accepted = _accepted(SYSTEMS[config.name])
    for name in config.settings:
        if name not in accepted:
            raise ValueError(
                f"system.settings: {config.name} takes no {name!r}; {nearest(name, accepted) if accepted else 'it takes none'}"
            )
    return SYSTEMS[config.name]


def known_texts(config: SystemConfig) -> Sequence[str]:
    """The texts that a system holds by heart (instructions, nouns, names of categories)."""
    return class_of(config).known_texts(_arguments(config))


def build_system(config: SystemConfig, backbone: Backbone) -> tuple[BackboneEncoders, System]:
    """The system of a configuration, and the backbone as it reads it.

    Raises:
        ValueError: as `class_of`; the backbone reads no texts where the system reads their tokens; also what
            the system's class refuses.
    """
    cls = class_of(config)
    if "text" in cls.towers and "text" not in backbone.modalities:
        raise ValueError(
            f"system: {config.name} reads text tokens of the backbone, and this backbone reads only "
            f"{', '.join(backbone.modalities)}; give a backbone with a text tower, or a system that reads texts from their ids (blip2)"
        )
    # A training learns from its data which tokenizer it has: until then every word is the token 0.
    unknown = WordsConfig(start_id=0, end_id=0, mask_id=0, known=dict.fromkeys(known_texts(config), (0,)))
    encoders = BackboneEncoders(backbone, config.words or unknown)
    return encoders, cls(encoders, **_arguments(config))


def heads_of(system: System, rule: ScoringRule) -> dict[str, Any]:
    """The configurations of the heads that a system is by itself, by job, and the scoring rule: a system without an embedding scores every
    pair."""
    out: dict[str, Any] = {"embedding": None, "matching": None, "captioning": None}
    if not system.embeds:
        out["scoring"] = replace(rule, first="pair", combine="replace")
    else:
        dim, vectors = embedding_shape(system)
        out["embedding"] = EmbeddingConfig(kind="system", dim=dim, pool="query" if vectors else "mean", gate=False)
    if system.scores_pairs:
        out["matching"] = MatchingConfig(kind="system")
    if system.writes:
        encoders = system.encoders
        out["captioning"] = CaptioningConfig(
            kind="system", bos_id=encoders.start_id, eos_id=encoders.end_id, max_length=encoders.max_length
        )
    return out


@torch.no_grad()
def embedding_shape(system: System) -> tuple[int, int]:
    """E, and the number of vectors of an image, 0 where it has a single one."""
    encoders, modes = system.encoders, {module: module.training for module in system.modules()}
    system.eval()
    image = system.embed_images(
        Images(torch.zeros(1, encoders.image_tokens, encoders.image_width), torch.ones(1, encoders.image_tokens).bool())
    )
    for module, mode in modes.items():
        module.training = mode
    return image.shape[-1], image.shape[1] if image.ndim == 3 else 0


def _accepted(cls: type[System]) -> list[str]:
    """The names of a class's settings."""
    names: list[str] = []
    for base in cls.__mro__:  # a class that hands its settings on takes those of the class before
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names += [
            name for name, one in parameters.items() if name not in ("self", "encoders") and one.kind != one.VAR_KEYWORD
        ]
        if not any(one.kind == one.VAR_KEYWORD for one in parameters.values()):
            break
    return names


def _arguments(config: SystemConfig) -> dict[str, Any]:
    """The settings, and the categories where the class takes any."""
    told = {"categories": len(config.categories), "category_names": list(config.categories)}
    accepted = _accepted(class_of(config))
    if "categories" in accepted and not config.categories:
        raise ValueError(
            f"system.categories: {config.name} learns categories and got none; name those of the training data"
        )
    return {**config.settings, **{name: value for name, value in told.items() if name in accepted}}
