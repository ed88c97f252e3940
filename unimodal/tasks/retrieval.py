"""Retrieval: the image-text contrastive objective (ITC) and the task that trains it alone."""

from functools import partial
from typing import Any

from torch import Tensor

from unimodal.config import ModelConfig
from unimodal.losses import info_nce, matryoshka
from unimodal.tasks.base import Objective, Report, Step, Task


class ITC(Objective):
    """Multi-positive InfoNCE between image and text embeddings (CLIP, arXiv 2103.00020; multi-positive as in ALBEF, arXiv 2107.07651).

    Args:
        weight: weight in the sum of losses.
        label_smoothing: share of each target spread over the batch.
        matryoshka: also train the prefix widths that the model's configuration names (arXiv 2205.13147).
    """

    keys = ("image", "text", "text_mask", "image_id")

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0, matryoshka: bool = False) -> None:
        super().__init__(weight)
        self.label_smoothing, self.matryoshka = label_smoothing, matryoshka

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        loss_fn = partial(
            info_nce, image_id=step.batch["image_id"], scale=step.model.scale, label_smoothing=self.label_smoothing
        )
        image, text = step.image_embedding, step.text_embedding
        if self.matryoshka:
            embedding = step.model.config.embedding
            loss = matryoshka(loss_fn, image, text, dims=(*embedding.matryoshka, embedding.dim))
        else:
            loss = loss_fn(image, text)
        return loss, {"scale": step.model.scale.detach()}


class Retrieval(Task):
    """Trains the retrieval embedding alone."""

    def __init__(self, config: ModelConfig, itc: ITC | None = None, **settings: Any) -> None:
        super().__init__(config, {"itc": itc or ITC()}, **settings)
