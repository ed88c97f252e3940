"""What validation measures, on a whole split, under protocols: every head that the model has, scored by judges outside the model.

Retrieval is scored twice, by the embedding alone and after the matching head has reranked its top k. On scenes the captions are parsed back
to symbols, swapped captions are ranked against true ones, and generated pictures are judged by a checker that reads pixels.
"""

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from unimodal.candidates import best_captions
from unimodal.data.batch import Batch, image_inputs, text_inputs
from unimodal.data.items import Item
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.data.readers import Listed
from unimodal.data.scenes import Scenes, caption_matches
from unimodal.metrics import (
    Candidates,
    DirectionMetrics,
    Protocol,
    Ranks,
    RetrievalMetrics,
    TextToTextMetrics,
    candidates_from_scores,
    caption_metrics,
    first_stage,
    mean_of_folds,
    second_stage,
    summarise,
    text_to_text,
)
from unimodal.model import ImageState, UnimodalModel
from unimodal.onednn import inference
from unimodal.retrieval import Combine, combined, row_similarity, rule_for
from unimodal.search import Encoder
from unimodal.tasks.drawing import Drawn, draw_scenes
from unimodal.tasks.pairwise import CONVERSATIONS, ConversationPairs, Pairwise, StatePairs

# Every headline number, with the heads that it needs.
MEASURES: dict[str, tuple[str, ...]] = {
    "t2i_r1_first": ("embedding",),
    "t2i_r1_reranked": ("embedding", "matching"),
    "i2t_r1_first": ("embedding",),
    "i2t_r1_reranked": ("embedding", "matching"),
    "cider_d": ("captioning",),
    "bleu_4": ("captioning",),
    "swap_accuracy_embed": ("embedding",),
    "swap_accuracy_match": ("embedding", "matching"),
    "caption_exact_attributes": ("captioning",),
    "generation_attribute_accuracy": ("generation",),
    "generation_attribute_accuracy_chosen": ("generation", "embedding"),
    "generation_attribute_accuracy_known": ("generation",),
}


