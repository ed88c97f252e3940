"""One stage of a schedule: its weights are trained and saved first, and scored then. What is there already is not done again.

<stage>/settings.json           what decides the weights, written before the training begins
<stage>/resume.ckpt             where an interrupted training goes on (`unimodal.tasks.resume`)
<stage>/model/, adapter/        the weights
<stage>/trained.json            what was trained and how long that took, written once the weights are saved
<stage>/done.json               the same with the scores and what they were measured on
"""

import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unimodal import files, stages
from unimodal.cli import between, settings
from unimodal.cli.messages import ConfigError
from unimodal.data.module import PairData
from unimodal.data.processor import Processor
from unimodal.data.scenes import Scenes
from unimodal.hub import CheckpointError, save_adapter, save_checkpoint
from unimodal.model import UnimodalModel
from unimodal.tasks import Evaluation, EvaluationSettings
from unimodal.tasks.resume import NEWEST, Interrupted, find_resume, remove_resume

TRAINED, DONE = "trained.json", "done.json"
WEIGHTS = ("model", "adapter")
LEFT = (
    "losses.jsonl",
    "neighbours.safetensors",
    between.NEGATIVES,
    TRAINED,
    DONE,
)  # by a stage, beside weights and checkpoints
console = Console()


class ScoringError(RuntimeError):
    """A stage is trained and saved, and its scores could not be measured."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage is to do.

    Attributes:
        name: the stage's name.
        about: its purpose.
        folder: where it leaves what it made.
        config: the configuration it is built from.
        settings: what decides its weights (`unimodal.cli.settings`).
        scored: what its scores are measured with, and on.
        build: makes the model, the data and the trainer of a configuration.
        between: what it does other than training, and how; None trains.
    """

    name: str
    about: str
    folder: Path
    config: dict[str, Any]
    settings: dict[str, Any]
    scored: dict[str, Any]
    build: Callable[[dict[str, Any]], Any]
    between: tuple[Literal["mine", "merge"], dict[str, Any]] | None

    def done(self) -> dict[str, Any] | None:
        """The content of `done.json`; None where the stage has not been scored, or was scored on something else."""
        content = read(self.folder / DONE)
        return content if content is not None and content.get("scored") == self.scored else None


def read(path: Path) -> dict[str, Any] | None:
    """The JSON object that a stage wrote; None where it is not there, or where a kill or a full disk left no whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def run_stage(plan: StagePlan, is_first: bool) -> Any:
    """Do what is left to do of a stage; returns what was built for it, or None.

    Args:
        plan: the stage.
        is_first: whether this is the first process of the run, which alone writes.

    Raises:
        ConfigError: the folder holds work of other settings.
        ScoringError: the stage is trained and saved, and its scores could not be measured.
        Interrupted: the system asked the run to end.
    """
    begun = settings.compare(plan.folder, plan.settings, worked(plan.folder))
    if begun and plan.done() is not None:
        rank_zero_only(console.print)(f"stage {plan.name}: finished before, in {plan.folder}")
        return None
    if is_first and not begun:
        _begin(plan)
    trained = read(plan.folder / TRAINED) if begun else None
    if plan.between is not None:
        return _run_between(plan) if is_first else None
    if trained is not None:
        return _score_again(plan, trained) if is_first else None
    return _train(plan)


def worked(folder: Path) -> bool:
    """Whether a stage's folder holds anything that a training made and that would be lost."""
    return any((folder / name).exists() for name in (*WEIGHTS, NEWEST, TRAINED, DONE, between.NEGATIVES))


