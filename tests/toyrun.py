"""A schedule of one tiny stage, for tests of what surrounds a training: the embedding alone, six steps on 24 scenes."""

from pathlib import Path
from typing import Any

import yaml
from toy import toy_config

from unimodal.config import to_dict

STEPS = 6


def scenes(split: str, count: int) -> dict[str, Any]:
    """A reader of drawn scenes, as a configuration has it."""
    return {"class_path": "unimodal.data.Scenes", "init_args": {"split": split, "count": count}}


def tiny_stage(output: Path, data: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Any]:
    """The schedule; `data` and `trainer` add to its own settings, and a setting of None takes one away."""
    config = toy_config(matching=None, captioning=None, generation=None)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        **trainer,
    }
    return {
        "name": "tiny",
        "output": str(output),
        "checkpoint_every": 2,
        "model": {
            "class_path": "unimodal.tasks.Joint",
            "init_args": {
                "config": to_dict(config),
                "objectives": {"itc": {"class_path": "unimodal.tasks.ITC"}},
                "pretrained": False,
            },
        },
        "data": {"train": scenes("train", 24), "val": scenes("val", 6), "batch_size": 8, **(data or {})},
        "trainer": {key: value for key, value in settings.items() if value is not None},
        "stages": {"align": {"about": "embeddings"}},
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> list[str]:
    """Write a recipe; returns the words that train it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["fit", "--config", str(path)]


def plain(schedule: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same without stages: a plain configuration that runs in `folder`."""
    recipe = {key: schedule[key] for key in ("model", "data", "trainer")}
    return {**recipe, "trainer": {**recipe["trainer"], "default_root_dir": str(folder)}}
