"""`unimodal doctor --config RECIPE`: what every stage trains, the memory it will take on each device, and where it will not fit."""

import json
import os
import resource
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from unimodal import stages
from unimodal.cli import between
from unimodal.cli.messages import ConfigError, short
from unimodal.cli.schedule import stage_configs
from unimodal.cli.stage import print_stage
from unimodal.cli.train import Parts, quiet, read_schedule
from unimodal.cli.trainer import require_precision
from unimodal.data.module import PairData
from unimodal.data.negatives import write_negatives
from unimodal.files import in_words
from unimodal.tasks import Task
from unimodal.tasks.memory import Forecast, forecast
from unimodal.tasks.start import Start

GIB = 2**30
CUDA = GIB // 2  # what CUDA and its libraries take of a GPU
LOW = {"bf16": "bf16-mixed", "16": "bf16-mixed", "16-mixed": "bf16-mixed"}


@dataclass(frozen=True)
class Machine:
    """What a configuration trains on: devices of each node, nodes, how they share the work, and in what precision."""

    kind: Literal["cpu", "gpu"]
    devices: int
    nodes: int
    strategy: Literal["single", "ddp", "fsdp2"]
    precision: str

    def free(self) -> int | None:
        """Bytes that each device has free; None where this machine has no such devices."""
        if self.kind == "cpu":
            return available_memory() // self.devices
        if torch.cuda.device_count() < self.devices:
            return None
        return min(torch.cuda.mem_get_info(i)[0] for i in range(self.devices))


class Run(NamedTuple):
    """What a stage trains, on which data and machine, whether an average of the weights runs along, and bytes of pictures kept."""

    task: Task
    data: PairData
    machine: Machine
    averages: bool
    pictures: int


def available_memory() -> int:
    """Bytes of main memory that this process could still take: what the system has, within the limit of a container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    system, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if system.exists():
        free = next(int(line.split()[1]) * 1024 for line in system.open() if line.startswith("MemAvailable"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(limit.with_name("memory.current").read_text()))
    return free


def program_size() -> int:
    """Bytes that this process has taken so far, before there is a model: Python and the libraries."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def examine_recipe(files: list[Path], overrides: list[str], console: Console) -> int:
    """Print the report of every stage; returns 1 when one does not fit, 2 for a configuration that cannot be read."""
    quiet()
    program, fits = program_size(), True
    try:
        for name, about, config, start in _stages(files, overrides, console):
            with tempfile.TemporaryDirectory() as folder:
                run = _build(config, start, Path(folder))
                print_stage(name, about, stages.table(run.task.model, run.task.factors))
                found = forecast(
                    run.task,
                    run.data,
                    precision=run.machine.precision,
                    devices=run.machine.devices * run.machine.nodes,
                    strategy=run.machine.strategy,
                    averages=run.averages,
                )
            beside = CUDA if run.machine.kind == "gpu" else program + run.pictures
            fits &= _report(console, run.task, found, run.machine, beside)
    except (ArgumentError, ConfigError, OSError, ValueError) as error:
        print(f"unimodal doctor: {short(in_words(error))}", file=sys.stderr)
        return 2
    return 0 if fits else 1


def _stages(files: list[Path], overrides: list[str], console: Console) -> Iterator[tuple[str, str, Any, str | None]]:
    """Name, purpose and configuration of everything that trains, and the checkpoint that its first weights come from, if any.

    What a stage will start from is not there yet, so its configuration starts from nothing.
    """
    schedule = read_schedule(files, overrides)
    if schedule is None:
        files_first = [word for file in files for word in ("--config", str(file))]
        yield "fit", "", [*files_first, *overrides, "--seed_everything=false"], None
        return
    left: set[str] = set()
    start: str | None = None
    for name, folder, config in stage_configs(schedule):
        stage = schedule["stages"][name]
        left.add(str(folder / "model"))
        if kind := between.kind(stage):
            console.print(f"stage {name}: {kind}; it trains nothing\n")
            continue
        settings = config["model"].setdefault("init_args", {})
        if settings.get("init_from") in left:
            settings.update(init_from=None, pretrained=False)
        else:
            start = settings.get("init_from")
        yield name, stage.get("about", ""), {**config, "seed_everything": False}, start


def _build(config: Any, start: str | None, folder: Path) -> Run:
    """Task and data as the stage will have them, but for what earlier stages are yet to leave."""
    mined = None
    if isinstance(config, dict) and not Path(config["data"].get("negatives") or ".").exists():
        mined = config["data"].pop("negatives")
    parts = Parts(config, run=False)
    task, data, trainer = parts.model, parts.datamodule, parts.config["trainer"]
    if start is not None:
        task.start_processor = Start.open(start).processor_of(task.config)
    decodes = data.feature_cache is None or data.target_size is not None
    data.feature_cache, data.hard_neighbours = None, 0  # both take long to make and change little of a step's memory
    task.bind(data)
    if "generation" in task.model.heads and (generator := task.model.head("generation")).needs_fit:
        generator.autoencoder.fit(torch.rand(64, 3, generator.size, generator.size) * 2 - 1)  # any pictures do
    if mined is not None:
        data.negatives = str(_stand_in(data, folder / "negatives.jsonl"))
    averages = any("EMA" in str(callback.get("class_path")) for callback in trainer.get("callbacks") or ())
    return Run(task, data, _machine(trainer), averages, _pictures(data) if decodes else 0)


