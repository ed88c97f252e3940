"""A schedule: an ordered mapping of stages in one file. Each stage is an overlay on the schedule's own `model`, `data` and `trainer`,
starts from the weights of the stage before it, and leaves a folder of its own:

    <output>/<stage>/losses.jsonl   every step's losses
    <output>/<stage>/model/         the weights it ends with, as a shareable checkpoint
    <output>/<stage>/adapter/       what stands around the backbone, alone, where the model has adapters
    <output>/<stage>/done.json      what it trained, how long it took, and every task's score after it; more in `unimodal.cli.stage`

A stage that trains nothing stands between others: `mine: {...}` writes hard negatives of the training split, found by the
weights so far, as <stage>/negatives.jsonl, which later stages name in `data.negatives`; `merge: {a: 0.5, b: 0.5}` leaves
the weighted average of earlier stages' weights, with their adapters folded in; `merge: {a: 1}` only folds.

The same command again skips finished stages and goes on inside the interrupted one. One process at a time runs a schedule in its folder.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities import rank_zero_only
from rich.table import Table

from unimodal import files, words
from unimodal.cli import between, starting
from unimodal.cli.cost import running_cost, training_cost
from unimodal.cli.finish import PAGE, REPORT, write_results
from unimodal.cli.messages import ConfigError, short
from unimodal.cli.output import require_free_folder
from unimodal.cli.settings import SETTINGS, class_name, deciding
from unimodal.cli.stage import DONE, StagePlan, console, evaluate, peak_memory_mb, run_stage
from unimodal.config import from_dict, nearest
from unimodal.data.module import PairData
from unimodal.hub import Card, find_prompts, load_checkpoint, round_weights, save_adapter, save_checkpoint
from unimodal.hub.training import is_address
from unimodal.tasks.evaluation import MEASURES

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
SPLITS = ("train", "val", "test")
LOCK = ".unimodal.run.lock"


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
    if "ckpt_path" in schedule:
        raise ConfigError(
            "schedule: a schedule goes on where it stopped by itself, so it takes no ckpt_path; give the same command again, or a stage "
            "the weights to start from in model.init_args.init_from"
        )
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
        if name not in MEASURES:
            raise ConfigError(f"schedule: aims at an unknown measure {name!r}; {nearest(name, MEASURES)}")
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


def run_schedule(schedule: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> Path:
    """Run the stages in order; returns the output folder.

    Args:
        schedule: the merged schedule.
        build: makes the CLI (model, data module and trainer, nothing run yet) of one stage's configuration.

    Raises:
        ConfigError: for unknown keys, for data that is not there, or when a stage's folder holds a run with other settings.
        InUseError: another process runs a schedule in the output folder.
        ScoringError: a stage is trained and saved, and its scores could not be measured.
        Interrupted: the system asked the run to end.
    """
    output = output_folder(schedule)
    if _is_first():
        _require_own(output)
    with _alone(output):
        history: dict[str, dict[str, Any]] = {}
        cli = None
        for plan in _plans(schedule, output, build):
            cli = run_stage(plan, _is_first()) or cli
            history[plan.name] = _wait_for(plan)
            print_history({stage: row["scores"] for stage, row in history.items()}, "validation after each stage")
        if _is_first():
            _final_scores(schedule, output, plan.folder / "model", cli or build(plan.config), history)
    return output


def output_folder(schedule: dict[str, Any]) -> Path:
    """The folder of a schedule.

    Raises:
        ConfigError: it lies on another machine.
    """
    output = schedule.get("output", f"checkpoints/{schedule.get('name', 'schedule')}")
    if is_address(output):
        raise ConfigError(
            f"schedule: output is {output}, which is an address; give the path of a folder of this machine"
        )
    return Path(output)


def _require_own(output: Path) -> None:
    """Raises:
    ConfigError: the output folder cannot be written, or holds files of the names that a schedule writes and no run.
    """
    try:
        require_free_folder(output, (REPORT, PAGE, "model"), is_ours=_is_run)
    except (OSError, ValueError) as error:
        raise ConfigError(f"schedule: output: {error}") from error


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of an earlier run of a schedule, or of one that was interrupted."""
    return (folder / LOCK).exists() or any(folder.glob(f"*/{SETTINGS}"))


def _alone(output: Path) -> AbstractContextManager[None]:
    """The first process of a run holds its output folder."""
    if not _is_first():
        return nullcontext()
    output.mkdir(parents=True, exist_ok=True)
    return files.locked(output / LOCK, f"{output}: the folder of this run")


