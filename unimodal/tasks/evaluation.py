"""What validation measures, on a whole split, under protocols: every head that the model has, scored by judges outside the model.

Retrieval is scored twice, by the embedding alone and after the matching head has reranked its top k. On scenes the captions are parsed back
to symbols, swapped captions are ranked against true ones, and generated pictures are judged by a checker that reads pixels.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unimodal.candidates import best_captions
from unimodal.data.batch import Batch
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.data.scenes import Scenes, caption_matches, checker_arguments, parse_caption
from unimodal.metrics import Candidates, Protocol, RetrievalMetrics, caption_metrics, first_stage, rerank, summarise
from unimodal.metrics.generation import check_picture
from unimodal.model import ImageState, TextState, UnimodalModel


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured, and how.

    Args:
        rerank_k: candidates per query that the matching head scores.
        combine: whether its score replaces the embedding's or is added to it.
        match_scale: what the match logit is multiplied by before it is added to a cosine: under `sum`, and to choose a caption.
        captions: images to caption, from the start of the split; 0 for none.
        num_beams: beams of the captions.
        candidates: captions written per image, of which the embedding and matching heads choose one; see `unimodal.candidates`.
        pictures: pictures to generate, for the first caption of as many images; 0 for none.
        steps: sampling steps of a picture.
        guidance_scale: classifier-free guidance of a picture.
        pairs_per_batch: pairs that the matching head scores at a time.
    """

    rerank_k: int = 16
    combine: Literal["replace", "sum"] = "replace"
    match_scale: float = 1.0
    captions: int = 200
    num_beams: int = 1
    candidates: int = 1
    pictures: int = 64
    steps: int = 20
    guidance_scale: float = 2.0
    pairs_per_batch: int = 1024


def _pad(parts: list[Tensor], length: int) -> Tensor:
    """Concatenate [n, L, ...] of different L, padded with zeros to `length`."""
    return torch.cat([torch.nn.functional.pad(p, (*[0, 0] * (p.ndim - 2), 0, length - p.shape[1])) for p in parts])


