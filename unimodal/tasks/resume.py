"""Where an interrupted training goes on: a checkpoint that no kill can spoil, saved every so many steps and when the run is asked to end.

    resume.ckpt             the newest; a file, or under FSDP2 a folder in which every process wrote its part
    resume.previous.ckpt    the one before it, for when the newest cannot be read

A checkpoint is written in the folder where it belongs, flushed to the disk and renamed.
"""

import os
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from unimodal import files
from unimodal.hub import CheckpointError
from unimodal.hub.training import check_training_checkpoint, read_training_checkpoint

NEWEST, PREVIOUS, UNFINISHED = "resume.ckpt", "resume.previous.ckpt", "resume.unfinished.ckpt"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LocalCheckpoints(TorchCheckpointIO):
    """Checkpoints as files of this machine: written whole or not at all, and read without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as unfinished:
            torch.save(checkpoint, unfinished)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_training_checkpoint(path)


class Interrupted(SystemExit):
    """The system asked a training to end, and it ended between two steps; the exit status is the one of a process that the signal killed.

    Args:
        number: of the signal.
        step: optimizer steps that are done.
        checkpoint: where the training goes on.
    """

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        super().__init__(128 + number)
        self.number, self.step, self.checkpoint = number, step, checkpoint

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name} stopped the training after step {self.step}"


class Resume(pl.Callback):
    """Saves `resume.ckpt` in the run's folder: every so many steps, and when SIGTERM or SIGINT asks the run to end.

    The run ends after the step that it is in, or after the first step behind a validation. A second signal ends it at once.

    Args:
        every: optimizer steps between two savings; None saves only before the run ends.

    Attributes:
        seconds: time that the training has taken, earlier attempts up to their last checkpoint included.
        signal: number of the signal that asked the run to end, or None.
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every: expected at least 1 step between two checkpoints, got {every}")
        self.every = every
        self.signal: int | None = None
        self.step = 0
        self.spent, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent, self.started = state["seconds"], time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # the trainer puts back what was there before when it ends
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        print(f"\n{signal.Signals(number).name}: the training ends after this step; a second signal ends it at once")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        if not stepped or not _goes_on(trainer):  # what is saved is continued: there must be a step to come
            return
        number = self._asked(trainer)
        if number or (self.every is not None and self.step % self.every == 0):
            self._save(trainer)
        if number:
            raise Interrupted(number, self.step, Path(trainer.default_root_dir) / NEWEST)

    def _asked(self, trainer: pl.Trainer) -> int:
        """Number of the signal that any process got; 0 for none."""
        own = self.signal or (signal.SIGTERM if trainer.received_sigterm else 0)
        if trainer.world_size == 1:
            return int(own)
        numbers = trainer.strategy.all_gather(torch.tensor(int(own), device=trainer.strategy.root_device))
        return int(numbers.max())

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        trainer.save_checkpoint(folder / UNFINISHED, weights_only=False)
        if trainer.is_global_zero:
            _keep(folder / NEWEST, folder / PREVIOUS)
            os.replace(folder / UNFINISHED, folder / NEWEST)
            files.flush(folder)
        trainer.strategy.barrier()


def _keep(newest: Path, previous: Path) -> None:
    """Make the newest checkpoint the previous one; a file stays in its place too until another takes it."""
    if newest.exists():
        _remove(previous)
        try:
            os.link(newest, previous)
        except OSError:  # a folder, or a file system without links
            os.replace(newest, previous)


def _goes_on(trainer: pl.Trainer) -> bool:
    """Whether there is a step after this one."""
    last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return not (last or trainer.should_stop or trainer.global_step == trainer.max_steps)


def find_resume(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read; None where the run left none.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    left = [path for path in (folder / NEWEST, folder / PREVIOUS) if path.exists()]
    faults = []
    for path in left:
        try:
            check_training_checkpoint(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if faults:
            warnings.warn(
                f"{'; '.join(faults)}; the training goes on from {path}, the checkpoint before it", stacklevel=2
            )
        return path
    if faults:
        cure = f"no checkpoint of this training can be read; remove {folder / NEWEST}, and the same command trains from the start"
        raise CheckpointError("\n".join([*faults, cure]))
    return None


def remove_resume(folder: Path) -> None:
    """Remove what a finished or abandoned training needs no more."""
    for name in (UNFINISHED, PREVIOUS, NEWEST):
        _remove(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
