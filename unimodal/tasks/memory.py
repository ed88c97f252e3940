"""How much memory a stage will take, measured on a few rows before it trains.

A training step is run for real on batches of a few rows, and every tensor that is alive is counted. Activations grow in
proportion to the rows, and with `mini_batch_size` to the rows of a chunk and to those of the batch, each at its own rate;
so few rows tell of many. Left out is what grows with the square of the batch, the similarities of a contrast: some 5 to 30
bytes for each pair of the global batch. Weights, gradients and optimizer states are counted, not measured.
"""

import math
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unimodal.blocks import blocks
from unimodal.data.batch import Batch
from unimodal.data.module import EvaluationBatches, PairData
from unimodal.tasks.base import Task
from unimodal.tasks.evaluation import Evaluation
from unimodal.tasks.optimizer import HiddenMuon, build_optimizer

ROWS = 8  # of the larger batch that is run
CAPTIONS = 200  # images whose captions tell how long a large batch is padded


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes on each device in training.

    Attributes:
        whole: parameters and buffers of the whole model.
        weights: what each device has of them.
        gradients: of what trains.
        optimizer: its states.
        exchange: what data parallelism adds: DDP's buckets, or the blocks that FSDP2 has whole at a time.
        fixed: activations that do not depend on the batch.
        per_row: activations of one more row.
        batch_size: rows per step and device.
        evaluation: what an evaluation keeps of the whole split, beside the weights.
        unreached: parameters that train and that no loss reaches.
    """

    whole: int
    weights: int
    gradients: int
    optimizer: int
    exchange: int
    fixed: int
    per_row: int
    batch_size: int
    evaluation: int
    unreached: tuple[str, ...]

    @property
    def states(self) -> int:
        """All but activations."""
        return self.weights + self.gradients + self.optimizer + self.exchange

    @property
    def activations(self) -> int:
        """Of a step."""
        return self.fixed + self.per_row * self.batch_size

    @property
    def total(self) -> int:
        """At the worst moment of a step."""
        return self.states + self.activations

    def rows_within(self, free: int) -> int:
        """The largest batch of which all fits; 0 or less for none."""
        return (free - self.states - self.fixed) // max(1, self.per_row)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live.

    Args:
        known: tensors that are there already, and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.gradients = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now - self.gradients)  # gradients have a line of their own
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def keep(self, parameter: Tensor) -> None:
        """The gradient of this parameter is there now."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes


