"""The settings of a schedule that no stage's parser reads, as their types take them: `name: 007` is text, `checkpoint_every: 007` is 7."""

import typing
from argparse import ArgumentError
from typing import Any

from unimodal import words
from unimodal.cli.messages import ConfigError
from unimodal.hub import Card
from unimodal.search import mine_negatives
from unimodal.tasks import EvaluationSettings

TYPES: dict[str, Any] = {
    "name": str,
    "title": str,
    "about": str,
    "output": str,
    "seed_everything": bool | int,
    "checkpoint_every": int,
    "precision": str,
    "aims": dict[str, float],
}
DATA = {"negatives": str | None}  # a stage, by its name, or a file
MAPPINGS = {"final": EvaluationSettings, "card": Card}


def typed(schedule: dict[str, Any]) -> dict[str, Any]:
    """The schedule with these settings as their types take them; unknown keys and other shapes stay, for `check_schedule` to name.

    Raises:
        ConfigError: names the setting, what came and what was expected.
    """
    out = {**schedule, **_each(schedule, TYPES, "")}
    for key, kind in MAPPINGS.items():
        if isinstance(out.get(key), dict):
            out[key] = _each(out[key], typing.get_type_hints(kind), f"{key}.")
    if isinstance(out.get("data"), dict):
        out["data"] = _each(out["data"], DATA, "data.")
    if isinstance(out["stages"], dict):
        out["stages"] = {name: _stage(name, stage) for name, stage in out["stages"].items()}
    return out


def _stage(name: str, stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    out = {**stage, **_each(stage, {"about": str, "merge": dict[str, float]}, f"stages.{name}.")}
    if isinstance(out.get("data"), dict):
        out["data"] = _each(out["data"], DATA, f"stages.{name}.data.")
    if isinstance(out.get("mine"), dict):
        out["mine"] = _each(out["mine"], typing.get_type_hints(mine_negatives), f"stages.{name}.mine.")
    return out


def _each(settings: dict[str, Any], types: dict[str, Any], where: str) -> dict[str, Any]:
    return {
        key: _as(types[key], value, where + key) if key in types else value for key, value in settings.items()
    }  # fmt: skip


def _as(kind: Any, value: Any, where: str) -> Any:
    if value is None and type(None) not in typing.get_args(kind):
        raise ConfigError(f"schedule: {where} has no value; give it one, or leave the key out")
    try:
        return words.as_type(kind, value, "value")
    except ArgumentError as error:
        raise ConfigError(f"schedule: {where} is {value!r}; {error.message}") from error
