"""What every task shares: one model, named objectives on shared reads of a batch, a stage, an optimizer, an evaluation.

A training step returns `(losses, report)`: what is optimised and what is only logged never share a dict.
"""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimodal import stages
from unimodal.config import ModelConfig
from unimodal.data.batch import Batch, check_batch
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.hub import load_checkpoint
from unimodal.model import ImageState, TextState, UnimodalModel
from unimodal.tasks.evaluation import Evaluation, EvaluationSettings
from unimodal.tasks.mining import mine_neighbours
from unimodal.tasks.optimizer import OptimizerSettings, build_optimizer

Losses = dict[str, Tensor]
Report = dict[str, Tensor]


class Step:
    """One training step's reads of a batch, each made once, when an objective first asks for it.

    `progress` runs from 0 to 1 over the stage.
    """

    def __init__(self, model: UnimodalModel, batch: Batch, progress: float) -> None:
        self.model, self.batch, self.progress = model, batch, progress

    @cached_property
    def image(self) -> ImageState:
        return self.model.encode_image(self.batch.get("image"), features=self.batch.get("image_features"))

    @cached_property
    def text(self) -> TextState:
        return self.model.encode_text(self.batch["text"], self.batch["text_mask"])

    @cached_property
    def image_embedding(self) -> Tensor:
        return self.model.image_embedding(self.image)

    @cached_property
    def text_embedding(self) -> Tensor:
        return self.model.text_embedding(self.text)


class Objective:
    """A loss with its weight and the batch keys it reads. Subclasses compute it from a `Step`."""

    keys: tuple[str, ...] = ()

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        raise NotImplementedError(f"{type(self).__name__} is an objective without a loss; implement __call__(step)")


