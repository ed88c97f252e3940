"""Which settings of a stage decide the weights that it ends with, and whether a folder holds a stage of the same ones.

Paths, loader processes, devices and what is printed decide nothing: a recipe may be mended there, and the run goes on. The training data
counts by what it holds (its fingerprint), not by where it lies.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimodal import files
from unimodal.cli.messages import ConfigError
from unimodal.words import Word

SETTINGS = "settings.json"
# Of the trainer; what is not here says where, on what and how visibly a stage trains.
DECIDING = (
    *("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "precision", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches", "fast_dev_run"),
    *("sync_batchnorm", "reload_dataloaders_every_n_epochs", "callbacks"),
)
WATCHING = (
    "ProgressBar",
    "Monitor",
    "Summary",
    "ModelCheckpoint",
)  # callbacks that change no weights, by the end of their name
PLACES = ("train", "val", "test", "workers", "feature_cache", "negatives")  # of the data


def deciding(config: dict[str, Any], output: Path, trained_on: str, **others: Any) -> dict[str, Any]:
    """What decides the weights of a stage.

    Args:
        config: the stage's configuration.
        output: the schedule's folder; what lies inside it is named from there.
        trained_on: fingerprint of the training split.
        others: what else does, by name.
    """
    model = {**config["model"], "init_args": {**config["model"].get("init_args", {})}}
    model["init_args"].pop("evaluation", None)
    data = {key: value for key, value in config["data"].items() if key not in PLACES}
    data |= {key: config["data"][key] is not None for key in ("feature_cache", "negatives") if key in config["data"]}
    trainer = {key: config["trainer"][key] for key in DECIDING if key in config["trainer"]}
    changing = [one for one in trainer.pop("callbacks", None) or [] if not class_name(one).endswith(WATCHING)]
    trainer |= {"callbacks": changing} if changing else {}
    settings = {"seed_everything": config.get("seed_everything"), "model": model, "data": data, "trainer": trainer}
    settings |= {"training data": trained_on, **others}
    plain = json.dumps(_read(settings), sort_keys=True, default=str)
    return json.loads(plain.replace(json.dumps(f"{output}/")[1:-1], ""))


def _read(settings: Any) -> Any:
    """The settings, with numbers and truth values however they are written."""
    if isinstance(settings, dict):
        return {str(key): _read(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [_read(value) for value in settings]
    return settings.value if isinstance(settings, Word) else settings


def class_name(callback: Any) -> str:
    """The class path of a callback as a configuration has it, with or without arguments."""
    return str(callback.get("class_path") if isinstance(callback, dict) else callback)


def compare(folder: Path, settings: dict[str, Any], worked: bool) -> bool:
    """Whether a stage's folder holds work of these settings; False where it holds none, or that of a trial (`fast_dev_run`).

    Args:
        folder: the stage's.
        settings: what decides its weights now.
        worked: whether the folder holds anything that would be lost.

    Raises:
        ConfigError: it holds work of other settings, and names those that differ; or nobody knows of which.
    """
    path = folder / SETTINGS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["decide"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        if not worked:
            return False
        raise ConfigError(
            f"{path} is not there, or cut short, or another version wrote it ({type(error).__name__}), so it is not known how "
            f"this stage was trained; remove {folder} to train the stage anew, or choose another --output"
        ) from error
    if before == settings:
        return True
    if not worked or before["trainer"].get("fast_dev_run"):
        return False
    there, here = dict(_flat(before)), dict(_flat(settings))
    differing = [
        f"{name} {there.get(name, 'not set')!r:.60} there, {here.get(name, 'not set')!r:.60} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise ConfigError(
        f"{folder} holds a run of this stage with other settings; choose another --output, or remove {folder.parent} to start over. "
        f"They differ in {'; '.join(differing[:5])}{more}"
    )


def keep(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what decides the weights of a stage, before it trains."""
    files.write_json(folder / SETTINGS, {"decide": settings})


def _flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its dotted name."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, settings
