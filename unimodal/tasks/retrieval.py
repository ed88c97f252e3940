"""Retrieval: objectives that train the embeddings, by contrast or after a reranker, and the task that trains one of them alone."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from unimodal.config import ModelConfig
from unimodal.losses import Wrong, distillation_loss, info_nce, masked_info_nce, matryoshka, quantised, sigmoid_loss
from unimodal.retrieval import row_similarity
from unimodal.tasks.base import Task
from unimodal.tasks.objective import Objective, Report
from unimodal.tasks.step import Step


class EmbeddingObjective(Objective):
    """A loss on image and text embeddings, and on what becomes of them: prefixes, int8 codes, single bits.

    Args:
        weight: weight in the sum of losses.
        matryoshka: also on the prefix widths that the model's configuration names (arXiv 2205.13147).
        quantise: also on int8 and binary embeddings (LSQ, arXiv 1902.08153); the model needs `embedding.quantise`.
        negatives: also against the batch's own wrong items, false captions and mined ones.
    """

    keys: tuple[str, ...] = ("image", "text", "text_mask", "image_id")
    states = False

    def __init__(
        self, weight: float = 1.0, matryoshka: bool = False, quantise: bool = False, negatives: bool = False
    ) -> None:
        super().__init__(weight)
        self.matryoshka, self.quantise, self.negatives = matryoshka, quantise, negatives

    def bind(self, step: Step) -> Callable[..., Tensor]:
        """The loss of this step's batch, as a function of (image, text, wrong_text, wrong_image), in whatever form they are."""
        raise NotImplementedError(f"{type(self).__name__} has no loss; implement bind(step)")

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        wrong = {"wrong_text": step.wrong_text, "wrong_image": step.wrong_image} if self.negatives else {}
        given = {name: items.given for name, items in wrong.items() if items is not None}
        embeddings = [step.image_embedding, step.text_embedding]
        embeddings += [items.embedding for items in wrong.values() if items is not None]
        loss = self.bind(step)  # after the embeddings are read, with gradient: it may use the same states without

        def loss_fn(image: Tensor, text: Tensor, *others: Tensor) -> Tensor:
            return loss(
                image, text, **{name: Wrong(x, mask) for x, (name, mask) in zip(others, given.items(), strict=True)}
            )

        form = partial(quantised, loss_fn, step=step.model.step) if self.quantise else loss_fn
        if self.matryoshka:
            embedding = step.model.embedding
            value = matryoshka(form, *embeddings, dims=(*embedding.matryoshka, embedding.dim))
        else:
            value = form(*embeddings)
        return value, {"scale": step.model.scale.detach()}


class ITC(EmbeddingObjective):
    """Multi-positive InfoNCE between image and text embeddings (CLIP, arXiv 2103.00020; multi-positive as in ALBEF, arXiv 2107.07651).

    Args:
        weight: weight in the sum of losses.
        label_smoothing: share of each target spread over the batch.
        matryoshka: also train the prefix widths that the model's configuration names (arXiv 2205.13147).
        quantise: also train int8 and binary embeddings (LSQ, arXiv 1902.08153); the model needs `embedding.quantise`.
        negatives: also tell each picture from its false captions, and each caption from its mined pictures.
    """

    def __init__(
        self,
        weight: float = 1.0,
        label_smoothing: float = 0.0,
        matryoshka: bool = False,
        quantise: bool = False,
        negatives: bool = False,
    ) -> None:
        super().__init__(weight, matryoshka, quantise, negatives)
        self.label_smoothing = label_smoothing

    def bind(self, step: Step) -> Callable[..., Tensor]:
        return partial(
            info_nce,
            image_id=step.batch["image_id"],
            scale=step.model.scale,
            label_smoothing=self.label_smoothing,
            rows=step.mini_batch_size,
        )


class SigmoidITC(EmbeddingObjective):
    """Multi-positive sigmoid loss between image and text embeddings (SigLIP, arXiv 2303.15343); the model needs `embedding.bias`."""

    def bind(self, step: Step) -> Callable[..., Tensor]:
        return partial(
            sigmoid_loss,
            image_id=step.batch["image_id"],
            scale=step.model.scale,
            bias=step.model.bias,
            rows=step.mini_batch_size,
        )