FINDS = 5  # first candidates kept of each query where none is scored again


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured, and how.

    Args:
        rerank_k: candidates per query that the matching head scores; None is what the model's scoring rule says (`scoring.k`).
        combine: whether its score replaces the embedding's or is added to it; None is as the rule says.
        match_scale: what the match logit is multiplied by before it is added to a cosine: under `sum`, and to choose a caption; None is
            as the rule says.
        folds: blocks of images, in file order, that are each searched alone and then averaged; 1 searches the whole split.
        text_to_text: also search captions by captions.
        captions: images to caption, from the start of the split; 0 for none.
        num_beams: beams of the captions.
        candidates: captions written per image, of which the embedding and matching heads choose one; see `unimodal.candidates`.
        pictures: pictures to generate, for the first caption of as many images; 0 for none.
        drawings: pictures drawn for each such caption; the first one is judged, and of several also the one that the embedding and matching
            heads choose.
        steps: sampling steps of a picture.
        guidance_scale: classifier-free guidance of a picture.
        pairs_per_batch: pairs that the matching head scores at a time.
    """

    rerank_k: int | None = None
    combine: Combine | None = None
    match_scale: float | None = None
    folds: int = 1
    text_to_text: bool = False
    captions: int = 200
    num_beams: int = 1
    candidates: int = 1
    pictures: int = 64
    drawings: int = 1
    steps: int = 20
    guidance_scale: float = 2.0
    pairs_per_batch: int = 1024


def _join(parts: list[Any], order: Tensor | None) -> Any:
    """Tensors, or the tensors of candidates, of all folds as one; queries in `order` where given."""
    if isinstance(parts[0], Candidates):
        return Candidates(*(_join([getattr(p, f.name) for p in parts], order) for f in fields(Candidates)))
    whole = torch.cat(parts)
    return whole if order is None else whole[order]


def beginning(pairs: Pairs, count: int) -> Pairs:
    """The first `count` images of a split, as a split of its own with a fingerprint of its own.

    Raises:
        ValueError: the reader cannot be cut.
    """
    part: Any = copy.copy(pairs)
    if isinstance(pairs, Scenes):
        part.scenes = pairs.scenes[:count]
    elif isinstance(pairs, Listed):
        part.samples = pairs.samples[:count]
    else:
        raise ValueError(
            f"{count} of {len(pairs)} images of {pairs.name} {pairs.split} were read, and {type(pairs).__name__} cannot be cut; set "
            "limit_val_batches and limit_test_batches to 1.0"
        )
    return part


class Evaluation:
    """Collects a split batch by batch (`add`), then scores it (`results`).

    Args:
        model: what is scored.
        processor: its preprocessing.
        pairs: the split.
        settings: how much is measured, and how.
        known: scenes that training did not show, of combinations of attributes that it did show: pictures are drawn for them, too.
    """

    def __init__(
        self,
        model: UnimodalModel,
        processor: Processor,
        pairs: Pairs,
        settings: EvaluationSettings,
        known: Scenes | None = None,
    ) -> None:
        self.model, self.processor, self.pairs, self.settings, self.known = model, processor, pairs, settings, known
        self.rule = rule_for(model.config, k=settings.rerank_k, combine=settings.combine, scale=settings.match_scale)
        self.encoder = Encoder(model, processor)
        self.embeds = "embedding" in model.jobs
        self.pairwise = self._pairwise()
        self.images: list[ImageState] = []  # of which captions are written
        self.image_embeddings: list[Tensor] = []
        self.text_embeddings: list[Tensor] = []
        self.image_ids: list[Tensor] = []
        self.text_image_ids: list[Tensor] = []

    @inference()
    def add(self, batch: Batch) -> None:
        """Read one batch of pictures with all their captions."""
        writes = self.model.captioner is not None and not self.encoder.writes and self.read < self.settings.captions
        if self.embeds or self.encoder.matches or writes:
            image = self.model.encode_image(**image_inputs(batch))
            text = self.model.encode_text(**text_inputs(batch))
            if self.embeds:
                self.image_embeddings.append(self.model.image_embedding(image).float())
                self.text_embeddings.append(self.model.text_embedding(text).float())
            if self.pairwise is not None:
                self.pairwise.add(image, text)
            if writes:
                self.images.append(image)
        self.image_ids.append(batch["image_id"])
        self.text_image_ids.append(batch["text_image_id"])

    def _pairwise(self) -> Pairwise | None:
        """How pairs are scored; None without a matching head."""
        if self.encoder.judges:
            return ConversationPairs(self.encoder, self.pairs)
        return StatePairs(self.model, self.settings.pairs_per_batch) if self.encoder.matches else None

    @property
    def read(self) -> int:
        """Images read so far."""
        return sum(map(len, self.image_ids))

    @inference()
    def results(self) -> dict[str, Any]:
        """Everything measured: metric objects by name, and the rows that a report shows; of a split that was read in part, of that part."""
        if self.read < len(self.pairs):
            self.pairs = beginning(self.pairs, self.read)
        out = self.retrieval() if self.embeds or self.rule.first == "pair" else {}
        if isinstance(self.pairs, Scenes) and self.embeds:
            out |= self._swaps(self.pairs)
        if self.model.captioner is not None and self.settings.captions:
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
            "generation_attribute_accuracy_chosen",
            "generation_attribute_accuracy_known",
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

    @inference()
    def retrieval(self) -> dict[str, Any]:
        """Retrieval alone: `retrieval_first` and `retrieval_reranked`, their ranks query by query, and what each query found.

        Raises:
            ValueError: for folds that do not divide the split, and what `first_stage`, `mean_of_folds` and `text_to_text` raise.
        """
        settings, rule = self.settings, self.rule
        image_id, text_image_id = torch.cat(self.image_ids), torch.cat(self.text_image_ids)
        if settings.folds < 1 or len(image_id) % settings.folds:
            raise ValueError(
                f"got folds={settings.folds} for {len(image_id)} images; expected a number that divides them"
            )
        k = rule.k if rule.first == "embed" else 0
        parts: list[dict[str, Any]] = []
        for rows in torch.arange(len(image_id), device=image_id.device).chunk(settings.folds):
            captions = torch.isin(text_image_id, image_id[rows]).nonzero().squeeze(1)
            t2i, i2t = self._first(rows, captions, image_id[rows], text_image_id[captions], k or FINDS)
            part: dict[str, Any] = {
                "t2i": replace(t2i, index=rows[t2i.index]),
                "i2t": replace(i2t, index=captions[i2t.index]),
            }
            if k and self.pairwise is not None:
                for name, queries in (("t2i", captions), ("i2t", rows)):
                    found = part[name]
                    pairs = (found.index, queries[:, None].expand_as(found.index))
                    images, texts = pairs if name == "t2i" else pairs[::-1]
                    match = self.pairwise.match(images.flatten(), texts.flatten(), image_asks=name == "i2t")
                    match = match.view_as(found.scores)
                    final = combined(rule, found.scores, match)
                    part[f"{name}_match"], part[f"{name}_final"] = match, final
                    part[f"{name}_reranked_rank"] = second_stage(found, final)
            parts.append(part | {"captions": captions})

        order = torch.cat([part.pop("captions") for part in parts]).argsort()  # back to the split's captions
        out: dict[str, Any] = {"candidates": {}, "ranks": {}}
        for name in parts[0]:
            out["candidates"][name] = _join([part[name] for part in parts], order if name.startswith("t2i") else None)
        ids, by_id = image_id.sort()
        text_image = by_id[torch.searchsorted(ids, text_image_id)]
        first = self.protocol()
        whole = out["candidates"]
        stages = {"first": (first, lambda part, name: part[name].rank)}
        if "t2i_match" in whole:
            reranked = first.reranked(whole["t2i"].index.shape[1], rule.combine, rule.scale)
            stages["reranked"] = (reranked, lambda part, name: part[f"{name}_reranked_rank"])
        for stage, (protocol, rank) in stages.items():
            per_fold = [
                summarise(t2i, i2t, replace(protocol, images=len(i2t), captions=len(t2i)))
                for t2i, i2t in ((rank(part, "t2i"), rank(part, "i2t")) for part in parts)
            ]
            result = per_fold[0] if settings.folds == 1 else mean_of_folds(per_fold)
            out[f"retrieval_{stage}"] = result
            out["ranks"][stage] = Ranks(
                result.protocol, rank(whole, "t2i").cpu(), rank(whole, "i2t").cpu(), text_image.cpu()
            )
        if settings.text_to_text:
            text = torch.cat(self.text_embeddings)
            protocol = replace(first, rule="hit among the captions, the query left out")
            found = DirectionMetrics.from_ranks(text_to_text(text, text_image_id).rank)
            out["text_to_text"] = TextToTextMetrics(protocol=protocol, text_to_text=found)
        return out

    def _first(
        self, rows: Tensor, captions: Tensor, image_id: Tensor, text_image_id: Tensor, k: int
    ) -> tuple[Candidates, Candidates]:
        """What ranks first of these images and captions, text to image and image to text: embeddings, or the scores of all pairs."""
        if self.rule.first == "embed":
            if not self.embeds:
                raise ValueError(
                    "scoring.first is 'embed', and this model has no embedding; it has: "
                    f"{', '.join(self.model.jobs)}. A model with a matching head can rank by it alone: set scoring.first to 'pair'"
                )
            image, text = torch.cat(self.image_embeddings)[rows], torch.cat(self.text_embeddings)[captions]
            return first_stage(image, text, text_image_id, image_id=image_id, k=k)
        assert self.pairwise is not None  # `rule_for` refuses to score pairs without a head
        relevant = image_id[:, None] == text_image_id[None]  # [I, C]
        images, texts = (part.flatten() for part in torch.meshgrid(rows, captions, indexing="ij"))
        t2i, i2t = (
            self.pairwise.match(images, texts, image_asks=image_asks).view_as(relevant) for image_asks in (False, True)
        )
        return candidates_from_scores(t2i.T, relevant.T, k), candidates_from_scores(i2t, relevant, k)

    # Scenes: swapped captions.

    def _swaps(self, pairs: Scenes) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for i in range(len(pairs)):
            rows += [
                {"image": i, "kind": swap.kind, "true": swap.caption, "false": swap.negative} for swap in pairs.swaps(i)
            ]
        device = self.model.log_scale.device
        embeddings, logits = torch.cat(self.image_embeddings), {}
        for start in range(0, len(rows), 128):
            part = rows[start : start + 128]
            captions = [row["true"] for row in part] + [row["false"] for row in part]
            ids, mask = self.processor.texts(captions)
            text = self.model.encode_text(ids.to(device), mask.to(device))
            images = torch.tensor([row["image"] for row in part] * 2, device=device)
            texts = self.model.text_embedding(text).float()
            logits["embed"] = row_similarity(embeddings[images], texts[:, None])[:, 0]
            if self.pairwise is not None:
                logits["match"] = self.pairwise.match_texts(images, captions, text)
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
        settings = self.settings
        count = min(settings.captions, len(self.pairs))
        length = self.model.config.captioning.max_length if self.model.config.captioning else 0
        written = self._written_whole(count, length) if self.encoder.writes else []
        generator = torch.Generator().manual_seed(
            0
        )  # one for all, so that a caption does not depend on the size of the batches
        for state in self.images:
            if len(written) >= count:
                break
            written += best_captions(
                self.model,
                self.processor,
                state,
                settings.candidates,
                match_scale=self.rule.scale,
                generator=generator,
                num_beams=settings.num_beams,
                max_new_tokens=length - 2,  # with start and end it can be read again
            )
        written = written[:count]
        decoding = f"{settings.num_beams} beams" if settings.num_beams > 1 else "greedy"
        if settings.candidates > 1:
            decoding += f" and {settings.candidates - 1} drawn, the best by the model's own cosine + {self.rule.scale:g} match logit"
        captions = sum(len(self.pairs.captions(i)) for i in range(count))
        protocol = replace(self.protocol(), images=count, captions=captions, decoding=decoding)
        references = [self.pairs.captions(i) for i in range(count)]
        out: dict[str, Any] = {"captions": caption_metrics(written, references, protocol), "written": written}
        if isinstance(self.pairs, Scenes):
            right = [caption_matches(caption, self.pairs.scenes[i]) for i, caption in enumerate(written)]
            out |= {"caption_right": right, "caption_exact_attributes": sum(right) / count}
        return out

    def _written_whole(self, count: int, length: int) -> list[str]:
        """What a vision-language model answers when it is asked to describe the first images."""
        if self.settings.candidates > 1:
            raise ValueError("candidates: a vision-language model writes one caption; set evaluation.candidates to 1")
        items = [Item(image=self.pairs.image(i)) for i in range(count)]
        options = {"max_new_tokens": length, "num_beams": self.settings.num_beams}
        return self.encoder.write(items, None, options, batch_size=CONVERSATIONS)

    # Scenes: generated pictures.

    def _pictures(self, pairs: Scenes) -> dict[str, Any]:
        drawn, chosen = self._draw(pairs, self.settings.drawings)
        out: dict[str, Any] = {"drawn": drawn, "generation_attribute_accuracy": drawn.accuracy}
        if self.settings.drawings > 1:
            out |= {"chosen": chosen, "generation_attribute_accuracy_chosen": chosen.accuracy}
        if self.known is not None:
            known, _ = self._draw(self.known, 1)
            out |= {"known": known, "generation_attribute_accuracy_known": known.accuracy}
        return out

    def _draw(self, pairs: Scenes, candidates: int) -> tuple[Drawn, Drawn]:
        settings = self.settings
        return draw_scenes(
            self.model,
            self.processor,
            pairs,
            settings.pictures,
            candidates=candidates,
            match_scale=self.rule.scale,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
        )