def _stand_in(data: PairData, path: Path) -> Path:
    """Negatives of the form that an earlier stage will mine: of every image and caption, the next image."""
    pairs = data.train
    assert pairs is not None
    header = {
        "model": "none",
        "data": {"name": pairs.name, "split": pairs.split, "fingerprint": pairs.fingerprint()},
        "settings": {"judge": "match"},
        "kept": {},
    }
    rows: list[dict[str, Any]] = []
    for i in range(len(pairs)):
        other = (i + 1) % len(pairs)
        rows.append({"image": i, "positives": [0.0], "texts": [[other, 0, 0.0]] * data.hard_texts})
    for i in range(len(pairs)):
        wrong = [[(i + 1) % len(pairs), 0.0]] * data.hard_images
        rows += [{"caption": [i, c], "positive": 0.0, "images": wrong} for c in range(len(pairs.captions(i)))]
    return write_negatives(path, header, rows)


def _machine(trainer: Any) -> Machine:
    """What the settings of a trainer come to here.

    Raises:
        ConfigError: for a strategy that no task runs under, or a precision that no run takes.
    """
    kind: Literal["cpu", "gpu"] = "cpu"
    if trainer["accelerator"] in ("gpu", "cuda") or (trainer["accelerator"] == "auto" and torch.cuda.is_available()):
        kind = "gpu"
    asked = trainer["devices"]
    if isinstance(asked, str) and asked != "auto":
        asked = json.loads(f"[{asked}]") if "," in asked else int(asked)
    here = torch.cuda.device_count() if kind == "gpu" else 1
    devices = len(asked) if isinstance(asked, list) else max(1, here) if asked in ("auto", -1) else asked
    nodes, named = trainer["num_nodes"], trainer["strategy"]
    name = named if isinstance(named, str) else str(named.get("class_path"))
    strategy: Literal["single", "ddp", "fsdp2"] = "ddp" if devices * nodes > 1 else "single"
    if name.endswith(("FSDP2", "ModelParallelStrategy")):
        strategy = "fsdp2"
    elif name != "auto" and "ddp" not in name.lower():
        raise ConfigError(f"trainer.strategy is {name}; expected auto, ddp or unimodal.tasks.FSDP2")
    precision = str(trainer["precision"] or "32-true")
    require_precision(precision)
    return Machine(kind, devices, nodes, strategy, LOW.get(precision, precision))


def _pictures(data: PairData) -> int:
    """Bytes of the training pictures, which are kept once they are decoded."""
    if data.train is None or data.processor is None:
        return 0
    return len(data.train) * torch.as_tensor(data.processor.image_array(data.train.image(0))).nbytes


def _report(console: Console, task: Task, found: Forecast, machine: Machine, program: int) -> bool:
    """Print one stage's memory; returns whether it fits."""
    world = machine.devices * machine.nodes
    table = Table("memory of each device", "GiB", title_justify="left")
    rows = {
        "program, and pictures once decoded" if machine.kind == "cpu" else "CUDA": program,
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        {"single": "", "ddp": "DDP's buckets", "fsdp2": "blocks while they are whole"}[
            machine.strategy
        ]: found.exchange,
        f"activations of {found.batch_size} rows": found.activations,
        "together": program + found.total,
        "an evaluation, on the first device": program + found.whole + found.evaluation,
    }
    for name, size in rows.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}", style="bold" if name == "together" else "")
    console.print(table)
    console.print(f"{machine.strategy} on {world} {machine.kind}{'s' * (world > 1)}, {machine.precision}")
    if found.unreached:
        console.print(
            f"{len(found.unreached)} parameters train and no loss reaches them, for example {found.unreached[0]}: DDP stops "
            "where there is one; freeze them in model.init_args.trainable"
        )
    free = machine.free()
    if free is None:
        console.print(f"this machine has {torch.cuda.device_count()} GPUs, so nothing says whether it fits\n")
        return True
    worst = max(program + found.total, program + found.whole + found.evaluation)
    if worst <= free:
        console.print(f"fits: {free / GIB:.2f} GiB are free on each device\n")
        return True
    console.print(f"[bold]does not fit[/bold]: {free / GIB:.2f} GiB are free on each device. What to do:")
    for line in _advice(task, found, machine, free - program):
        console.print(f"  - {line}")
    console.print()
    return False


def _advice(task: Task, found: Forecast, machine: Machine, free: int) -> Iterator[str]:
    if found.total > free:
        rows = found.rows_within(free)
        if rows > 0:
            yield f"data.batch_size: {rows} at most"
        if task.mini_batch_size is None and not any(objective.states for objective in task.objectives.values()):
            yield "model.init_args.mini_batch_size: a large batch is read a few rows at a time (GradCache)"
        if not task.gradient_checkpointing:
            yield "model.init_args.gradient_checkpointing: true; blocks are run again instead of kept"
        if machine.precision == "32-true":
            yield "--trainer.precision bf16-mixed (configs/trainer/bf16.yaml)"
        if machine.strategy != "fsdp2" and found.states > found.activations:
            yield "--trainer configs/trainer/fsdp2.yaml, on several devices: each keeps a part of weights and optimizer"
        if found.states > found.activations:
            yield "train less: give parts of the model a factor of 0 in model.init_args.trainable"
    if found.whole + found.evaluation > free:
        yield "a smaller validation split: an evaluation keeps what was read of all of it"
