"""A schedule: an ordered mapping of stages in one file. Each stage is an overlay on the schedule's own `model`, `data` and `trainer`,
starts from the weights of the stage before it, and leaves a folder of its own:

    <output>/<stage>/resume.ckpt    where an interrupted stage goes on (weights, optimizer, loader position)
    <output>/<stage>/losses.jsonl   every step's losses
    <output>/<stage>/model/         the weights it ends with, as a shareable checkpoint
    <output>/<stage>/adapter/       what stands around the backbone, alone, where the model has adapters
    <output>/<stage>/done.json      what it trained, how long it took, and every task's score after it

A stage that trains nothing stands between others: `mine: {...}` writes hard negatives of the training split, found by the
weights so far, as <stage>/negatives.jsonl, which later stages name in `data.negatives`; `merge: {a: 0.5, b: 0.5}` leaves
the weighted average of earlier stages' weights, with their adapters folded in; `merge: {a: 1}` only folds.

The same command again skips finished stages and goes on inside the interrupted one.
"""

import copy
import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unimodal import stages
from unimodal.cli import between
from unimodal.cli.cost import running_cost, training_cost
from unimodal.cli.finish import METRICS, write_results
from unimodal.cli.messages import ConfigError
from unimodal.config import from_dict, nearest
from unimodal.data.module import PairData
from unimodal.data.processor import Processor
from unimodal.hub import Card, load_checkpoint, round_weights, save_adapter, save_checkpoint
from unimodal.hub.folder import restore
from unimodal.model import UnimodalModel
from unimodal.tasks import Evaluation, EvaluationSettings, Task

KEYS = (
    "name",
    "title",
    "about",
    "output",
    "seed_everything",
    "model",
    "data",
    "trainer",
    "stages",
    "checkpoint_every",
    "final",
    "precision",
    "aims",
    "card",
)
STAGE_KEYS = ("about", "model", "data", "trainer", "mine", "merge")
console = Console()


def merge(base: Any, overlay: Any) -> Any:
    """`overlay` over `base`, mappings key by key; a mapping that names another class (`class_path`) replaces the whole."""
    if not isinstance(base, dict) or not isinstance(overlay, dict):
        return copy.deepcopy(overlay)
    if "class_path" in overlay and overlay["class_path"] != base.get("class_path"):
        return copy.deepcopy(overlay)
    return {key: merge(base[key], overlay[key]) if key in overlay and key in base else copy.deepcopy(overlay.get(key, base.get(key)))
            for key in [*base, *(key for key in overlay if key not in base)]}  # fmt: skip


def check_schedule(schedule: dict[str, Any]) -> None:
    """Refuse unknown keys and empty schedules.

    Raises:
        ConfigError: names the key and the nearest known one.
    """
    for key in schedule:
        if key not in KEYS:
            raise ConfigError(f"schedule: unknown key {key!r}; {nearest(key, KEYS)}")
    for key in ("model", "data"):
        if not isinstance(schedule.get(key), dict):
            raise ConfigError(
                f"schedule: {key} is {schedule.get(key)!r}; expected a mapping of settings that all stages share"
            )
    try:
        from_dict(Card, schedule.get("card", {}), "card")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule: {error}") from error
    for name in schedule.get("aims", {}):
        if name not in METRICS:
            raise ConfigError(f"schedule: aims at an unknown measure {name!r}; {nearest(name, METRICS)}")
    if not schedule["stages"] or not isinstance(schedule["stages"], dict):
        raise ConfigError(
            f"schedule: stages is {schedule['stages']!r}; expected a mapping from stage name to its settings"
        )
    for name, stage in schedule["stages"].items():
        if not isinstance(stage, dict):
            raise ConfigError(f"schedule stage {name!r}: expected a mapping of {', '.join(STAGE_KEYS)}, got {stage!r}")
        for key in stage:
            if key not in STAGE_KEYS:
                raise ConfigError(f"schedule stage {name!r}: unknown key {key!r}; {nearest(key, STAGE_KEYS)}")
    between.check(schedule["stages"])


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


