"""`unimodal fit|validate|test|predict|demo`: LightningCLI over tasks and data, and schedules of stages."""

import inspect
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from unimodal import files, words
from unimodal.cli import starting, system
from unimodal.cli.messages import ConfigError, short
from unimodal.cli.schedule import LOCK, merge, output_folder, run_schedule, stage_configs
from unimodal.cli.stage import save_stage
from unimodal.cli.trainer import heads_of, prepare
from unimodal.cli.typed import TYPES, typed
from unimodal.data.module import PairData
from unimodal.hub.training import check_training_checkpoint
from unimodal.recipes import recipe
from unimodal.tasks import Interrupted, LossLog, Resume, StageProof, Task
from unimodal.tasks.start import StartError

TRAINER_DEFAULTS = {
    "logger": False,
    "default_root_dir": "checkpoints/run",
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # training data cuts its own batches; evaluation is of whole splits
}
VERBS = ("fit", "validate", "test", "predict")
SECTIONS = ("model", "data", "trainer")  # may be given as a file: --trainer configs/trainer/ddp.yaml


def _nodes() -> int:
    """How many machines the launcher started this run on."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["GROUP_WORLD_SIZE"])
    return int(os.environ["SLURM_NNODES"]) if SLURMEnvironment.detect() else 1


class RunError(RuntimeError):
    """A training failed; its folder takes the traceback."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


