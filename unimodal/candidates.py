"""Best of several: one head writes candidates, the embedding and matching heads of the same model choose among them.

DALL-E ranked its drawings by a second model, CLIP (Ramesh et al. 2021, arXiv 2102.12092, section 2.6), and BLIP filtered
captions by its image-text match (Li et al. 2022, arXiv 2201.12086, section 3.3). Here writer and judge share one checkpoint.

Legend: B images or texts, K candidates, S side of a picture, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unimodal.backbones.base import move_pixels
from unimodal.data.processor import Processor
from unimodal.draws import SAMPLING, Generators, own_generators
from unimodal.model import ImageState, TextState, UnimodalModel
from unimodal.retrieval import row_similarity


@torch.no_grad()
def agreement(model: UnimodalModel, image: ImageState, text: TextState, match_scale: float) -> Tensor:
    """How well image b agrees with text b, [B] float32: cosine + match_scale * match logit, or the cosine alone without a matching head."""
    images, texts = model.image_embedding(image).float(), model.text_embedding(text).float()
    score = row_similarity(images, texts[:, None])[:, 0]
    if "matching" in model.heads:
        row = torch.arange(len(score), device=score.device)
        score = score + match_scale * model.match(image, text, row, row).float()
    return score


@torch.no_grad()
def best_captions(
    model: UnimodalModel,
    processor: Processor,
    image: ImageState,
    candidates: int,
    *,
    match_scale: float,
    prompts: Sequence[str] | None = None,
    generator: Generators = None,
    **settings: Any,
) -> list[str]:
    """One caption per image: the best of the decoder's own choice and K - 1 that are drawn by their probability.

    Args:
        candidates: K; 1 leaves nothing to choose.
        match_scale: see `agreement`.
        prompts: what a language model continues, one for each image or one for all; None is the one it was trained with.
        generator: what the draws follow from: a source for all images, or one for each, see `unimodal.draws`.
        settings: see `generate` of the model's captioning head; those of a beam search hold for the first candidate only.

    Raises:
        ValueError: prompts for a head that takes none, several sequences to choose among.
    """
    if candidates > 1 and settings.get("num_return_sequences", 1) > 1:
        raise ValueError("candidates and num_return_sequences both ask for several captions; leave one of them at 1")
    if (writer := processor.writer) is not None:
        ids, mask = writer.prompts([writer.prompt] if prompts is None else prompts)
        settings["prompt"] = (ids.to(image.tokens.device), mask.to(image.tokens.device))
    elif prompts is not None:
        raise ValueError(
            "caption: this model's captioning head takes no prompt; only a language model (captioning.kind: language_model) does"
        )
    draw = {key: value for key, value in settings.items() if key not in ("num_beams", "length_penalty")}
    own_choice = settings
    if not settings.get("do_sample"):
        own_choice = {key: value for key, value in settings.items() if key not in SAMPLING}
    ways = [own_choice] + [{**draw, "do_sample": True}] * (candidates - 1)
    own = own_generators(generator, len(image.tokens)) if candidates > 1 or settings.get("do_sample") else None
    written = [  # [K, B]
        [processor.decode(ids) for ids in model.caption(image, generator=own, **way)] for way in ways
    ]
    if candidates == 1:
        return written[0]
    scores = []
    for captions in written:
        ids, mask = processor.texts([caption or "." for caption in captions])  # an empty one cannot be read, and loses
        text = model.encode_text(ids.to(image.tokens.device), mask.to(image.tokens.device))
        empty = torch.tensor([not caption for caption in captions], device=image.tokens.device)
        scores.append(agreement(model, image, text, match_scale).masked_fill(empty, -torch.inf))
    best = torch.stack(scores).argmax(0).tolist()  # [B]
    return [written[k][i] for i, k in enumerate(best)]


@torch.no_grad()
def draw_candidates(
    model: UnimodalModel,
    processor: Processor,
    text: TextState,
    candidates: int,
    *,
    match_scale: float,
    generator: Generators = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """K pictures of each of B texts, and how well the model's other heads find that each shows its text.

    Args:
        text: the texts.
        candidates: K; of several, each text draws its own from a generator of its own, so that they do not depend on the other texts.
        match_scale: see `agreement`.
        generator: source of the noise: one for all texts, or one for each, see `unimodal.draws`.
        settings: see `sample` of the model's generation head.

    Returns:
        Pictures [K, B, 3, S, S] in [0, 1], and their agreement [K, B], zeros where K = 1 leaves nothing to choose.

    Raises:
        ValueError: K > 1 and the model has no embedding, the settings do not suit the head.
    """
    condition = model.generation_condition(text)
    sources = own_generators(generator, len(condition)) if candidates > 1 else generator
    pictures, scores = [], []
    for _ in range(candidates):
        # The sampler walks in float32; autocast lets it call a network of lower precision.
        lower = condition.dtype != torch.float32
        with torch.autocast(condition.device.type, condition.dtype, enabled=lower):
            drawn = model.head("generation").sample(condition, generator=sources, **settings)
        pictures.append(drawn)
        if candidates > 1:
            pixels = processor.images(as_images(drawn))
            image = model.encode_image(move_pixels(pixels, condition.device, model.log_scale.dtype))
            scores.append(agreement(model, image, text, match_scale))
    drawn = torch.stack(pictures)
    return drawn, torch.stack(scores) if scores else drawn.new_zeros(1, len(condition))


def as_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures [B, 3, S, S] in [0, 1] as PIL images."""
    pixels = (255 * pictures.float()).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
