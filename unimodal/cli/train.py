"""`unimodal fit|validate|test|predict|demo`: LightningCLI over tasks and data, and schedules of stages."""

import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningCLI

from unimodal.cli.messages import ConfigError, short
from unimodal.cli.schedule import merge, run_schedule, save_stage, stage_configs
from unimodal.data.module import PairData
from unimodal.recipes import recipe
from unimodal.tasks import LossLog, StageProof, Task

TRAINER_DEFAULTS = {
    "logger": False,
    "default_root_dir": "checkpoints/run",
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
}
VERBS = ("fit", "validate", "test", "predict")


class TrainCLI(LightningCLI):
    """LightningCLI over `Task` (any subclass, by class path) and `PairData`. A task keeps no hyperparameters in its checkpoints, so what
    the YAML and the command line say always wins over what a checkpoint was made with."""

    def __init__(self, args: Any, *, run: bool = True) -> None:
        super().__init__(
            Task,
            PairData,
            subclass_mode_model=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,
            trainer_class=Trainer,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [LossLog(), StageProof()]},
            parser_kwargs={
                "exit_on_error": False,
                **({verb: {"exit_on_error": False} for verb in VERBS} if run else {}),
            },
            run=run,
            args=args,
        )

    def after_fit(self) -> None:
        save_stage(self.model, Path(self.trainer.default_root_dir))


class ConfigCheck(TrainCLI):
    """Reads a configuration and builds nothing, so that a typo in the last stage is found before the first one trains."""

    def instantiate_classes(self) -> None:
        pass


def _quiet() -> None:
    """Silence what Lightning says of loaders that are deliberate here, and its advertising."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*_dataloader.* returned 0 length.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")


def _configs(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The `--config` files of a command line, and the rest of it."""
    files, rest = [], []
    words = iter(arguments)
    for word in words:
        if word in ("--config", "-c"):
            files.append(Path(next(words, "")))
        elif word.startswith("--config="):
            files.append(Path(word.split("=", 1)[1]))
        else:
            rest.append(word)
    return files, rest


def _schedule(files: list[Path], overrides: list[str]) -> dict[str, Any] | None:
    """The merged schedule that `files` hold, with `--key.key value` overrides; None when they hold a plain configuration."""
    content: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"--config {file}: no such file; give the path of a recipe, for example tasks/quickstart/schedule.yaml"
            )
        try:
            content = merge(content, yaml.safe_load(file.read_text()) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file}: not readable as YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(
                f"--config {file}: holds {type(content).__name__} {content!r:.80}; expected a mapping of settings"
            )
    if "stages" not in content:
        return None
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"schedule: unexpected argument {word!r}; overrides read --key.key value")
        key, _, value = word[2:].partition("=")
        value = value if "=" in word else next(words, "")
        patch: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            patch = {part: patch}
        content = merge(content, patch)
    return content


def run(arguments: Sequence[str]) -> int:
    """Run a Lightning verb; a configuration with `stages` is a schedule and runs stage by stage.

    A configuration that cannot be read is a short message on standard error and status 2.
    """
    _quiet()
    files, rest = _configs(arguments[1:])
    may_be_schedule = arguments[0] == "fit" and not {"-h", "--help"} & set(rest)
    where = ""
    try:
        schedule = _schedule(files, [word for word in rest if word != "--print_config"]) if may_be_schedule else None
        if schedule is None:
            TrainCLI(list(arguments))
            return 0
        for name, _, config in stage_configs(schedule):
            where = f"stage {name!r}: "
            ConfigCheck({**config, "seed_everything": False}, run=False)
        where = ""
        if "--print_config" in rest:
            print(yaml.safe_dump(schedule, sort_keys=False, allow_unicode=True), end="")
        else:
            run_schedule(schedule, lambda config: TrainCLI(config, run=False))
    except (ArgumentError, ConfigError) as error:
        print(f"unimodal {arguments[0]}: {where}{short(str(error))}", file=sys.stderr)
        return 2
    return 0


def demo(arguments: Sequence[str]) -> int:
    """Train the quickstart schedule."""
    rest = list(arguments[1:])
    files = [recipe("quickstart/schedule")]
    if "--short" in rest:
        rest.remove("--short")
        files.append(recipe("quickstart/short"))
    if "--help" in rest or "-h" in rest:
        print(
            "usage: unimodal demo [--short] [--key.key value ...]\n\nTrains the embedded quickstart on this machine and writes its page."
        )
        return 0
    return run(["fit", *(word for file in files for word in ("--config", str(file))), *rest])
