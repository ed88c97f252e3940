"""Captioning: objectives that learn from given captions (ITG) or from rewards (SCST), and the task that trains one of them alone."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unimodal.config import ModelConfig
from unimodal.data.batch import check_batch
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.losses import caption_loss, self_critical_loss
from unimodal.metrics import CiderD
from unimodal.tasks.base import Task
from unimodal.tasks.objective import Objective, Report
from unimodal.tasks.step import Step


class ITG(Objective):
    """Next-token cross-entropy of the caption given the image (BLIP-2, arXiv 2301.12597).

    A language model reads `caption`, in its own tokens, in place of `text`; BLIP-2 trains it without label smoothing.

    A decoder learns from its own last words which word is likely next, whatever the image shows. Word dropout (Bowman et al. 2016, arXiv
    1511.06349) hides a share of the words that it reads, so that it has to look them up in the image.

    Args:
        weight: weight in the sum of losses.
        label_smoothing: share of each target spread over the vocabulary.
        word_dropout: share of the words that the decoder reads as its unknown word; what it has to write stays. The share falls linearly
            to 0 at the end of the stage, for captions are written from whole words.
    """

    keys = ("image",)

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.1, word_dropout: float = 0.0) -> None:
        super().__init__(weight)
        if not 0 <= word_dropout < 1:
            raise ValueError(f"ITG: word_dropout is a share of words, at least 0 and below 1, got {word_dropout}")
        self.label_smoothing, self.word_dropout = label_smoothing, word_dropout

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        own = step.model.head("captioning").own_words
        key = "caption" if own else "text"
        check_batch(step.batch, (key, f"{key}_mask"), "objective ITG")
        ids, mask = step.model.start_caption(step.batch[key]), step.batch[f"{key}_mask"]
        targets = step.model.caption_targets(ids)
        if self.word_dropout:
            if own:
                raise ValueError(
                    "ITG: a language model has no unknown word that could stand for a dropped one; set word_dropout to 0"
                )
            hidden = torch.rand(ids.shape, device=ids.device) < self.word_dropout * (1 - step.progress)
            hidden[:, 0] = False  # the start says that a caption begins
            ids = ids.masked_fill(hidden, step.model.head("captioning").unk_id)
        logits = step.model.caption_logits(step.image, ids, mask)
        return caption_loss(logits, targets, mask, label_smoothing=self.label_smoothing), {}


class SCST(Objective):
    """The captioner draws captions of each image and learns to prefer those of higher CIDEr-D than its other draws (self-critical sequence
    training, Rennie et al. 2017, arXiv 1612.00563; Luo 2020, arXiv 2003.09971). For a captioner that can already write: from random
    weights no draw is better than another.

    Draws, made without dropout, are scored against all captions that the training split has of the image, n-grams weighed by how rare
    they are in it.

    Args:
        weight: weight in the sum of losses.
        draws: captions drawn of each image, at least 2.
        max_new_tokens: longest caption in tokens, the end token included.
    """

    keys = ("image", "image_id")

    def __init__(self, weight: float = 1.0, draws: int = 5, max_new_tokens: int = 30) -> None:
        super().__init__(weight)
        if draws < 2:
            raise ValueError(f"SCST: draws is {draws}; each caption is compared with the others, so give at least 2")
        self.draws, self.max_new_tokens = draws, max_new_tokens

    def prepare(self, pairs: Pairs, processor: Processor) -> None:
        self.decode = processor.decode
        self.metric = CiderD([pairs.captions(i) for i in range(len(pairs))])
        self.row = {pairs.image_id(i): i for i in range(len(pairs))}

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        model, ids = step.model, step.batch["image_id"]
        if model.head("captioning").own_words:
            raise ValueError(
                "SCST trains a captioning head of kind 'decoder' or 'bridge', and this model writes by a language model; set "
                "captioning.kind, or learn from given captions (ITG)"
            )
        head, image = model.head("captioning"), step.image
        modes = {module: module.training for part in (head, model.bridge) for module in part.modules()}
        for module in modes:
            module.training = False
        drawn = [model.caption(image, do_sample=True, max_new_tokens=self.max_new_tokens) for _ in range(self.draws)]
        for module, mode in modes.items():  # each its own: what is frozen stays quiet
            module.training = mode
        rows = [self.row[int(i)] for i in ids]
        rewards = [[self.metric.score(self.decode(text), row) for text, row in zip(texts, rows)] for texts in drawn]
        # A caption that was cut has no end to learn.
        texts = [
            torch.tensor([head.bos_id, *text, *([head.eos_id] if len(text) < self.max_new_tokens else [])])
            for text in chain(*drawn)
        ]
        tokens = pad_sequence(texts, batch_first=True).to(ids.device).unflatten(0, (self.draws, len(ids)))  # [K, B, L]
        lengths = torch.tensor([len(text) for text in texts], device=ids.device).view(tokens.shape[:2])
        mask = torch.arange(tokens.shape[2], device=ids.device) < lengths[..., None]
        log_probs = torch.stack([self._log_probs(model, image, *draw) for draw in zip(tokens, mask)], dim=1)
        reward = torch.tensor(rewards, device=ids.device).T / 100  # [B, K]
        return self_critical_loss(log_probs, mask[..., 1:].transpose(0, 1), reward), {"cider_d": reward.mean()}

    @staticmethod
    def _log_probs(model: Any, image: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """What the model gives each next token of captions [B, L]: [B, L - 1]."""
        logits = model.caption_logits(image, ids, mask)[:, :-1].float()
        targets = model.caption_targets(ids)[:, 1:]
        return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


class Captioning(Task):
    """Trains captions alone."""

    def __init__(self, config: ModelConfig | None = None, itg: ITG | SCST | None = None, **settings: Any) -> None:
        super().__init__(config, {"itg": itg or ITG()}, **settings)