@rank_zero_only
def print_history(history: dict[str, dict[str, float]], title: str) -> None:
    """Every task's score after every stage: what was learned, what was forgotten."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    for stage in history:
        table.add_column(f"after {stage}", justify="right")
    for measure in dict.fromkeys(key for scores in history.values() for key in scores):
        cells = [f"{scores[measure]:.3f}" if measure in scores else "-" for scores in history.values()]
        table.add_row(measure, *cells)
    console.print(table)


def save_stage(model: UnimodalModel, processor: Processor, folder: Path) -> None:
    """Write the weights a run ends with as a shareable checkpoint."""
    save_checkpoint(model.eval(), processor, folder / "model")
    if model.config.adapters:
        save_adapter(model, processor, folder / "adapter")


def run_schedule(schedule: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> Path:
    """Run the stages in order; returns the output folder.

    Args:
        schedule: the merged schedule.
        build: makes the CLI (model, data module and trainer, nothing run yet) of one stage's configuration.

    Raises:
        ConfigError: for unknown keys, or when a stage's folder holds a run with other settings.
    """
    history: dict[str, dict[str, Any]] = {}
    cli = None
    for name, folder, config in stage_configs(schedule):
        stage = schedule["stages"][name]
        kind = between.kind(stage)
        _refuse_other_settings(folder, config if kind is None else {**config, kind: stage[kind]})
        done = folder / "done.json"
        if done.exists():
            rank_zero_only(console.print)(f"stage {name}: finished before, in {folder}")
        elif kind is None:
            cli = build(config)
            _run_stage(cli, name, stage.get("about", ""), folder)
        elif _is_first():
            cli = _run_between(kind, stage, name, folder, partial(build, config))
        _wait_for(done)
        history[name] = json.loads(done.read_text())
        print_history({stage: row["scores"] for stage, row in history.items()}, "validation after each stage")
    if _is_first():
        _final_scores(schedule, folder.parent, folder / "model", cli or build(config), history)
    return folder.parent


def _is_first() -> bool:
    """Whether this is the first process of the run; known before there is a trainer."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def _wait_for(file: Path) -> None:
    """Until the first process has written a file, however long that takes.

    Raises:
        RuntimeError: when the process that started this one is gone, and with it whoever would write.
    """
    parent = os.getppid()
    while not file.exists():
        if os.getppid() != parent:
            raise RuntimeError(
                f"{file} was not written: the process that started this one has ended; start the run again"
            )
        time.sleep(0.2)


def _final_scores(
    schedule: dict[str, Any], output: Path, last: Path, cli: Any, history: dict[str, dict[str, Any]]
) -> None:
    """Score the last weights on the test split (the validation split where there is no other), write the results and the checkpoint."""
    started = time.monotonic()
    data = cli.datamodule
    model, processor = load_checkpoint(last)
    precision = schedule.get("precision", "float32")
    if precision != "float32":  # what is scored is what is saved, and the caches keep what the whole weights made
        round_weights(model, precision)
        data.feature_cache, data.caches = None, {}
    data.bind(model.config, model.backbone, model.language_captioner)
    settings = replace(cli.model.settings, **schedule.get("final", {}))
    evaluation = _evaluate(model, processor, data, settings, cli.trainer.strategy.root_device, final=True)
    pairs, results = evaluation.pairs, evaluation.results()
    results |= {"seconds": time.monotonic() - started, "peak_memory_mb": peak_memory_mb()}
    about = {
        "title": schedule.get("title", schedule.get("name", "A schedule of stages")),
        "summary": schedule.get("about", ""),
    }
    content = write_results(output, model, pairs, evaluation, results, history, about, schedule.get("aims", {}))
    names = {"retrieval_first": "first stage", "retrieval_reranked": "reranked", "captions": "captions"}
    measured = [(name, results[key]) for key, name in names.items() if key in results]
    training = f"{about['summary']} Stages: " + "; ".join(
        f"{name} ({row['steps']} steps): {row['about']}" for name, row in history.items()
    )
    device = cli.trainer.strategy.root_device
    cost = training_cost(history, device) + " " + running_cost(model, processor, pairs, precision, settings.num_beams)
    said = {"name": schedule.get("name", output.name), "training": training + ".", "cost": cost}
    said |= schedule.get("card", {})
    card = from_dict(Card, said)
    save_checkpoint(model, processor, output / "model", metrics=measured, card=card, precision=precision)
    if model.config.adapters:
        save_adapter(model, processor, output / "adapter", metrics=measured, card=card)
    table = Table(title=f"held-out results: {pairs.name} {pairs.split}", title_justify="left")
    for column in ("measure", "value", "protocol"):
        table.add_column(column)
    for name, line in content["protocol"].items():
        table.add_row(name, f"{evaluation.numbers(results)[name]:.3f}", line)
    console.print(table)
    console.print(f"wall time {content['wall_seconds']:.0f} s, peak memory {content['peak_memory_mb']:.0f} MiB")
    console.print(f"page: {output / 'index.html'}\nnumbers: {output / 'report.json'}\ncheckpoint: {output / 'model'}")