class Task(pl.LightningModule):
    """A model in training.

    Args:
        config: the model to build.
        objectives: losses by name; their weighted sum is minimised.
        trainable: learning-rate factor by parameter name pattern (last match decides); everything unmatched is frozen.
        optimizer: optimizer settings.
        evaluation: what validation measures.
        init_from: a checkpoint folder or Hub id whose weights the stage starts from. Not for resuming: that is `--ckpt_path`.
        pretrained: without `init_from`, start the towers from the sources that `config` names.
        seed: what the randomness of every step follows from.
    """

    def __init__(
        self,
        config: ModelConfig,
        objectives: dict[str, Objective],
        trainable: dict[str, float] | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),
        evaluation: EvaluationSettings = EvaluationSettings(),
        init_from: str | None = None,
        pretrained: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)  # the first weights, too, follow from the seed
        self.config, self.objectives, self.trainable = config, objectives, trainable or {"*": 1.0}
        self.optimizer, self.settings, self.init_from, self.seed = optimizer, evaluation, init_from, seed
        self.model = UnimodalModel(config, pretrained=pretrained and init_from is None)
        self.factors = stages.rates(self.model, self.trainable)
        if init_from is not None:
            self._start_from(init_from)
        stages.freeze(self.model, self.factors)
        self.processor: Processor | None = None
        self.evaluation: Evaluation | None = None
        self.results: dict[str, Any] = {}

    def _start_from(self, checkpoint: str) -> None:
        source, _ = load_checkpoint(checkpoint)
        result = self.model.load_state_dict(source.state_dict(), strict=False)
        untrained = [name for name in result.missing_keys if not self.factors.get(name)]
        if untrained or result.unexpected_keys:
            raise ValueError(
                f"init_from {checkpoint}: tensors missing there that this stage does not train: {untrained}; "
                f"tensors there that this model lacks: {list(result.unexpected_keys)}; give the same model configuration"
            )
        self.model.backbone.sources = source.backbone.sources

    # Training.

    def training_forward(self, batch: Batch) -> tuple[Losses, Report]:
        """Losses by objective name (unweighted), and what else is worth logging."""
        total = self.trainer.estimated_stepping_batches if self._trainer is not None else 1
        step = Step(self.model, batch, self.global_step / total)
        losses: Losses = {}
        report: Report = {}
        for name, objective in self.objectives.items():
            check_batch(batch, objective.keys, f"objective {name!r}")
            losses[name], extra = objective(step)
            report |= {f"{name}/{key}": value for key, value in extra.items()}
        return losses, report

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        # Dropout, sampled negatives and noise follow from the step alone, so a resumed run repeats them.
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) * 64 + self.global_rank)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        losses, report = self.training_forward(batch)
        total = torch.stack([self.objectives[name].weight * loss for name, loss in losses.items()]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"step {self.global_step}: losses are not finite: { {k: float(v) for k, v in losses.items()} }; "
                "lower the learning rate or train in float32"
            )
        self.step_losses = {name: float(loss.detach()) for name, loss in losses.items()}
        self.step_report = {name: float(value.detach()) for name, value in report.items()}
        self.log_dict(self.step_losses, prog_bar=True, logger=False)
        if self.trainer.loggers:
            self.log_dict({f"train/{k}": v for k, v in {**self.step_losses, **self.step_report}.items()})
        return total

    def train(self, mode: bool = True) -> "Task":
        super().train(mode)
        if mode:
            stages.quiet_frozen(self.model)
        return self

    def on_train_start(self) -> None:
        self.train()  # a run that resumes inside an epoch sees no start of one

    def on_train_epoch_start(self) -> None:
        self.train()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.factors, self.optimizer)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.optimizer.rate(min(1.0, (step + 1) / total))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Evaluation: the whole split is read, then every present head is scored.

    @property
    def data(self) -> Any:
        """The data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        data = self.data
        self.processor = data.bind(self.config, self.model.backbone)
        if stage == "fit" and self.init_from is None and self.config.captioning and self.config.captioning.vocabulary:
            self.model.head("captioning").set_vocabulary(
                self._frequent_tokens(data.train, self.config.captioning.vocabulary)
            )
        if stage == "fit" and self.config.generation and self.model.head("generation").needs_fit:
            size = self.config.generation.size
            self.model.head("generation").autoencoder.fit(data.targets(min(1000, len(data.train)), size))
        if stage == "fit" and data.hard_neighbours and data.neighbours is None:
            data.neighbours = self._mined(Path(self.trainer.default_root_dir) / "neighbours.safetensors")

    def _frequent_tokens(self, pairs: Pairs, size: int) -> Tensor:
        """The `size` most frequent token ids of a split's captions, special tokens among them: a decoder's subset vocabulary."""
        assert self.processor is not None
        counts: Counter[int] = Counter()
        for i in range(len(pairs)):
            ids, mask = self.processor.texts(pairs.captions(i))
            counts.update(ids[mask].tolist())
        head = self.model.heads["captioning"]
        special = {head.bos_id, head.eos_id, head.unk_id}
        frequent = [token for token, _ in counts.most_common() if token not in special][: size - len(special)]
        if len(frequent) + len(special) < size:
            raise ValueError(
                f"captioning.vocabulary is {size}, but the training captions use only {len(frequent) + len(special)} tokens; lower it"
            )
        return torch.tensor(sorted(special | set(frequent)))

    @torch.no_grad()
    def _mined(self, path: Path) -> Tensor:
        """Hard neighbours of the training split under the weights that the stage starts from; kept in a file of the run."""
        data = self.data
        if not path.exists():
            self.model.eval()
            images = [
                self.model.image_embedding(
                    self.model.encode_image(batch.get("image"), features=batch.get("image_features"))
                )
                for batch in data.mining_dataloader()
            ]
            assert self.processor is not None
            neighbours = mine_neighbours(
                self.model, torch.cat(images).float(), data.train, self.processor, neighbours=data.hard_neighbours
            )
            self.model.train()
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"neighbours": neighbours}, path)
        return load_file(path)["neighbours"]

    def _begin(self, pairs: Pairs) -> None:
        assert self.processor is not None
        self.evaluation = Evaluation(self.model, self.processor, pairs, self.settings)

    def _end(self, prefix: str) -> None:
        assert self.evaluation is not None
        self.results = self.evaluation.results()
        self.log_dict(
            {f"{prefix}/{k}": v for k, v in self.evaluation.numbers(self.results).items()}, rank_zero_only=True
        )
        self.evaluation = None

    def on_validation_epoch_start(self) -> None:
        self._begin(self.data.val)

    def on_test_epoch_start(self) -> None:
        self._begin(self.data.test)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        assert self.evaluation is not None
        self.evaluation.add(batch)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        self.validation_step(batch, batch_index)

    def on_validation_epoch_end(self) -> None:
        self._end("val")

    def on_test_epoch_end(self) -> None:
        self._end("test")

    def predict_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """Embeddings of the batch's images, and of its captions where it has any."""
        image = self.model.encode_image(batch.get("image"), features=batch.get("image_features"))
        embeddings = {"image": self.model.image_embedding(image)}
        if "text" in batch:
            text = self.model.encode_text(batch["text"], batch["text_mask"])
            embeddings["text"] = self.model.text_embedding(text)
        return embeddings