def forecast(
    task: Task,
    data: PairData,
    *,
    precision: str = "32-true",
    devices: int = 1,
    strategy: Literal["single", "ddp", "fsdp2"] = "single",
    averages: bool = False,
) -> Forecast:
    """Measure a task on a few rows of its training data, on the CPU.

    Args:
        task: whole, on the CPU.
        data: bound to its model, without a feature cache.
        precision: as the trainer has it.
        devices: of all nodes together.
        strategy: how they share the work.
        averages: whether an `EMA` of the weights runs along.
    """
    assert data.train is not None
    task.prepare_objectives(data.train)
    task.train()
    size = 2 if precision == "bf16-true" else 4
    weights = whole = sum(t.numel() * (size if t.is_floating_point() else t.element_size()) for t in _tensors(task))
    trained = {p: p.numel() * size for p in task.model.parameters() if p.requires_grad}
    gradients = sum(trained.values())
    parts = build_optimizer(task.model, task.factors, task.optimizer).parts  # type: ignore[attr-defined]
    states = {
        p: 1 if isinstance(part, HiddenMuon) else 2 for part in parts for g in part.param_groups for p in g["params"]
    }
    optimizer = sum(trained[p] * count for p, count in states.items()) + averages * gradients
    exchange = gradients if strategy == "ddp" else 0
    if strategy == "fsdp2":
        weights, gradients, optimizer = (-(-x // devices) for x in (weights, gradients, optimizer))
        exchange = _whole_at_a_time(task, size)
    fixed, per_row, unreached = _activations(task, data, torch.bfloat16 if precision.startswith("bf16") else None)
    return Forecast(
        whole=whole,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        exchange=exchange,
        fixed=max(0, round(fixed)),
        per_row=round(per_row),
        batch_size=data.batch_size,
        evaluation=_evaluation(task, data),
        unreached=unreached,
    )


def _tensors(task: Task) -> list[Tensor]:
    return [*task.model.parameters(), *task.model.buffers()]


def _whole_at_a_time(task: Task, size: int) -> int:
    """Weights and gradients of what belongs to no block, and of two blocks: one runs while the next is fetched."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(task.model)]
    outside = sum(p.numel() for p in task.model.parameters()) - sum(sizes)
    return 2 * size * (outside + 2 * max(sizes, default=0))


def _activations(task: Task, data: PairData, low: torch.dtype | None) -> tuple[float, float, tuple[str, ...]]:
    """Bytes that a step takes whatever its batch, bytes per row, and what no loss reaches."""
    most, chunk = min(ROWS, data.batch_size), task.mini_batch_size
    few = max(1, most // 2)
    batch = _batch(task, data, most)
    used, unreached = _step(task, batch, most, low)
    if few == most:
        return 0.0, used, unreached
    if chunk is None or chunk >= data.batch_size:
        per_row = (used - _step(task, batch, few, low)[0]) / (most - few)
        return used - per_row * most, per_row, unreached
    try:
        task.mini_batch_size = max(1, few // 2)
        small = _step(task, batch, most, low)[0]
        per_row = (small - _step(task, batch, few, low)[0]) / (most - few)
        task.mini_batch_size = few
        per_chunk_row = (_step(task, batch, most, low)[0] - small) / max(1, few - few // 2)
    finally:
        task.mini_batch_size = chunk
    return small + per_chunk_row * (chunk - max(1, few // 2)) - per_row * most, per_row, unreached


def _batch(task: Task, data: PairData, rows: int) -> Batch:
    """Training rows whose texts are padded as in a large batch: to the longest of many captions."""
    loader = data.train_dataloader()
    batch = loader.samples.collate([loader.samples[key] for key in loader.plan()[0][:rows]])
    pairs = loader.samples.pairs
    captions = [caption for i in range(min(len(pairs), CAPTIONS)) for caption in pairs.captions(i)]
    assert task.processor is not None
    longest = task.processor.texts(captions)[0].shape[1]
    longer = longest / batch["text"].shape[-1] if "text" in batch else 1.0
    for key in ("text", "text_mask", "negative_text", "negative_mask", "caption", "caption_mask"):
        if key in batch:
            length = batch[key].shape[-1]
            batch[key] = F.pad(batch[key], (0, max(0, math.ceil(length * longer) - length)))
    return batch


def _step(task: Task, batch: Batch, rows: int, low: torch.dtype | None) -> tuple[int, tuple[str, ...]]:
    """Most bytes alive at once in a step on the first rows of a batch, gradients apart; and what the losses do not reach."""
    part = {key: _first(value, rows) for key, value in batch.items()}
    live = LiveTensors([*_tensors(task), *(t for t in tree_leaves(part) if isinstance(t, Tensor))])
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    hooks = [p.register_post_accumulate_grad_hook(live.keep) for p in trained.values()]
    low_precision = nullcontext() if low is None else torch.autocast("cpu", low)
    with live:
        with low_precision:
            losses, _ = task.training_forward(part)
            total = torch.stack([task.objectives[name].weight * loss for name, loss in losses.items()]).sum()
        total.backward()
    unreached = tuple(name for name, p in trained.items() if p.grad is None)
    for hook in hooks:
        hook.remove()
    task.zero_grad(set_to_none=True)
    return live.most + sum(t.nbytes for t in tree_leaves(part) if isinstance(t, Tensor)), unreached


def _first(value: Any, rows: int) -> Any:
    return {key: part[:rows] for key, part in value.items()} if isinstance(value, dict) else value[:rows]


def _evaluation(task: Task, data: PairData, rows: int = 4) -> int:
    """Bytes of the states of the whole validation split, which are held twice while they are put together."""
    if data.val is None:
        return 0
    assert task.processor is not None
    rows = min(rows, len(data.val))
    evaluation = Evaluation(task.model.eval(), task.processor, data.val, task.settings)
    evaluation.add(EvaluationBatches(data.val, task.processor, [list(range(rows))], None)[0])
    held = tree_leaves([evaluation.images, evaluation.pairwise.held if evaluation.pairwise else []])
    states = {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)}  # captions and pairs read the same
    return 2 * sum(tensor.nbytes for tensor in states.values()) * len(data.val) // rows
