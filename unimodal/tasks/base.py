"""What every task shares: one model, named objectives on shared reads of a batch, a stage, an optimizer.

A training step returns `(losses, report)`: what is optimised and what is only logged never share a dict.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from unimodal import stages
from unimodal.blocks import compile_blocks, recompute
from unimodal.chunks import refuse_coupled_rows
from unimodal.config import ModelConfig
from unimodal.data.batch import Batch, check_batch
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.data.tokens import words_of
from unimodal.distributed import sum_over_ranks, world_size
from unimodal.model import UnimodalModel
from unimodal.sharding import clip_gradients, is_sharded, shard, whole_state
from unimodal.systems import known_texts
from unimodal.tasks.evaluated import Evaluated
from unimodal.tasks.evaluation import EvaluationSettings
from unimodal.tasks.mining import kept_neighbours
from unimodal.tasks.objective import Objective, Report
from unimodal.tasks.optimizer import OptimizerSettings, build_optimizer
from unimodal.tasks.start import Start, StartError
from unimodal.tasks.step import Step
from unimodal.tasks.vocabulary import frequent_tokens
from unimodal.tuning import adapter_of, base_name

Losses = dict[str, Tensor]
# What reads a sharded model: the parameters of no block are whole in these methods of a task.
WHOLE_IN = ("_begin_stage", "training_step", "validation_step", "test_step", "predict_step", "_end", "probe")


class Task(Evaluated):
    """A model in training.

    Args:
        config: the model to build; with `init_from` only what differs from the checkpoint there, and None for the same model.
        objectives: losses by name; their weighted sum is minimised.
        trainable: learning-rate factor by parameter name pattern (last match decides); everything unmatched is frozen. `adapters.NAME`
            means the parameters of an adapter.
        optimizer: optimizer settings.
        evaluation: what validation measures.
        init_from: a checkpoint, or a published model, that the stage starts from: a folder or Hub id. It brings its weights, its
            configuration, its processor and its prompts. Not for resuming: that is `--ckpt_path`.
        pretrained: without `init_from`, start the towers from the sources that `config` names.
        seed: what the randomness of every step follows from.
        mini_batch_size: rows read at a time, so that the memory of a large batch is that of a small one (GradCache,
            arXiv 2101.06983) at the price of a second reading. None reads the whole batch at once.
        gradient_checkpointing: keep only the inputs of every block and run it once more in the backward: less memory, more time.
        compile: let `torch.compile` fuse the blocks of bridge and heads in training; the first steps are slow.

    Raises:
        StartError: `config` differs from the checkpoint in `init_from` in what cannot differ.
        ValueError: there is no objective, or neither a configuration nor a checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        objectives: dict[str, Objective] | None = None,
        trainable: dict[str, float] | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),
        evaluation: EvaluationSettings = EvaluationSettings(),
        init_from: str | None = None,
        pretrained: bool = True,
        seed: int = 0,
        mini_batch_size: int | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(
                f"mini_batch_size: expected at least 1, or None for the whole batch, got {mini_batch_size}"
            )
        if not objectives:
            raise ValueError(
                "a task minimises losses and has none; give objectives, for example itc: {class_path: unimodal.tasks.ITC}"
            )
        self.mini_batch_size, self.gradient_checkpointing = mini_batch_size, gradient_checkpointing
        start = None if init_from is None else Start.open(init_from)
        if start is not None:
            config = start.configuration(config)
        if config is None:
            raise ValueError("a task needs a model: give config, or the checkpoint to start from in init_from")
        torch.manual_seed(seed)  # the first weights, too, follow from the seed
        self.config, self.objectives, self.trainable = config, objectives, trainable or {"*": 1.0}
        self.optimizer, self.settings, self.init_from, self.seed = optimizer, evaluation, init_from, seed
        self.prompts = {} if start is None else start.prompts
        self.start_processor = None if start is None else start.processor_of(config)
        missing = self._build(config, start, pretrained)
        self.factors = stages.rates(self.model, self.trainable)
        if idle := {adapter_of(name) for name, factor in self.factors.items() if factor} - {None, *self.model.active}:
            raise ValueError(
                f"this stage trains adapters that are not in use: {', '.join(map(str, sorted(idle, key=str)))}; make them active in "
                "model.adapters, or give adapters.NAME the factor 0 in trainable"
            )
        if start is not None:
            self._require_trained(missing)
        stages.freeze(self.model, self.factors)
        if compile:
            for part in (self.model.bridge, self.model.heads):
                if part is not None:
                    compile_blocks(part)
        if gradient_checkpointing:
            recompute(self.model)
        self.processor = None
        self.evaluation = None
        self.results = {}

    def _build(self, config: ModelConfig, start: Start | None, pretrained: bool) -> list[str]:
        """Build the model with the weights that it starts from; returns the names of the tensors that the start lacks."""
        known = {name: one for name, one in config.adapters.items() if start and name in start.model.config.adapters}
        self.model = UnimodalModel(replace(config, adapters=known), pretrained=pretrained and start is None)
        missing = list(self.model.state_dict()) if start is None else start.fill(self.model)
        self.new_heads = {name.split(".")[1] for name in missing if name.startswith("heads.")}
        self.new_system = any(name.startswith("system.") for name in missing)
        for name, adapter in config.adapters.items():
            if name not in known:
                self.model.add_adapter(name, adapter)  # now, since some start from the weights that they are put on
        self.model.set_adapter([name for name, adapter in config.adapters.items() if adapter.active])
        self.config = self.model.config
        return missing

    def _require_trained(self, missing: list[str]) -> None:
        """Refuse random numbers that no step of this stage changes."""
        trained = {base_name(name) for name, factor in self.factors.items() if factor}
        untrained = [name for name in missing if name in self.factors and base_name(name) not in trained]
        if untrained:
            parts = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in untrained))
            raise StartError(
                f"init_from {self.init_from}: it lacks {', '.join(parts)} ({len(untrained)} parameters, for example {untrained[0]}), which "
                f"this stage does not train, so they would stay random; give them a factor in trainable ({parts[0] + '*'!r}: 1.0), or "
                "leave them out of config"
            )

    def bind(self, data: Any) -> Processor:
        """Fit the preprocessing of a data module to the model; returns it."""
        self.processor = data.bind(
            self.config, self.model.backbone, self.model.language_captioner, self.start_processor
        )
        if self.config.system is not None:
            self.model.learn_words(words_of(self.processor, known_texts(self.config.system)))
            self.config = self.model.config
        return self.processor

    # Several devices.

    def configure_model(self) -> None:
        """Cut the model among the processes where the strategy asks for it (FSDP2).

        Raises:
            ValueError: if the strategy would also cut single layers.
        """
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) or is_sharded(self):
            return
        assert self.device_mesh is not None
        if self.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "ModelParallelStrategy asks for tensor parallelism, which this model has none of; take the strategy "
                "unimodal.tasks.FSDP2 (configs/trainer/fsdp2.yaml), or set tensor_parallel_size to 1"
            )
        low = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        shard(self, self.device_mesh["data_parallel"], WHOLE_IN, low)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if is_sharded(self) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_gradients([p for p in self.parameters() if p.requires_grad], gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def probe(self, heads: Iterable[str]) -> dict[str, Tensor]:
        """As `stages.probe`, in the precision of the run."""
        with self.trainer.precision_plugin.forward_context():
            return stages.probe(self.model, heads)

    def whole_model(self) -> UnimodalModel:
        """The model in float32; one that is cut among the processes is put together on the first one, and all must ask."""
        if not is_sharded(self):
            return self.model.float()  # whatever it trained in
        state = whole_state(self.model)
        model = self.model
        if self.global_rank == 0:
            model = UnimodalModel(self.config)
            model.load_state_dict(state)
            model.sources = self.model.sources
            model.set_adapter(self.model.active)
            stages.freeze(model, self.factors)
        return model

    # Training.

    def training_forward(self, batch: Batch) -> tuple[Losses, Report]:
        """Losses by objective name (unweighted), and what else is worth logging."""
        if self.mini_batch_size is not None:
            refuse_coupled_rows(self.model.named_modules())
        states = any(objective.states for objective in self.objectives.values())
        step = Step(self.model, batch, self.progress(self.global_step), self.mini_batch_size, states)
        losses: Losses = {}
        report: Report = {}
        for name, objective in self.objectives.items():
            check_batch(batch, objective.keys, f"objective {name!r}")
            losses[name], extra = objective(step)
            report |= {f"{name}/{key}": value for key, value in extra.items()}
        return losses, report

    def progress(self, steps: int) -> float:
        """How far the training is after so many steps, from 0 to 1; by time where only the trainer's `max_time` ends it."""
        if self._trainer is None:
            return 0.0
        total = self.trainer.estimated_stepping_batches
        if math.isfinite(total):
            return min(1.0, steps / max(1, total))
        timer = next((one for one in self.trainer.callbacks if isinstance(one, Timer)), None)  # type: ignore[attr-defined]
        if timer is None or (left := timer.time_remaining()) is None:
            raise ValueError(
                "nothing ends this training, and the learning rate follows how far it is; set max_steps, max_epochs or max_time"
            )
        return min(1.0, timer.time_elapsed() / max(timer.time_elapsed() + left, 1e-9))

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        # Dropout, sampled negatives and noise follow from the number of the batch alone, so a resumed run repeats them.
        number = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + number) * 64 + self.global_rank)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        losses, report = self.training_forward(batch)
        total = torch.stack([self.objectives[name].weight * loss for name, loss in losses.items()]).sum()
        values = [value.detach().float().to(total.device) for value in (*losses.values(), *report.values())]
        # The mean over ranks is the loss on the global batch: see `unimodal.distributed`.
        means = (sum_over_ranks(torch.stack(values)) / world_size()).tolist()
        self.step_losses = dict(zip(losses, means))
        self.step_report = dict(zip(report, means[len(losses) :]))
        if not all(map(math.isfinite, self.step_losses.values())):
            raise FloatingPointError(
                f"step {self.global_step}: losses are not finite: {self.step_losses}; "
                "lower the learning rate or train in float32"
            )
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
        if self.global_step == 0:
            self._begin_stage()
        self.train()  # a run that resumes inside an epoch sees no start of one
        # Counting the steps of `max_epochs` makes the loader before its state is read, and the trainer reads it once.
        self.trainer.fit_loop._load_combined_loader_states()

    def _begin_stage(self) -> None:
        """Let the objectives fit and start what they keep."""
        self.eval()
        for objective in self.objectives.values():
            if self.new_system:
                objective.fit(self.model, self._split_in_order())
            objective.begin(self.model)

    def _split_in_order(self) -> Iterator[Batch]:
        for batch in self.data.mining_dataloader():
            yield self.data.transfer_batch_to_device(batch, self.device, 0)

    def on_train_epoch_start(self) -> None:
        self.train()

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        for objective in self.objectives.values():  # before anybody saves the state of this step
            objective.after_step(self.model)

    def on_train_end(self) -> None:
        for objective in self.objectives.values():
            objective.end(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.factors, self.optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.optimizer.rate(self.progress(step + 1))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def setup(self, stage: str) -> None:
        dealt = self.trainer._accelerator_connector.use_distributed_sampler
        if dealt and self.trainer.world_size > 1 and stage != "predict":
            raise ValueError(
                "trainer.use_distributed_sampler deals a split out among the processes, and every one must read all of it, since its "
                "numbers are about the whole split; set it to false"
            )
        with _rank_zero_first(self.trainer.strategy):
            self._prepare(stage)

    def _prepare(self, stage: str) -> None:
        """What reads whole splits, and may leave it in files that other ranks then find."""
        data = self.data
        if stage == "fit":
            data.require_frozen(self.model.backbone)
        processor = self.bind(data)
        if stage == "fit":
            self.prepare_objectives(data.train)
        captioning = self.config.captioning if "captioning" in self.new_heads else None
        if stage == "fit" and captioning is not None and captioning.vocabulary:
            head = self.model.head("captioning")
            head.set_vocabulary(frequent_tokens(head, processor, data.train, captioning.vocabulary))
        if stage == "fit" and self.config.generation and self.model.head("generation").needs_fit:
            size = self.config.generation.size
            self.model.head("generation").autoencoder.fit(data.targets(min(1000, len(data.train)), size))
        if stage == "fit" and data.hard_neighbours and data.neighbours is None:
            path = Path(self.trainer.default_root_dir) / "neighbours.safetensors"
            data.neighbours = kept_neighbours(self.model, processor, data, path)

    def prepare_objectives(self, pairs: Pairs) -> None:
        """Show the objectives the training split, once there is a processor."""
        assert self.processor is not None
        for objective in self.objectives.values():
            objective.prepare(pairs, self.processor)


@contextmanager
def _rank_zero_first(strategy: Strategy) -> Iterator[None]:
    if not strategy.is_global_zero:
        strategy.barrier()
    yield
    if strategy.is_global_zero:
        strategy.barrier()
