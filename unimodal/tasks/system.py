"""The losses of a published design in one stage of its schedule, as an objective of a training."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from unimodal.data import batch as data
from unimodal.data.batch import image_inputs, text_inputs
from unimodal.heads.system import images_of, texts_of
from unimodal.model import UnimodalModel
from unimodal.sharding import is_sharded
from unimodal.systems import Batch, System
from unimodal.systems.momentum import Teacher
from unimodal.tasks.objective import Objective, Report
from unimodal.tasks.step import Step


class SystemLosses(Objective):
    """The sum of a system's losses. Each rank reads its own items; what a loss compares with, and what a queue keeps, is gathered from all
    ranks, and the first rank draws for the global batch (`unimodal.distributed`).

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
        batch = Batch(images_of(step.image), texts_of(step.text), step.batch["image_id"], step.batch.get("labels"))
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
