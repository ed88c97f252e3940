"""Which options of Lightning's trainer a run can take. What it cannot is refused before any work, with what to do instead."""

from collections.abc import Iterable
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.plugins.io import TorchCheckpointIO

from unimodal.cli.messages import ConfigError
from unimodal.config import nearest
from unimodal.hub.training import is_address
from unimodal.tasks import LocalCheckpoints
from unimodal.tasks.evaluation import MEASURES

ALWAYS = ("epoch", "step")  # what a ModelCheckpoint may monitor beside losses and measures


def prepare(trainer: Trainer, verb: str, objectives: Iterable[str], heads: Iterable[str]) -> None:
    """Give a trainer this project's way with checkpoints, and refuse what a run cannot do.

    Args:
        trainer: as the configuration made it.
        verb: fit, validate, test or predict.
        objectives: names of the losses that the run optimises.
        heads: names of the heads that the model has.

    Raises:
        ConfigError: an option has no meaning here; says which, and what to do.
    """
    if type(trainer.strategy.checkpoint_io) is not TorchCheckpointIO:
        raise ConfigError(
            f"trainer.plugins has {type(trainer.strategy.checkpoint_io).__name__}, and checkpoints are written by "
            "unimodal.tasks.LocalCheckpoints, which no kill can spoil; leave the plugin out"
        )
    trainer.strategy.checkpoint_io = LocalCheckpoints()
    checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
    for name, folder in [
        ("trainer.default_root_dir", trainer.default_root_dir),
        *(("ModelCheckpoint's dirpath", callback.dirpath) for callback in checkpoints),
    ]:
        if folder is not None and is_address(folder):
            raise ConfigError(f"{name} is {folder}, which is an address; give the path of a folder of this machine")
    require_precision(trainer.precision)
    if verb == "fit":
        _require_an_end(trainer)
        _require_gradients(trainer)
        _require_known_monitors(trainer, objectives, heads)


def require_precision(precision: str) -> None:
    """Raises:
    ConfigError: nothing can be trained in this precision.
    """
    if precision == "16-true":
        raise ConfigError(
            "trainer.precision is 16-true, in which the optimizer's divisors round to zero and losses become NaN; set bf16-mixed or "
            "16-mixed, or 32-true"
        )


def _require_an_end(trainer: Trainer) -> None:
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ConfigError(f"trainer.{name} is 0, so this run would train nothing; set it above 0, or leave it out")
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if trainer.max_steps == -1 and trainer.max_epochs == -1 and not timed:
        raise ConfigError(
            "nothing ends this training, and the learning rate follows how far it is; set trainer.max_steps, trainer.max_epochs or "
            "trainer.max_time"
        )


def _require_gradients(trainer: Trainer) -> None:
    if (batches := trainer.accumulate_grad_batches) < 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {batches}; expected at least 1, the batches whose gradients make one step"
        )
    if (longest := trainer.gradient_clip_val or 0) < 0:
        raise ConfigError(
            f"trainer.gradient_clip_val is {longest}; expected the largest norm that gradients may have, above 0, or leave it out"
        )


def _require_known_monitors(trainer: Trainer, objectives: Iterable[str], heads: Iterable[str]) -> None:
    measures = [f"val/{measure}" for measure, needed in MEASURES.items() if set(needed) <= set(heads)]
    validates = trainer.limit_val_batches != 0
    known = [*objectives, *(measures if validates else ()), *ALWAYS]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or not getattr(callback, "strict", True) or monitor in known:
            continue
        if monitor.startswith("train/") and trainer.loggers:
            continue
        name = type(callback).__name__
        if monitor in measures:
            raise ConfigError(
                f"{name} monitors {monitor!r}, and nothing is validated: trainer.limit_val_batches is 0; set it to 1.0"
            )
        raise ConfigError(f"{name} monitors {monitor!r}, which this run does not log; {nearest(monitor, known)}")


def heads_of(config: Any) -> list[str]:
    """Names of the heads that a parsed model configuration asks for."""
    return [
        name
        for name in ("embedding", "matching", "captioning", "generation")
        if getattr(config, name, None) is not None
    ]
