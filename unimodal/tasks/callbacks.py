"""What accompanies a training run: a loss log that survives a kill, an average of the weights, or the best of them, and the proof that the
frozen stood still."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from unimodal import files, stages
from unimodal.sharding import cut_like, whole


class LossLog(pl.Callback):
    """One JSON line per optimizer step in `losses.jsonl` of the run's folder: the means over the batches whose gradients the step took
    together. A resumed run first drops the lines after its checkpoint."""

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.path = Path(trainer.default_root_dir) / "losses.jsonl"
        self.step = trainer.global_step
        self.batches: list[dict[str, float]] = []
        if not trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        files.write_text(self.path, "".join(line for line in lines if _step(line) < trainer.global_step))

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if trainer.fit_loop._skip_backward:  # an average of weights takes its statistics: nothing is trained
            return
        self.batches.append({**task.step_losses, **task.step_report})
        if trainer.global_step == self.step:  # gradients accumulate
            return
        self.step, batches, self.batches = trainer.global_step, self.batches, []
        if trainer.is_global_zero:
            means = {key: sum(row[key] for row in batches) / len(batches) for key in batches[-1]}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step - 1, **means}) + "\n")


def _step(line: str) -> float:
    """The step of a line of the log; infinity for what a kill left of one."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


class EMA(pl.Callback):
    """Exponential moving average of the trained parameters, which takes their place when training ends.

    The decay warms up as (1 + n) / (10 + n), so that the random start is soon forgotten.

    Args:
        decay: weight of the past per step.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.updates = 0

    def _trained(self, task: pl.LightningModule) -> dict[str, Tensor]:
        return {name: p for name, p in task.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        for name, p in self._trained(task).items():
            self.average[name] = cut_like(self.average[name], p) if name in self.average else p.detach().clone()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, task: pl.LightningModule, *_: Any) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._trained(task).items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        for name, parameter in self._trained(task).items():
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        return {"average": {name: whole(part).cpu() for name, part in self.average.items()}, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.updates = state["average"], state["updates"]


class StageProof(pl.Callback):
    """Fails the run unless frozen tensors are bit-identical at its end and untouched heads give bit-identical outputs.

    What the start looked like travels with the resume checkpoint, so a resumed run is held to the same start.
    """

    def __init__(self) -> None:
        self.frozen: dict[str, str] = {}
        self.outputs: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, task: Any) -> None:
        if not self.frozen:
            self.frozen = stages.fingerprints(task.model)
            self.outputs = task.probe(stages.untouched_heads(task.model))

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        moved = stages.moved(self.frozen, stages.fingerprints(task.model))
        if moved:
            raise RuntimeError(f"frozen tensors moved during this stage: {', '.join(moved)}")
        after = task.probe(stages.untouched_heads(task.model))
        changed = [name for name, output in self.outputs.items() if not torch.equal(output, after[name])]
        if changed:
            raise RuntimeError(f"outputs of heads that this stage does not train changed: {', '.join(changed)}")

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self.frozen, "outputs": self.outputs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frozen, self.outputs = state["frozen"], state["outputs"]


class BestWeights(pl.Callback):
    """Keeps the trained weights of the validation that scored best, which take their place when training ends.

    The weights before the first step count, too, where the trainer validates them (`num_sanity_val_steps: -1`). Training ends when so many
    validations in a row were no better.

    Args:
        score: of what a validation measured (`Task.results`); higher is better.
        patience: validations without a better score that end the training.

    Attributes:
        scores: step and score of every validation, in order.
        step: of the best one.
    """

    def __init__(self, score: Callable[[dict[str, Any]], float], patience: int = 5) -> None:
        self.score, self.patience = score, patience
        self.scores: list[tuple[int, float]] = []
        self.step = 0
        self.weights: dict[str, Tensor] = {}

    @property
    def waited(self) -> int:
        """Validations since the best one."""
        return sum(step > self.step for step, _ in self.scores)

    @torch.no_grad()
    def on_validation_end(self, trainer: pl.Trainer, task: Any) -> None:
        found, best = self.score(task.results), max((score for _, score in self.scores), default=-math.inf)
        self.scores.append((trainer.global_step, found))
        if found > best:
            self.step = trainer.global_step
            self.weights = {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
        elif self.waited >= self.patience:
            trainer.should_stop = True

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        for name, parameter in task.named_parameters():
            if name in self.weights:
                parameter.copy_(cut_like(self.weights[name], parameter))

    def state_dict(self) -> dict[str, Any]:
        weights = {name: whole(part).cpu() for name, part in self.weights.items()}
        return {"scores": self.scores, "step": self.step, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = [(int(step), float(score)) for step, score in state["scores"]]
        self.step, self.weights = state["step"], state["weights"]