class Evaluation:
    """Collects a split batch by batch (`add`), then scores it (`results`)."""

    def __init__(self, model: UnimodalModel, processor: Processor, pairs: Pairs, settings: EvaluationSettings) -> None:
        self.model, self.processor, self.pairs, self.settings = model, processor, pairs, settings
        self.images: list[ImageState] = []
        self.texts: list[TextState] = []
        self.image_embeddings: list[Tensor] = []
        self.text_embeddings: list[Tensor] = []
        self.image_ids: list[Tensor] = []
        self.text_image_ids: list[Tensor] = []

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Read one batch of pictures with all their captions."""
        image = self.model.encode_image(batch.get("image"), features=batch.get("image_features"))
        text = self.model.encode_text(batch["text"], batch["text_mask"])
        self.image_embeddings.append(self.model.image_embedding(image).float())
        self.text_embeddings.append(self.model.text_embedding(text).float())
        self.images.append(image)
        self.texts.append(text)
        self.image_ids.append(batch["image_id"])
        self.text_image_ids.append(batch["text_image_id"])

    @torch.no_grad()
    def results(self) -> dict[str, Any]:
        """Everything measured: metric objects by name, and the rows that a report shows."""
        longest = max(text.ids.shape[1] for text in self.texts)
        self.text = TextState(
            _pad([text.ids for text in self.texts], longest),
            _pad([text.mask for text in self.texts], longest),
            _pad([text.tokens for text in self.texts], longest),
            torch.cat([text.bridged for text in self.texts]),
        )
        self.image = ImageState(
            torch.cat([image.tokens for image in self.images]),
            torch.cat([image.mask for image in self.images]),
            torch.cat([image.bridged for image in self.images]),
        )
        out: dict[str, Any] = self._retrieval()
        if isinstance(self.pairs, Scenes):
            out |= self._swaps(self.pairs)
        if "captioning" in self.model.heads and self.settings.captions:
            out |= self._captions()
        if "generation" in self.model.heads and self.settings.pictures and isinstance(self.pairs, Scenes):
            out |= self._pictures(self.pairs)
        return out

    def numbers(self, results: dict[str, Any]) -> dict[str, float]:
        """The headline numbers of `results`, all between 0 and 1 except CIDEr-D (1 = 100 points)."""
        out: dict[str, float] = {}
        for stage in ("first", "reranked"):
            metrics: RetrievalMetrics | None = results.get(f"retrieval_{stage}")
            if metrics is not None:
                out[f"t2i_r1_{stage}"] = metrics.text_to_image.r1 / 100
                out[f"i2t_r1_{stage}"] = metrics.image_to_text.r1 / 100
        if "captions" in results:
            out["cider_d"] = results["captions"].cider_d / 100
            out["bleu_4"] = results["captions"].bleu_4 / 100
        names = (
            "swap_accuracy_embed",
            "swap_accuracy_match",
            "caption_exact_attributes",
            "generation_attribute_accuracy",
        )
        return out | {name: results[name] for name in names if name in results}

    def protocol(self) -> Protocol:
        """Protocol of the whole split, first stage."""
        counts = {len(self.pairs.captions(i)) for i in range(len(self.pairs))}
        return Protocol(
            dataset=self.pairs.name,
            split=self.pairs.split,
            fingerprint=self.pairs.fingerprint(),
            images=len(self.pairs),
            captions=sum(len(self.pairs.captions(i)) for i in range(len(self.pairs))),
            captions_per_image=counts.pop() if len(counts) == 1 else None,
        )

    # Retrieval, first stage and reranked.

    def match_pairs(self, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Match logits [P] of rows of this split."""
        size = self.settings.pairs_per_batch
        parts = []
        for start in range(0, len(image_rows), size):
            images, image_index = image_rows[start : start + size].unique(return_inverse=True)
            texts, text_index = text_rows[start : start + size].unique(return_inverse=True)
            parts.append(
                self.model.match(self.image.select(images), self.text.select(texts), image_index, text_index).float()
            )
        return torch.cat(parts)

    def _retrieval(self) -> dict[str, Any]:
        image, text = torch.cat(self.image_embeddings), torch.cat(self.text_embeddings)
        image_id, text_image_id = torch.cat(self.image_ids), torch.cat(self.text_image_ids)
        k = self.settings.rerank_k if "matching" in self.model.heads else 0
        t2i, i2t = first_stage(image, text, text_image_id, image_id=image_id, k=k)
        protocol = self.protocol()
        out: dict[str, Any] = {"retrieval_first": summarise(t2i.rank, i2t.rank, protocol)}
        if not k:
            return out
        rows = torch.arange(len(t2i.index), device=t2i.index.device)[:, None].expand_as(t2i.index)
        t2i_scores = self.match_pairs(t2i.index.flatten(), rows.flatten()).view_as(t2i.scores)
        rows = torch.arange(len(i2t.index), device=i2t.index.device)[:, None].expand_as(i2t.index)
        i2t_scores = self.match_pairs(rows.flatten(), i2t.index.flatten()).view_as(i2t.scores)
        ranks = [self._rerank(c, s) for c, s in ((t2i, t2i_scores), (i2t, i2t_scores))]
        out["retrieval_reranked"] = summarise(
            ranks[0], ranks[1], protocol.reranked(t2i.index.shape[1], self.settings.combine)
        )
        out["candidates"] = {"t2i": t2i, "t2i_match": t2i_scores, "t2i_reranked_rank": ranks[0]}
        return out

    def _rerank(self, candidates: Candidates, scores: Tensor) -> Tensor:
        if self.settings.combine == "sum":
            scores = self.settings.match_scale * scores
        return rerank(candidates, scores, self.settings.combine)

    # Scenes: swapped captions.

    def _swaps(self, pairs: Scenes) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for i in range(len(pairs)):
            rows += [
                {"image": i, "kind": swap.kind, "true": swap.caption, "false": swap.negative} for swap in pairs.swaps(i)
            ]
        device = self.image.bridged.device
        embeddings, logits = torch.cat(self.image_embeddings), {}
        for start in range(0, len(rows), 128):
            part = rows[start : start + 128]
            ids, mask = self.processor.texts([row["true"] for row in part] + [row["false"] for row in part])
            text = self.model.encode_text(ids.to(device), mask.to(device))
            images = torch.tensor([row["image"] for row in part] * 2, device=device)
            image = embeddings[images] if embeddings.ndim == 3 else embeddings[images][:, None]
            cosine = (image @ self.model.text_embedding(text).float()[:, :, None]).squeeze(-1).amax(dim=1)
            logits["embed"] = cosine
            if "matching" in self.model.heads:
                unique, index = images.unique(return_inverse=True)
                state = self.image.select(unique)
                logits["match"] = self.model.match(state, text, index, torch.arange(len(images), device=device)).float()
            for name, values in logits.items():
                for row, good, bad in zip(
                    part, values[: len(part)].tolist(), values[len(part) :].tolist(), strict=True
                ):
                    row[name] = (good, bad)
        out: dict[str, Any] = {"swaps": rows}
        for name in logits:
            # A tie is no answer: it counts as wrong.
            out[f"swap_accuracy_{name}"] = sum(row[name][0] > row[name][1] for row in rows) / len(rows)
        return out

    # Captions.

    def _captions(self) -> dict[str, Any]:
        count = min(self.settings.captions, len(self.pairs))
        length = self.model.config.captioning.max_length if self.model.config.captioning else 0
        written: list[str] = []
        for state in self.images:
            if len(written) >= count:
                break
            written += best_captions(
                self.model,
                self.processor,
                state,
                self.settings.candidates,
                match_scale=self.settings.match_scale,
                generator=torch.Generator(self.image.bridged.device).manual_seed(len(written)),
                num_beams=self.settings.num_beams,
                max_new_tokens=length - 2,  # with start and end it can be read again
            )
        written = written[:count]
        protocol = replace(
            self.protocol(), images=count, captions=sum(len(self.pairs.captions(i)) for i in range(count))
        )
        references = [self.pairs.captions(i) for i in range(count)]
        out: dict[str, Any] = {"captions": caption_metrics(written, references, protocol), "written": written}
        if isinstance(self.pairs, Scenes):
            right = [caption_matches(caption, self.pairs.scenes[i]) for i, caption in enumerate(written)]
            out |= {"caption_right": right, "caption_exact_attributes": sum(right) / count}
        return out

    # Scenes: generated pictures.

    def _pictures(self, pairs: Scenes) -> dict[str, Any]:
        count = min(self.settings.pictures, len(pairs))
        device = self.image.bridged.device
        prompts = [pairs.captions(i)[0] for i in range(count)]
        pictures = []
        for start in range(0, count, 64):
            ids, mask = self.processor.texts(prompts[start : start + 64])
            condition = self.model.generation_condition(self.model.encode_text(ids.to(device), mask.to(device)))
            pictures.append(
                self.model.head("generation").sample(
                    condition,
                    num_inference_steps=self.settings.steps,
                    guidance_scale=self.settings.guidance_scale,
                    generator=torch.Generator(device).manual_seed(start),
                )
            )
        images = torch.cat(pictures).cpu()
        # Asked is what the caption says, so a background that it leaves out may be any.
        asked = [parse_caption(prompt) for prompt in prompts]
        known = checker_arguments()
        checks = [
            check_picture(picture.permute(1, 2, 0).numpy(), scene, **known)
            for picture, scene in zip(images, asked, strict=True)
        ]
        right = [check.all_right for check in checks]
        return {
            "prompts": prompts,
            "pictures": images,
            "checks": checks,
            "generation_attribute_accuracy": sum(right) / count,
        }