def _begin(plan: StagePlan) -> None:
    """Clear a stage's folder of what a trial, or a start that came to nothing, left there."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    remove_resume(plan.folder)
    for name in LEFT:
        (plan.folder / name).unlink(missing_ok=True)
    for name in WEIGHTS:
        shutil.rmtree(plan.folder / name, ignore_errors=True)
    settings.keep(plan.folder, plan.settings)


def _train(plan: StagePlan) -> Any:
    cli = plan.build(plan.config)
    task, trainer = cli.model, cli.trainer
    rows = stages.table(task.model, task.factors)
    print_stage(plan.name, plan.about, rows)
    try:
        resume = find_resume(plan.folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    trainer.fit(task, datamodule=cli.datamodule, ckpt_path=None if resume is None else str(resume), weights_only=True)
    model = task.whole_model()
    if trainer.is_global_zero:
        save_stage(model, task.processor, plan.folder, task.prompts)
        trained = {
            "about": plan.about,
            "steps": trainer.global_step,
            "seconds": cli.resume.seconds,
            "peak_memory_mb": peak_memory_mb(),
            "parts": rows,
            "untouched_heads": stages.untouched_heads(model),
        }
        files.write_json(plan.folder / TRAINED, trained)
        remove_resume(plan.folder)
    if cli.resume.signal is not None:  # it came in the last step
        raise Interrupted(cli.resume.signal, trainer.global_step, plan.folder / "model")
    if trainer.is_global_zero:
        _score(plan, trained, cli, model)
    return cli


def _score_again(plan: StagePlan, trained: dict[str, Any]) -> Any:
    """Score the weights that the stage ended with before."""
    console.print(f"stage {plan.name}: trained before, in {plan.folder}; it is scored now")
    cli = plan.build(_starting_from(plan.config, plan.folder / "model"))
    cli.model.bind(cli.datamodule)
    _score(plan, trained, cli, cli.model.model)
    return cli


def _starting_from(config: dict[str, Any], weights: Path) -> dict[str, Any]:
    model = {**config["model"], "init_args": {**config["model"].get("init_args", {}), "init_from": str(weights)}}
    return {**config, "model": model}


def _score(plan: StagePlan, trained: dict[str, Any], cli: Any, model: UnimodalModel) -> None:
    """Measure every task's score on the validation split, and write that the stage is done."""
    task, started = cli.model, time.monotonic()
    try:
        evaluation = evaluate(model, task.processor, cli.datamodule, task.settings, cli.trainer.strategy.root_device)
        scores = evaluation.numbers(evaluation.results())
    except Exception as error:
        raise ScoringError(
            f"the stage is trained and its weights are in {plan.folder / 'model'}, but they could not be scored: {error}. When that is "
            "mended, the same command scores them without training"
        ) from error
    done = {**trained, "seconds": trained["seconds"] + time.monotonic() - started, "scores": scores}
    files.write_json(plan.folder / DONE, {**done, "scored": plan.scored})


def _run_between(plan: StagePlan) -> Any:
    """Run a stage that trains nothing; returns what was built to score or to mine with."""
    assert plan.between is not None
    kind, wanted = plan.between
    started = time.monotonic()
    console.print(f"stage {plan.name}: {plan.about}")
    trained: dict[str, Any] = {"about": plan.about, "steps": 0, "parts": []}
    if kind == "merge":
        between.merge_stages(wanted, plan.folder)
        cli = plan.build(plan.config)  # starts from the merged weights
        cli.model.bind(cli.datamodule)
        trained["proof"] = "the weights are an average; nothing was trained"
    else:
        cli = plan.build(plan.config)
        kept = between.mine_stage(wanted, cli, plan.folder)
        trained["proof"] = (
            f"the weights are those before; negatives for {kept['images']} images, {kept['captions']} captions"
        )
        console.print(trained["proof"])
    trained |= {"seconds": time.monotonic() - started, "peak_memory_mb": peak_memory_mb()}
    if kind == "merge":
        _score(plan, trained, cli, cli.model.model)
    else:
        files.write_json(plan.folder / DONE, {**trained, "scores": {}, "scored": plan.scored})
    return cli


def evaluate(
    model: UnimodalModel,
    processor: Processor,
    data: PairData,
    settings: EvaluationSettings,
    device: torch.device,
    *,
    final: bool = False,
) -> Evaluation:
    """What the model reads from the validation split, or finally from the test split where there is one."""
    test = final and data.test is not None
    pairs, loader = (data.test, data.test_dataloader()) if test else (data.val, data.val_dataloader())
    assert pairs is not None
    train = data.train
    known = train.later(settings.pictures) if final and settings.pictures and isinstance(train, Scenes) else None
    evaluation = Evaluation(model.to(device).eval(), processor, pairs, settings, known)
    for batch in track(loader, description=f"reading the {pairs.split} split", disable=not final):
        evaluation.add(data.transfer_batch_to_device(batch, device, 0))
    return evaluation


def save_stage(model: UnimodalModel, processor: Processor, folder: Path, prompts: dict[str, str]) -> None:
    """Write the weights a run ends with as a shareable checkpoint."""
    save_checkpoint(model.eval(), processor, folder / "model", prompts=prompts)
    if model.config.adapters:
        save_adapter(model, processor, folder / "adapter")


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@rank_zero_only
def print_stage(name: str, about: str, rows: list[dict[str, Any]]) -> None:
    """What trains in a stage and what does not."""
    table = Table(title=f"stage {name}: {about}", title_justify="left")
    for column, justify in (("part", "left"), ("parameters", "right"), ("trained", "right"), ("rate factors", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        trained = row["trained"]
        factors = ", ".join(f"{factor:g}" for factor in row["factors"])
        style = "" if trained else "dim"
        table.add_row(
            row["part"], f"{row['parameters']:,}", f"{trained:,}" if trained else "frozen", factors, style=style
        )
    console.print(table)