def stage_configs(schedule: dict[str, Any]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Name, folder and whole configuration of every stage in order; each starts from the weights of the one before.

    Raises:
        ConfigError: for unknown keys.
    """
    check_schedule(schedule)
    output = Path(schedule.get("output", f"checkpoints/{schedule.get('name', 'schedule')}"))
    previous: Path | None = None
    trained: dict[str, Any] = {}
    for name, overlay in schedule["stages"].items():
        if between.kind(overlay) is None:
            trained = overlay
        if between.kind(overlay) == "merge":
            previous = output / name / "model"  # it begins with what it makes
        # A stage between others is built, and scored, as the trained stage before it was.
        yield name, output / name, _stage_config(schedule, trained, output / name, previous)
        if between.kind(overlay) is None:
            previous = output / name / "model"


def _stage_config(
    schedule: dict[str, Any], overlay: dict[str, Any], folder: Path, previous: Path | None
) -> dict[str, Any]:
    config = {key: schedule[key] for key in ("seed_everything", "model", "data", "trainer") if key in schedule}
    config = merge(config, {key: overlay[key] for key in ("model", "data", "trainer") if key in overlay})
    given = config["data"].get("negatives")
    if isinstance(given, str) and given in schedule["stages"]:
        config["data"]["negatives"] = str(folder.parent / given / between.NEGATIVES)
    config.setdefault("trainer", {})["default_root_dir"] = str(folder)
    resume = {
        "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(folder),
            "filename": "resume",
            "every_n_train_steps": schedule.get("checkpoint_every", 200),
            "enable_version_counter": False,
        },
    }
    config["trainer"]["callbacks"] = [*config["trainer"].get("callbacks", []), resume]
    if previous is not None:
        config["model"].setdefault("init_args", {})["init_from"] = str(previous)
    return config


def _refuse_other_settings(folder: Path, config: dict[str, Any]) -> None:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
    settings = folder / "settings.json"
    if not _is_first():
        return
    if not settings.exists():
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps({"digest": digest}))
    elif json.loads(settings.read_text())["digest"] != digest:
        raise ConfigError(
            f"{folder} holds a run of this stage with other settings; choose another --output, or remove {folder.parent} to start over"
        )


def _run_stage(cli: Any, name: str, about: str, folder: Path) -> None:
    task, data, trainer = cli.model, cli.datamodule, cli.trainer
    rows = stages.table(task.model, task.factors)
    print_stage(name, about, rows)
    clock = folder / "seconds.json"  # of earlier, interrupted attempts
    spent = json.loads(clock.read_text()) if clock.exists() else 0.0
    started = time.monotonic()
    resume = folder / "resume.ckpt"
    restore(resume)  # a kill may have come between the two renames of a sharded one
    trainer.callbacks.append(_Clock(clock, spent, started))
    trainer.fit(task, datamodule=data, ckpt_path=str(resume) if resume.exists() else None)
    model = task.whole_model()
    if not trainer.is_global_zero:
        return
    scores = _scores(model, task, data, trainer.strategy.root_device)
    save_stage(model, task.processor, folder)
    done = {
        "about": about,
        "steps": trainer.global_step,
        "seconds": spent + time.monotonic() - started,
        "peak_memory_mb": peak_memory_mb(),
        "scores": scores,
        "parts": rows,
        "untouched_heads": stages.untouched_heads(model),
    }
    _write_done(folder, done)
    if resume.is_dir():
        shutil.rmtree(resume)
    resume.unlink(missing_ok=True)


def _write_done(folder: Path, done: dict[str, Any]) -> None:
    unfinished = folder / "done.json.unfinished"
    unfinished.write_text(json.dumps(done, indent=1))
    os.replace(unfinished, folder / "done.json")


def _run_between(kind: str, stage: dict[str, Any], name: str, folder: Path, build: Callable[[], Any]) -> Any:
    """Run a stage that trains nothing; returns what was built to score or to mine with."""
    about, started = stage.get("about", ""), time.monotonic()
    console.print(f"stage {name}: {about}")
    if kind == "merge":
        between.merge_stages(stage["merge"], folder)
        cli = build()  # starts from the merged weights
        task, data = cli.model, cli.datamodule
        task.processor = data.bind(task.config, task.model.backbone, task.model.language_captioner)
        scores = _scores(task.model, task, data, cli.trainer.strategy.root_device)
        proof = "the weights are an average; nothing was trained"
    else:
        cli = build()
        kept = between.mine_stage(stage["mine"], cli, folder)
        scores, proof = (
            {},
            f"the weights are those before; negatives for {kept['images']} images, {kept['captions']} captions",
        )
        console.print(proof)
    done = {
        "about": about,
        "steps": 0,
        "seconds": time.monotonic() - started,
        "peak_memory_mb": peak_memory_mb(),
        "scores": scores,
        "parts": [],
        "proof": proof,
    }
    _write_done(folder, done)
    return cli


def _scores(model: UnimodalModel, task: Task, data: PairData, device: torch.device) -> dict[str, float]:
    """Every task's score on the validation split."""
    assert task.processor is not None
    evaluation = _evaluate(model, task.processor, data, task.settings, device)
    return evaluation.numbers(evaluation.results())


def _evaluate(
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
    evaluation = Evaluation(model.to(device).eval(), processor, pairs, settings)
    for batch in track(loader, description=f"reading the {pairs.split} split", disable=not final):
        evaluation.add(data.transfer_batch_to_device(batch, device, 0))
    return evaluation


class _Clock(pl.Callback):
    """Notes the time spent beside each resume checkpoint, so that a killed run's time counts."""

    def __init__(self, path: Path, spent: float, started: float) -> None:
        self.path, self.spent, self.started = path, spent, started

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % 50 == 0 and trainer.is_global_zero:
            self.path.write_text(json.dumps(self.spent + time.monotonic() - self.started))
