"""Captioning: the image-grounded text generation objective (ITG) and the task that trains it alone."""

from typing import Any

from torch import Tensor

from unimodal.config import ModelConfig
from unimodal.data.batch import check_batch
from unimodal.losses import caption_loss
from unimodal.tasks.base import Objective, Report, Step, Task


class ITG(Objective):
    """Next-token cross-entropy of the caption given the image (BLIP-2, arXiv 2301.12597).

    A language model reads `caption`, in its own tokens, in place of `text`; BLIP-2 trains it without label smoothing.

    Args:
        weight: weight in the sum of losses.
        label_smoothing: share of each target spread over the vocabulary.
    """

    keys = ("image",)

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.1) -> None:
        super().__init__(weight)
        self.label_smoothing = label_smoothing

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        own = step.model.language_captioner is not None
        key = "caption" if own else "text"
        check_batch(step.batch, (key, f"{key}_mask"), "objective ITG")
        ids = step.batch["caption"] if own else step.model.start_caption(step.batch["text"])
        mask = step.batch[f"{key}_mask"]
        logits = step.model.caption_logits(step.image, ids, mask)
        targets = step.model.caption_targets(ids)
        return caption_loss(logits, targets, mask, label_smoothing=self.label_smoothing), {}


class Captioning(Task):
    """Trains captions alone."""

    def __init__(self, config: ModelConfig, itg: ITG | None = None, **settings: Any) -> None:
        super().__init__(config, {"itg": itg or ITG()}, **settings)