def _plans(schedule: dict[str, Any], output: Path, build: Callable[[dict[str, Any]], Any]) -> list[StagePlan]:
    """What every stage is to do, once the data of all of them was seen to be there."""
    plans: list[StagePlan] = []
    prints: dict[str, dict[str, str]] = {}  # of splits, by their settings
    for name, folder, config in stage_configs(schedule):
        stage = schedule["stages"][name]
        splits = {key: config["data"][key] for key in SPLITS if config["data"].get(key) is not None}
        known = json.dumps(splits, sort_keys=True, default=str)
        if known not in prints:
            prints[known] = _fingerprints(name, splits)
        kind = between.kind(stage)
        others = {} if kind is None else {kind: stage[kind]}
        scored = {"evaluation": config["model"].get("init_args", {}).get("evaluation"), "val": prints[known].get("val")}
        plan = StagePlan(
            name=name,
            about=stage.get("about", ""),
            folder=folder,
            config=config,
            settings=deciding(config, output, prints[known].get("train", ""), **others),
            scored=json.loads(json.dumps(scored, default=str)),
            build=build,
            between=None if kind is None else (kind, stage[kind]),
        )
        plans.append(plan)
    return plans


def _fingerprints(stage: str, splits: dict[str, Any]) -> dict[str, str]:
    """Fingerprint of every split that a stage's data names, whose files are there.

    Raises:
        ConfigError: a split cannot be read, or files of it are not there.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(PairData, "data")
    try:
        data = parser.instantiate_classes(words.told(parser.parse_object({"data": words.untyped(splits)}))).data
        data.require_files()
        return {key: getattr(data, key).fingerprint() for key in splits}
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"stage {stage!r}: {short(files.in_words(error))}") from error


def _is_first() -> bool:
    """Whether this is the first process of the run; known before there is a trainer."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def _wait_for(plan: StagePlan) -> dict[str, Any]:
    """What the first process wrote of a stage when it was done, however long that takes.

    Raises:
        RuntimeError: when the process that started this one is gone, and with it whoever would write.
    """
    parent = os.getppid()
    while (done := plan.done()) is None:
        if os.getppid() != parent:
            raise RuntimeError(
                f"{plan.folder / DONE} was not written: the process that started this one has ended; start the run again"
            )
        time.sleep(0.2)
    return done


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
    data.bind(model.config, model.backbone, model.language_captioner, processor)
    settings = replace(cli.model.settings, **schedule.get("final", {}))
    evaluation = evaluate(model, processor, data, settings, cli.trainer.strategy.root_device, final=True)
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
    prompts = find_prompts(last)
    save_checkpoint(
        model, processor, output / "model", metrics=measured, card=card, precision=precision, prompts=prompts
    )
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
    """Name, folder and whole configuration of every stage in order.

    A stage starts from the weights of the stage before it, unless it names others (`init_from`), and has their model's configuration
    where it does not say another.

    Raises:
        ConfigError: for unknown keys, or where the checkpoint that a stage names cannot be read.
    """
    check_schedule(schedule)
    output = output_folder(schedule)
    previous: Path | None = None
    trained: dict[str, Any] = {}
    models: dict[Path, dict[str, Any]] = {}  # what the stages so far leave, by its place
    for name, overlay in schedule["stages"].items():
        kind = between.kind(overlay)
        if kind == "merge":  # it begins with what it makes
            made = output / name / "model"
            models[made], previous = {**models[previous], "adapters": {}} if previous else {}, made
        # A stage between others is built, and scored, as the trained stage before it was.
        trained = overlay if kind is None else trained
        config = _stage_config(schedule, trained, output / name)
        own = _init_from(overlay) or (_init_from(schedule) if previous is None else None)
        _begin_with(config, previous if own is None else Path(own), models, f"schedule stage {name!r}: ")
        yield name, output / name, config
        if kind is None:
            previous = output / name / "model"
            models[previous] = config["model"].get("init_args", {}).get("config") or {}


def _init_from(settings: dict[str, Any]) -> str | None:
    return ((settings.get("model") or {}).get("init_args") or {}).get("init_from")


def _begin_with(config: dict[str, Any], start: Path | None, models: dict[Path, dict[str, Any]], where: str) -> None:
    """Let a stage start from these weights, and complete the configuration of its model by theirs.

    Raises:
        ConfigError: they cannot be read.
    """
    if start is None:
        return
    settings = config["model"].setdefault("init_args", {})
    settings["init_from"] = str(start)
    first = models[start] if start in models else starting.held(str(start), where)
    settings["config"] = merge(first, settings.get("config") or {})


def _stage_config(schedule: dict[str, Any], overlay: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = {key: schedule[key] for key in ("seed_everything", "model", "data", "trainer") if key in schedule}
    config = merge(config, {key: overlay[key] for key in ("model", "data", "trainer") if key in overlay})
    given = config["data"].get("negatives")
    if isinstance(given, str) and given in schedule["stages"]:
        config["data"]["negatives"] = str(folder.parent / given / between.NEGATIVES)
    config.setdefault("trainer", {})["default_root_dir"] = str(folder)
    saves = any(class_name(one).endswith("Checkpoint") for one in config["trainer"].get("callbacks") or [])
    config["trainer"].setdefault("enable_checkpointing", saves)  # resume.ckpt is the schedule's own
    return config
