"""Generation: the flow-matching objective on bridged queries, what prepares the queries for it, and the task that trains it alone."""

from typing import Any

import torch
from torch import Tensor

from unimodal.config import ModelConfig
from unimodal.diffusion import flow_path, sample_t
from unimodal.losses import conditioning_loss, flow_matching_loss
from unimodal.tasks.base import Task
from unimodal.tasks.objective import Objective, Report
from unimodal.tasks.step import Step


class Flow(Objective):
    """Flow matching of the pictures, conditioned on generation queries that take over from the caption's tokens step by step.

    The share p of positions that hold a query instead of a caption token rises linearly to 1 over the first `handover` of the stage (the
    curriculum of OmniBridge, arXiv 2509.19018, section on semantic-guided replacement, on a linear schedule).

    Args:
        weight: weight in the sum of losses.
        handover: share of the stage after which the queries stand alone.
        noise: mean of the logit of t; above 0 trains more on noisy pictures, where the layout is decided.
    """

    keys = ("text", "text_mask", "target")

    def __init__(self, weight: float = 1.0, handover: float = 0.4, noise: float = 0.0) -> None:
        super().__init__(weight)
        self.handover, self.noise = handover, noise

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        head = step.model.head("generation")
        replaced = min(1.0, step.progress / self.handover) if self.handover else 1.0
        condition = step.model.generation_condition(step.text, replaced)
        clean = head.encode(step.batch["target"])
        noise = torch.randn_like(clean)
        t = sample_t(len(clean), mean=self.noise, device=clean.device)
        x_t, velocity = flow_path(clean, noise, t)
        return flow_matching_loss(head(x_t, t, condition), velocity), {"replaced": torch.tensor(replaced)}


class Conditioning(Objective):
    """The generation queries read a caption and foresee what the image queries will read in its picture: regression, token by token.

    A generator that is later conditioned on them meets objects in their places instead of words in their order. OmniBridge regresses its
    generation queries onto a text encoder's states (arXiv 2509.19018), unCLIP's prior regresses text onto an image embedding (arXiv
    2204.06125); here the target is the bridge's own reading of the image, which takes no gradient. A random share of the queries is
    replaced by the caption's tokens, as in `Flow`'s handover.
    """

    keys = ("image", "text", "text_mask")

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        target = step.image.bridged.detach()  # [B, N, W]
        condition = step.model.generation_condition(step.text, float(torch.rand(())))
        if condition.shape != target.shape:
            raise ValueError(
                f"Conditioning needs as many generation queries as image queries, got {condition.shape[1]} and {target.shape[1]}; "
                "set bridge.queries.generate to the number of bridge.queries.image"
            )
        real = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
        return conditioning_loss(condition, target, real), {}


class Generation(Task):
    """Trains picture generation alone."""

    def __init__(self, config: ModelConfig | None = None, flow: Flow | None = None, **settings: Any) -> None:
        super().__init__(config, {"flow": flow or Flow()}, **settings)