class TrainCLI(LightningCLI):
    """LightningCLI over `Task` (any subclass, by class path) and `PairData`. A task keeps no hyperparameters in its checkpoints, so what
    the YAML and the command line say always wins over what a checkpoint was made with."""

    def __init__(self, args: Any, *, run: bool = True, checkpoint_every: int | None = None) -> None:
        self.resume = Resume(checkpoint_every)
        super().__init__(
            Task,
            PairData,
            subclass_mode_model=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,
            trainer_class=Trainer,
            trainer_defaults={
                **TRAINER_DEFAULTS,
                "num_nodes": _nodes(),
                "callbacks": [LossLog(), StageProof(), self.resume],
            },
            parser_kwargs={
                "exit_on_error": False,
                **({verb: {"exit_on_error": False} for verb in VERBS} if run else {}),
            },
            run=run,
            args=words.untyped(args) if isinstance(args, dict) else args,
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; a command line that starts from a checkpoint is read once more, over the configuration of that checkpoint."""
        words_alone = isinstance(args, list)
        given = [word for word in args if not word.startswith("--print_config")] if words_alone else args
        super().parse_arguments(parser, given)
        if words_alone:
            said = self.config if self.config.get("subcommand") is None else self.config[self.config.subcommand]
            whole = starting.completed(args, said.get("model")) or args
            if whole != given:
                super().parse_arguments(parser, whole)
        self.config = words.told(self.config)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser of jsonargparse says it in words of its own
            said: BaseException | None = error
            while said is not None and not isinstance(said, StartError):
                said = said.__cause__ or said.__context__
            raise said or error from None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # Whether a checkpoint may run code is not asked.
        return {verb: {*skipped, "weights_only"} for verb, skipped in LightningCLI.subcommands().items()}

    def _parse_ckpt_path(self) -> None:
        """Look at the checkpoint before anything is built; a task keeps no hyperparameters there, which Lightning would read here."""
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path is None or (path == "last" and self.config.subcommand == "fit"):
            return
        try:
            check_training_checkpoint(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--ckpt_path: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise ConfigError(f"trainer: {error}") from error
        given = vars(self._get(self.config, "model")["init_args"])
        objectives = (
            given.get("objectives") or given.keys() - inspect.signature(Task).parameters
        )  # a task of one has it as an argument
        prepare(trainer, self.subcommand or "fit", objectives, heads_of(given.get("config")))
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        folder = Path(self.trainer.default_root_dir)
        if subcommand != "fit" or not self.trainer.is_global_zero:
            return super()._run_subcommand(subcommand)
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder / LOCK, f"{folder}: the folder of this run"):
            try:
                super()._run_subcommand(subcommand)
            except Exception as error:  # of whatever is in the training
                raise RunError(str(error) or type(error).__name__, folder) from error

    def after_fit(self) -> None:
        model = self.model.whole_model()
        folder = Path(self.trainer.default_root_dir)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_stage(model, self.model.processor, folder, self.model.prompts)
        if self.resume.signal is not None:  # it came in the last step
            raise Interrupted(self.resume.signal, self.trainer.global_step, folder / "model")


class ConfigCheck(TrainCLI):
    """Reads a configuration and builds nothing, so that a typo in the last stage is found before the first one trains."""

    def instantiate_classes(self) -> None:
        pass

    def build_trainer(self) -> None:
        """Build the trainer alone, so that an option which it cannot take is found as early."""
        self.config_init = self.parser.instantiate_classes(Namespace(trainer=self.config.trainer))
        told = logging.getLogger("pytorch_lightning.utilities.rank_zero")
        level = told.level
        told.setLevel(logging.ERROR)  # the trainer of the training says what devices there are
        try:
            self.instantiate_trainer()
        finally:
            told.setLevel(level)


class Parts(TrainCLI):
    """Model and data of a configuration, and no trainer: on whatever machine, as that of the training would build them."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def quiet() -> None:
    """Silence what Lightning says of loaders that are deliberate here, and its advertising."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*_dataloader.* returned 0 length.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings(
        "ignore", message=".*FSDP2-wrapped module .* returned a view tensor.*"
    )  # nobody writes there
    warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")


def _configs(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The `--config` files of a command line, and the rest of it."""
    files: list[Path] = []
    rest: list[str] = []
    given = iter(arguments)
    for word in given:
        if word in ("--config", "-c"):
            if (file := next(given, "")) == "":
                raise _no_value("config")
            files.append(Path(file))
        elif word.startswith("--config="):
            files.append(Path(word.split("=", 1)[1]))
        else:
            rest.append(word)
    return files, rest


def _read(file: Path, option: str) -> dict[str, Any]:
    """The settings in a YAML file that was given to `option`."""
    if not file.is_file():
        examples = {"--config": "tasks/quickstart/schedule.yaml", "--trainer": "configs/trainer/ddp.yaml"}
        example = f", for example {examples[option]}" if option in examples else ""
        raise ConfigError(f"{option} {file}: no such file; give the path of a recipe or a fragment{example}")
    try:
        content = words.load(file.read_text(encoding="utf-8-sig")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {file}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{option} {file}: holds {type(content).__name__} {content!r:.80}; expected a mapping of settings"
        )
    return content


def _no_value(key: str) -> ConfigError:
    return ConfigError(f"--{key} has no value; write --{key} VALUE")


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The keys and values of `--key value` and `--key=value`."""
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ConfigError(f"schedule: unexpected argument {argument!r}; overrides read --key.key value")
        key, equals, value = argument[2:].partition("=")
        value = value if equals else next(rest, "")
        if not value or (value.startswith("--") and not equals):
            raise _no_value(key)
        yield key, value


def read_schedule(files: list[Path], overrides: list[str]) -> dict[str, Any] | None:
    """The merged schedule that `files` hold, with `--key.key value` overrides; None when they hold a plain configuration."""
    content: dict[str, Any] = {}
    for file in files:
        content = merge(content, _read(file, "--config"))
    if "system" in content:
        added = {key: value for key, value in content.items() if key not in system.KEYS}
        content = merge(system.schedule_of(content), added)
    if "stages" not in content:
        return None
    for key, value in _overrides(overrides):
        patch = words.word(value) if key not in TYPES or TYPES[key] is not str else value
        if key in SECTIONS and isinstance(patch, str):
            patch = _read(Path(patch), f"--{key}")
        for part in reversed(key.split(".")):
            patch = {part: patch}
        content = merge(content, patch)
    return typed(content)


def run(arguments: Sequence[str]) -> int:
    """Run a Lightning verb; a configuration with `stages` is a schedule and runs stage by stage.

    A configuration that cannot be read is a short message on standard error and status 2, a run that fails a sentence and status 1, with
    the traceback in a file. A run that a signal ends saves where it goes on, and has the status of a process that the signal killed.
    """
    quiet()
    verb, where, folder = arguments[0], "", Path(tempfile.gettempdir())
    try:
        given, rest = _configs(arguments[1:])
        schedule = None
        if not {"-h", "--help"} & set(rest):
            schedule = read_schedule(given, [word for word in rest if word != "--print_config"])
        if schedule is None:
            TrainCLI(list(arguments))
            return 0
        if verb != "fit":
            raise ConfigError(advice(verb, schedule))
        for name, _, config in stage_configs(schedule):
            where = f"stage {name!r}: "
            check = ConfigCheck({**config, "seed_everything": False}, run=False)
            if "--print_config" not in rest:
                check.build_trainer()
        where = ""
        if "--print_config" in rest:
            print(words.dump(schedule), end="")
        else:
            folder = output_folder(schedule)
            every = schedule.get("checkpoint_every", 200)
            run_schedule(schedule, lambda config: TrainCLI(config, run=False, checkpoint_every=every))
    except (ArgumentError, ConfigError, StartError) as error:
        print(f"unimodal {verb}: {where}{short(str(error))}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"unimodal {verb}: {error}; {_goes_on(error, schedule is not None)}", file=sys.stderr)
        return int(error.code or 0)
    except files.InUseError as error:
        print(f"unimodal {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"unimodal {verb}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        told = short(files.in_words(error)) or type(error).__name__
        written = write_traceback(error.folder if isinstance(error, RunError) else folder)
        print(f"unimodal {verb}: {told}\n  the traceback is in {written}", file=sys.stderr)
        return 1
    return 0


def advice(verb: str, schedule: dict[str, Any]) -> str:
    """What to do instead of scoring, or embedding by, a schedule."""
    model = output_folder(schedule) / "model"
    instead = {
        "validate": f"`unimodal evaluate --model {model} --data PATH --split val --out DIR` scores what it ends with",
        "test": f"`unimodal evaluate --model {model} --data PATH --split test --out DIR` scores what it ends with",
        "predict": f"`unimodal embed --model {model} PATH --out FILE.npy` embeds by what it ends with",
    }
    return f"this is a schedule of stages, which only fit runs; {instead[verb]}"


def _goes_on(error: Interrupted, schedule: bool) -> str:
    if error.checkpoint.name == "model":
        return f"that was the last one, its weights are in {error.checkpoint}"
    return (
        f"the same command goes on from {error.checkpoint}"
        if schedule
        else f"--ckpt_path {error.checkpoint} goes on from there"
    )


def write_traceback(folder: Path) -> Path:
    """Write the traceback of the exception that is handled into the run's folder, or where that cannot be written into a temporary one."""
    for place in (folder, Path(tempfile.gettempdir())):
        path = place / f"traceback-{os.getpid()}.txt"
        try:
            place.mkdir(parents=True, exist_ok=True)
            files.write_text(path, traceback.format_exc())
        except OSError:
            continue
        return path
    traceback.print_exc()
    return Path(os.devnull)


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
