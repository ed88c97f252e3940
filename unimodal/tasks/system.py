"""The losses of a published design in one stage of its schedule, as an objective of a training."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.data import batch as data
from unimodal.data.batch import image_inputs, text_inputs
from unimodal.distributed import alone, gather, gather_with_grad, world_size
from unimodal.heads.system import images_of, texts_of
from unimodal.model import UnimodalModel
from unimodal.sharding import is_sharded
from unimodal.systems import Batch, Images, System, Texts
from unimodal.systems.momentum import Teacher
from unimodal.tasks.base import Objective, Report, Step


class SystemLosses(Objective):
    """The sum of a system's losses on the global batch: each rank reads its own items by the backbone, and the system reads the tokens of
    all of them on every rank, so that a queue, a teacher and a draw of negatives are the same on all, and those of a single process.

    A teacher, a queue and whatever else the system keeps of its training are buffers of the model: a training that resumes has them.

    Args:
        stage: name of the system's stage, as its class names them; a class of one stage ignores the name.
        weight: weight in the sum of losses.
    """

    keys = ("image", "text", "text_mask", "image_id")

    def __init__(self, stage: str = "", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.stage = stage

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        images, texts = images_of(step.image), texts_of(step.text)
        batch = of_all_ranks(Batch(images, texts, step.batch["image_id"], step.batch.get("labels")))
        # All ranks draw alike: negatives, hidden words and dropout are those of the first one.
        seed = int(gather(torch.randint(2**31, (1,), device=batch.image_id.device))[0])
        with torch.random.fork_rng(devices=[batch.image_id.device] if batch.image_id.is_cuda else []):
            torch.manual_seed(seed)
            with alone():
                losses = _system(step.model).losses(batch, self.stage, step.progress)
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}

    def fit(self, model: UnimodalModel, split: Iterable[data.Batch]) -> None:
        _system(model).prepare(_in_order(model, split))

    def begin(self, model: UnimodalModel) -> None:
        """Start the system's stage.

        Raises:
            ValueError: the system has a teacher, a slow copy of its weights, and the weights are cut among the processes (FSDP2).
        """
        parts = list(_system(model).modules())
        if any(map(is_sharded, model.modules())) and any(isinstance(part, Teacher) for part in parts):
            raise ValueError(
                "SystemLosses: this system has a teacher, a slow copy of its weights, which FSDP2 would cut apart from them; train it with "
                "strategy ddp (configs/trainer/ddp.yaml)"
            )
        _system(model).start_stage(self.stage)

    def after_step(self, model: UnimodalModel) -> None:
        _system(model).after_step(self.stage)

    def end(self, model: UnimodalModel) -> None:
        _system(model).end_stage(self.stage)


def of_all_ranks(batch: Batch) -> Batch:
    """The rows of all ranks in rank order, padded to one length; their tokens [B, T, C] with gradient."""
    if world_size() == 1:
        return batch

    def gathered(x: Tensor) -> Tensor:
        return gather_with_grad(x) if x.is_floating_point() else gather(x)

    def padded(x: Tensor) -> Tensor:
        """Rows [B, T, ...] with zeros to the longest T of all ranks."""
        if x.ndim < 2:
            return x
        longest = int(gather(torch.tensor([x.shape[1]], device=x.device)).max())
        return F.pad(x, (*[0, 0] * (x.ndim - 2), 0, longest - x.shape[1]))

    images = Images(*(gathered(padded(part)) for part in batch.images[:2]))
    texts = Texts(*(gathered(padded(part)) for part in batch.texts))
    return Batch(images, texts, gather(batch.image_id), None if batch.labels is None else gather(batch.labels))


@torch.no_grad()
def _in_order(model: UnimodalModel, split: Iterable[data.Batch]) -> Iterator[Batch]:
    """A split as a system reads it: a row for each caption, with its image."""
    for batch in split:
        image, text = model.encode_image(**image_inputs(batch)), model.encode_text(**text_inputs(batch))
        rows = (batch["text_image_id"][:, None] == batch["image_id"][None]).long().argmax(1)
        yield Batch(images_of(image).select(rows), texts_of(text), batch["text_image_id"])


def _system(model: UnimodalModel) -> System:
    if model.system is None:
        raise ValueError(
            "SystemLosses minimises the losses of a published design, and this model has none; name one in model.config.system, or take "
            "other objectives"
        )
    return model.system
