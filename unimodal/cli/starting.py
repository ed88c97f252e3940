"""`init_from` in a recipe: the configuration of the checkpoint comes first, and what the recipe says is put over it."""

import os
from functools import lru_cache
from typing import Any

from jsonargparse import Namespace

from unimodal import words
from unimodal.cli.messages import ConfigError
from unimodal.config import to_dict
from unimodal.hub import find_config


def held(init_from: str, where: str = "") -> dict[str, Any]:
    """The configuration of a checkpoint, or of a published model, as plain values.

    Raises:
        ConfigError: it cannot be read; `where` begins the message.
    """
    try:
        return _read(str(init_from), _stamp(str(init_from)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}init_from: {error}") from error


def completed(arguments: list[str], model: Namespace | None) -> list[str] | None:
    """A command line that begins with the configuration of the checkpoint it starts from; None where it starts from none.

    Args:
        arguments: a verb and its options, or options alone.
        model: what they say of the model, as the parser of LightningCLI read it.
    """
    if model is None or not (init_from := model.init_args.get("init_from")):
        return None
    first = {"model": {"class_path": model.class_path, "init_args": {"config": held(init_from)}}}
    verb = [word for word in arguments[:1] if not word.startswith("-")]
    return [*verb, "--config", words.dump(first), *arguments[len(verb) :]]


@lru_cache(maxsize=4)
def _read(init_from: str, stamp: int) -> dict[str, Any]:
    return _listed(to_dict(find_config(init_from)))


def _stamp(folder: str) -> int:
    """When a local checkpoint was written; a published model is read once for all stages."""
    try:
        return os.stat(os.path.join(folder, "config.json")).st_mtime_ns
    except OSError:
        return 0


def _listed(value: Any) -> Any:
    """Plain values as YAML has them: lists in place of tuples."""
    if isinstance(value, dict):
        return {key: _listed(part) for key, part in value.items()}
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value
