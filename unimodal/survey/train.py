"""Training a system: its stages one after the other, each on its share of one budget that all systems get alike."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from unimodal import stages
from unimodal.systems import Batch, Stage, System

WARM_UP = 0.1  # share of a stage
Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Budget:
    """What a system may spend on training: optimizer steps, or minutes of wall time; its stages divide it by their shares.

    Raises:
        ValueError: neither or both are given, or it is nothing.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"budget: give steps or minutes, got {self.steps} steps and {self.minutes} minutes")
        if (self.steps or self.minutes or 0) <= 0:
            raise ValueError(f"budget: expected more than nothing, got {self.steps} steps, {self.minutes} minutes")

    @classmethod
    def read(cls, text: str) -> "Budget":
        """`300` or `300 steps`, `2.5 minutes` or `2.5m`; `30 s`, which could be either, is refused."""
        number, unit = text.rstrip(" minutesp"), text.lstrip("0123456789. ")
        try:
            if unit in ("", "step", "steps"):
                return cls(steps=int(number))
            if unit in ("m", "min", "minute", "minutes"):
                return cls(minutes=float(number))
        except ValueError:
            pass
        raise ValueError(f"budget: expected steps or minutes, for example '300' or '2.5 minutes', got {text!r}")

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.minutes is None else f"{self.minutes:g} minutes"


class Clock:
    """How far a stage is, from 0 to 1: by steps, or by time since its first step."""

    def __init__(self, budget: Budget, share: float) -> None:
        self.steps = None if budget.steps is None else max(1, round(budget.steps * share))
        self.seconds = None if budget.minutes is None else 60 * budget.minutes * share
        self.done, self.start = 0, 0.0

    def progress(self) -> float:
        if self.steps is not None:
            return min(1.0, self.done / self.steps)
        if self.done == 0:
            self.start = time.monotonic()
        assert self.seconds is not None
        return min(1.0, (time.monotonic() - self.start) / self.seconds)


class Training(pl.LightningModule):
    """One stage of one system.

    Args:
        system: what trains.
        name: the stage's name.
        stage: its settings.
        clock: how far it is.
    """

    def __init__(self, system: System, name: str, stage: Stage, clock: Clock) -> None:
        super().__init__()
        self.system, self.name, self.stage, self.clock = system, name, stage, clock
        self.factors = stages.rates(system, stage.trainable)
        self.history: list[dict[str, float]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in self.system.named_parameters():
            if self.factors[name]:
                groups.setdefault((self.factors[name], parameter.ndim > 1), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": parameters, "factor": factor, "weight_decay": self.stage.weight_decay if matrix else 0.0}
                for (factor, matrix), parameters in groups.items()
            ],
            lr=self.stage.lr,
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        progress = self.clock.progress()
        if progress >= 1:
            self.trainer.should_stop = True
            return -1
        warm = min(1.0, (progress + 1e-3) / WARM_UP)
        rate = self.stage.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        return None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.system.losses(batch, self.name, self.clock.progress())
        self.history.append({name: float(loss.detach()) for name, loss in losses.items()})
        return torch.stack(list(losses.values())).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.done += 1
        self.system.after_step(self.name)


def train_stage(
    system: System, name: str, stage: Stage, batches: Iterable[Batch], clock: Clock, precision: Precision = "float32"
) -> dict[str, Any]:
    """Train one stage; what it froze is the same, bit for bit, when it is over.

    Args:
        system: what trains; on its device when it is over, in evaluation mode.
        name: the stage's name.
        stage: its settings.
        batches: without end.
        clock: its share of the budget.
        precision: of products of matrices; weights and losses are float32.

    Returns:
        steps, seconds, parameters that trained, the losses of the last tenth (mean).

    Raises:
        RuntimeError: a frozen tensor moved, or a loss is not finite.
    """
    system.start_stage(name)
    training = Training(system, name, stage, clock)
    stages.freeze(system, training.factors)
    before = stages.fingerprints(system)
    system.train()
    stages.quiet_frozen(system)
    trainer = pl.Trainer(
        max_steps=-1 if clock.steps is None else clock.steps,
        gradient_clip_val=stage.clip,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
        use_distributed_sampler=False,
    )
    start = time.monotonic()
    trainer.fit(training, torch.utils.data.DataLoader(_Endless(batches), batch_size=None))
    system.end_stage(name)
    seconds = time.monotonic() - start
    if moved := stages.moved(before, stages.fingerprints(system)):
        raise RuntimeError(f"stage {name} froze {len(moved)} tensors that moved all the same, first {moved[0]}")
    last = training.history[-max(1, len(training.history) // 10) :]
    means = {loss: sum(row[loss] for row in last) / len(last) for loss in last[-1]} if last else {}
    if wrong := [loss for loss, value in means.items() if not math.isfinite(value)]:
        raise RuntimeError(f"stage {name}: the loss {wrong[0]} is {means[wrong[0]]}; lower the stage's lr")
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    system.eval()
    return {"steps": clock.done, "seconds": seconds, "trained": trained, "losses": means}


class _Endless(torch.utils.data.IterableDataset):
    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def train(
    system: System,
    plan: dict[str, Stage],
    batches: Callable[[str, Stage], Iterable[Batch]],
    budget: Budget,
    precision: Precision = "float32",
) -> dict[str, dict[str, Any]]:
    """All stages in order; what each did, by name. `batches` gives a stage its data, without end."""
    total = sum(stage.share for stage in plan.values())
    return {
        name: train_stage(system, name, stage, batches(name, stage), Clock(budget, stage.share / total), precision)
        for name, stage in plan.items()
    }
