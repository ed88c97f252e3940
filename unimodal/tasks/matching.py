"""Matching: the objectives of the matching head, pair by pair (ITM) or by lists (LCE), and the task that trains it alone."""

from typing import Any

import torch
from torch import Tensor

from unimodal.config import ModelConfig
from unimodal.losses import listwise_loss, matching_loss, sample_hard_negatives
from unimodal.retrieval import similarity
from unimodal.tasks.base import Task
from unimodal.tasks.objective import Objective, Report
from unimodal.tasks.step import Step


class ITM(Objective):
    """Does this text describe this image? One true pair and hard negatives per image (ALBEF, arXiv 2107.07651; BLIP-2, arXiv 2301.12597).

    Negatives are drawn from the rank's own batch by softmax(hardness * scale * cosine), never of the same image: one text for each image
    and one image for each text; and the batch's own wrong items, where it has them: false captions (`negative_text`) of the reader or
    mined ones, and mined pictures (`negative_image`). The hardness rises linearly over the first part of the stage, since negatives drawn
    by an embedding that already fits the training set teach nothing at first.

    Args:
        weight: weight in the sum of losses.
        hardness: exponent of the draw at the end of the ramp; 0 draws uniformly.
        ramp: share of the stage over which the hardness rises from 0.
        false_captions: also use the batch's own wrong items.
    """

    keys = ("image", "text", "text_mask", "image_id")

    def __init__(
        self, weight: float = 1.0, hardness: float = 1.0, ramp: float = 0.3, false_captions: bool = True
    ) -> None:
        super().__init__(weight)
        self.hardness, self.ramp, self.false_captions = hardness, ramp, false_captions

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        model, ids = step.model, step.batch["image_id"]
        hardness = self.hardness * (min(1.0, step.progress / self.ramp) if self.ramp else 1.0)
        # Read with gradient, even if first asked for here: other objectives share these reads.
        image_embedding, text_embedding = step.image_embedding, step.text_embedding
        with torch.no_grad():
            scores = hardness * model.scale * similarity(image_embedding, text_embedding)
            wrong_text, wrong_image = sample_hard_negatives(scores, ids, ids)
        rows = torch.arange(len(ids), device=ids.device)
        image, text = step.image, step.text
        image_index = [rows, rows, wrong_image]
        text_index = [rows, wrong_text, rows]
        if self.false_captions and (given := step.negative_text_given) is not None and given.any():  # [B, K]
            text = text.append(step.negative_text)
            image_index.append(given.nonzero()[:, 0])
            text_index.append(torch.arange(len(ids), len(text.ids), device=ids.device))
        if self.false_captions and (given := step.negative_image_given) is not None and given.any():
            image = image.append(step.negative_image)
            image_index.append(torch.arange(len(ids), len(image.tokens), device=ids.device))
            text_index.append(given.nonzero()[:, 0])
        pairs = torch.cat(image_index)
        logits = model.match(image, text, pairs, torch.cat(text_index))
        labels = (torch.arange(len(pairs), device=ids.device) < len(ids)).long()
        correct = (logits.detach() > 0).long() == labels
        # Balanced: two negatives per positive make 2/3 of "always no" right.
        balanced = (correct[labels == 1].float().mean() + correct[labels == 0].float().mean()) / 2
        return matching_loss(logits, labels), {"balanced_accuracy": balanced}


class LCE(Objective):
    """The true item must score highest among hard negatives, as in the search whose results are reranked (localized contrastive
    estimation, Gao et al. 2021, arXiv 2101.08751).

    Every image is a query for its text and every text one for its image. Negatives are drawn from the rank's own batch, as `ITM` draws
    them.

    Args:
        weight: weight in the sum of losses.
        candidates: negatives of each query.
        hardness: exponent of the draw at the end of the ramp; 0 draws uniformly.
        ramp: share of the stage over which the hardness rises from 0.
    """

    keys = ("image", "text", "text_mask", "image_id")

    def __init__(self, weight: float = 1.0, candidates: int = 3, hardness: float = 1.0, ramp: float = 0.3) -> None:
        super().__init__(weight)
        if candidates < 1:
            raise ValueError(f"LCE: candidates must be at least 1, got {candidates}")
        self.candidates, self.hardness, self.ramp = candidates, hardness, ramp

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        model, ids = step.model, step.batch["image_id"]
        hardness = self.hardness * (min(1.0, step.progress / self.ramp) if self.ramp else 1.0)
        image_embedding, text_embedding = step.image_embedding, step.text_embedding  # with gradient, as in ITM
        with torch.no_grad():
            scores = hardness * model.scale * similarity(image_embedding, text_embedding)
            wrong_text, wrong_image = sample_hard_negatives(scores, ids, ids, count=self.candidates)  # [B, K]
        rows = torch.arange(len(ids), device=ids.device)
        each = rows.repeat_interleave(self.candidates)
        logits = model.match(
            step.image,
            step.text,
            torch.cat([rows, each, wrong_image.flatten()]),
            torch.cat([rows, wrong_text.flatten(), each]),
        )
        own, of_images, of_texts = logits.split([len(rows), len(each), len(each)])
        queries = [torch.cat([own[:, None], wrong.view(len(rows), -1)], 1) for wrong in (of_images, of_texts)]
        lists = torch.cat(queries)  # [2B, 1 + K]
        first = (lists.detach()[:, 1:] < lists.detach()[:, :1]).all(1).float().mean()
        return listwise_loss(lists), {"first": first}


class Matching(Task):
    """Trains the match score alone."""

    def __init__(self, config: ModelConfig | None = None, itm: ITM | LCE | None = None, **settings: Any) -> None:
        super().__init__(config, {"itm": itm or ITM()}, **settings)
