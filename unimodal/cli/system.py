"""A published design's recipe as a schedule, for `unimodal fit --config configs/systems/albef.yaml --config configs/backbone/b.yaml`.

A system's recipe says what it is built of, how each of its stages trains and how it ranks. The backbone, the data and the trainer come from
further files. `epochs` says how often all stages together read the training split; they divide it by their shares.
"""

from argparse import ArgumentError
from typing import Any

from unimodal import words
from unimodal.cli.messages import ConfigError
from unimodal.stages import GROUPS
from unimodal.systems import SYSTEMS, Scoring, Stage

KEYS = ("title", "paper", "interaction", "inferred", "system", "scoring", "stages", "published", "epochs")
EPOCHS = 10.0  # of all stages together


def schedule_of(content: dict[str, Any]) -> dict[str, Any]:
    """The schedule of a system's recipe.

    Args:
        content: the recipe with what further files add to it.

    Raises:
        ConfigError: it names a class that is no part of a model, or a stage has a setting that does not exist.
    """
    name, settings = _named(content["system"])
    try:
        stages = words.as_type(dict[str, Stage], content.get("stages") or {}, "stages")
        rule = words.as_type(Scoring, content.get("scoring") or {}, "scoring")
        epochs = words.as_type(float, content.get("epochs", EPOCHS), "epochs")
    except ArgumentError as error:
        raise ConfigError(f"system {name}: {error}") from error
    if not stages:
        raise ConfigError(
            f"system {name}: it has no stages, since it is not trained step by step; `unimodal survey --systems {name}` fits and ranks it"
        )
    total = sum(stage.share for stage in stages.values())
    scoring = {
        key: value for key, value in (content.get("scoring") or {}).items() if key not in ("shortlist", "metric")
    }
    if rule.shortlist is not None:  # alone it scores every pair
        scoring |= {"first": "pair"}
    return {
        "name": name,
        "title": f"{content.get('title', name)}, reduced form",
        "about": f"{content.get('paper', '')}; {content.get('interaction', '')}",
        "output": f"checkpoints/{name}",
        "model": {
            "class_path": "unimodal.tasks.Joint",
            "init_args": {"config": {"system": {"name": name, "settings": settings}, "scoring": scoring}},
        },
        "data": {},
        "trainer": {"accelerator": "auto", "devices": 1, "limit_val_batches": 0},
        "stages": {
            stage: _stage(name, stage, settings, epochs * settings.share / total, content)
            for stage, settings in stages.items()
        },
    }


def _named(given: Any) -> tuple[str, dict[str, Any]]:
    """The name and the settings of the system that a recipe names by its class."""
    path, settings = (
        (given, {}) if isinstance(given, str) else (given.get("class_path", ""), given.get("init_args") or {})
    )
    ours = {
        f"{module}.{cls.__name__}": name
        for name, cls in SYSTEMS.items()
        for module in ("unimodal.systems", cls.__module__)
    }
    name = ours.get(path)
    if name is None:
        raise ConfigError(
            f"system: {path!r} is no part of a model, since checkpoints name systems by a fixed table: {', '.join(SYSTEMS)}; "
            "`unimodal survey --systems FILE` trains any class"
        )
    return name, settings


def _stage(name: str, stage: str, given: Stage, epochs: float, content: dict[str, Any]) -> dict[str, Any]:
    """A stage of the schedule; a batch and a length that the recipe's reader names for all stages come before the stage's own."""
    asked = (content.get("data") or {}).get("batch_size")
    images = max(1, given.batch_size // given.captions_per_image) if asked is None else int(asked)
    length = {"max_steps", "max_epochs", "max_time"} & set(content.get("trainer") or {})
    read = SYSTEMS[name].stage_towers.get(stage, SYSTEMS[name].towers)
    trainable = {_called(pattern): rate for pattern, rate in given.trainable.items()}
    trainable |= {f"projections.{kind}": 0.0 for kind in SYSTEMS[name].towers if kind not in read}
    return {
        "about": f"{name}, its stage {stage}",
        "model": {
            "init_args": {
                "objectives": {name: {"class_path": "unimodal.tasks.SystemLosses", "init_args": {"stage": stage}}},
                "trainable": trainable,
                "optimizer": {"lr": given.lr, "weight_decay": given.weight_decay, "warmup": 0.1},
            }
        },
        "data": {
            "batch_size": images,
            "captions_per_image": given.captions_per_image,
            "noise": given.noise,
            "hard_neighbours": images - 1 if given.order == "hard" else 0,
        },
        "trainer": {"gradient_clip_val": given.clip} | ({} if length else {"max_epochs": max(1, round(epochs))}),
    }


def _called(pattern: str) -> str:
    """A pattern over a system's parameters, or a group of the model's, as the model calls it; all of a system is all around the towers."""
    if pattern.startswith(GROUPS):
        return pattern
    return "around.*" if pattern == "*" else f"system.{pattern}"