class MaskedITC(EmbeddingObjective):
    """Contrast without likely false negatives, each caption a query for its picture and each picture one for its caption
    (Qwen3-VL-Embedding, arXiv 2601.04720).

    Args:
        weight: weight in the sum of losses.
        margin: a negative this much more similar than the positive is left out.
        within: also push pictures from pictures and captions from captions: the first stage, not the later ones.
        matryoshka: also on the prefix widths that the model's configuration names.
        quantise: also on int8 and binary embeddings; the model needs `embedding.quantise`.
        negatives: also against the batch's own wrong items, false captions and mined ones.
    """

    def __init__(
        self,
        weight: float = 1.0,
        margin: float = 0.1,
        within: bool = False,
        matryoshka: bool = False,
        quantise: bool = False,
        negatives: bool = False,
    ) -> None:
        super().__init__(weight, matryoshka, quantise, negatives)
        self.margin, self.within = margin, within

    def bind(self, step: Step) -> Callable[..., Tensor]:
        contrast = partial(
            masked_info_nce,
            ids=step.batch["image_id"],
            scale=step.model.scale,
            margin=self.margin,
            within=self.within,
        )

        def both_ways(
            image: Tensor, text: Tensor, wrong_text: Wrong | None = None, wrong_image: Wrong | None = None
        ) -> Tensor:
            return (contrast(text, image, wrong=wrong_image) + contrast(image, text, wrong=wrong_text)) / 2

        return both_ways


class Distillation(EmbeddingObjective):
    """The embedding learns to order hard negatives as the matching head does (Qwen3-VL-Embedding, arXiv 2601.04720).

    A picture's candidates are its caption and its false captions, a caption's its picture and its mined pictures; no
    gradient reaches the teacher. `teacher` says where its logits come from: `head` computes them in every step, and stays
    the same teacher only while nothing that the matching head reads trains; `file` takes those that the mined file holds.

    Args:
        weight: weight in the sum of losses.
        teacher: the model's own matching head as it is, or the logits that mining stored.
        temperature: divides the teacher's logits.
        matryoshka: also on the prefix widths that the model's configuration names.
        quantise: also on int8 and binary embeddings; the model needs `embedding.quantise`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        teacher: Literal["head", "file"] = "head",
        temperature: float = 1.0,
        matryoshka: bool = False,
        quantise: bool = False,
    ) -> None:
        super().__init__(weight, matryoshka, quantise, negatives=True)
        self.teacher, self.temperature = teacher, temperature
        self.states = teacher == "head"
        if teacher == "file":
            self.keys = (*self.keys, "match_logit")

    def bind(self, step: Step) -> Callable[..., Tensor]:
        if step.negative_text_given is None and step.negative_image_given is None:
            raise ValueError(
                "distillation orders hard negatives and the batch has none; mine some (unimodal mine) and name the file "
                "in data.negatives"
            )
        texts, images = self._from_file(step) if self.teacher == "file" else self._from_head(step)

        def loss(
            image: Tensor, text: Tensor, wrong_text: Wrong | None = None, wrong_image: Wrong | None = None
        ) -> Tensor:
            losses = []
            for query, own, wrong, teacher in ((image, text, wrong_text, texts), (text, image, wrong_image, images)):
                if wrong is not None:
                    candidates = torch.cat([own[:, None], wrong.embedding], dim=1)  # [B, 1 + K, E]
                    logits = step.model.scale * row_similarity(query, candidates)
                    known = teacher.isfinite()  # nothing is known of a place without an item
                    losses.append(distillation_loss(logits, teacher, known, temperature=self.temperature))
            return torch.stack(losses).mean()

        return loss

    @torch.no_grad()
    def _from_head(self, step: Step) -> tuple[Tensor, Tensor]:
        """Logits [B, 1 + K] of each picture with its texts, and of each text with its pictures; NaN where there is no item."""
        model, count = step.model, len(step.batch["image_id"])
        was_training = model.heads["matching"].training if "matching" in model.heads else False
        model.head("matching").eval()
        rows = torch.arange(count, device=step.text.ids.device)
        own = model.match(step.image, step.text, rows, rows).float()[:, None]  # [B, 1]
        texts = images = own
        if (given := step.negative_text_given) is not None:
            texts = torch.cat([own, own.new_full(given.shape, torch.nan)], dim=1)
            if given.any():
                state, row = step.negative_text, given.nonzero()[:, 0]
                texts[:, 1:][given] = model.match(
                    step.image, state, row, torch.arange(len(row), device=row.device)
                ).float()
        if (given := step.negative_image_given) is not None:
            images = torch.cat([own, own.new_full(given.shape, torch.nan)], dim=1)
            if given.any():
                pictures, row = step.negative_image, given.nonzero()[:, 0]
                column = torch.arange(len(row), device=row.device)
                images[:, 1:][given] = model.match(pictures, step.text, column, row).float()
        model.head("matching").train(was_training)
        return texts, images

    def _from_file(self, step: Step) -> tuple[Tensor, Tensor]:
        own = step.batch["match_logit"][:, None]
        return tuple(  # type: ignore[return-value]
            torch.cat([own, step.batch[key]], dim=1) if key in step.batch else own
            for key in ("negative_text_logit", "negative_image_logit")
        )


class Retrieval(Task):
    """Trains the retrieval embedding alone."""

    def __init__(
        self, config: ModelConfig | None = None, itc: EmbeddingObjective | None = None, **settings: Any
    ) -> None:
        super().__init__(config, {"itc": itc or ITC()}, **settings)
