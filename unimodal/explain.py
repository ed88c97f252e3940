"""Why does this text match this image: a heat-map over the image, a weight per word.

Image: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) of the score, along the straight path from a blank picture to this
one. The attributions sum to the difference between the two scores, and `Explanation.gap` says by how much the sum misses it.
Words: how much the score falls when the word is replaced by the tokenizer's unknown token, or left out where there is none, everything else
left as it is.

The score is the match logit where the model has a matching head, and the path goes through the image's tokens: a token holds what the
backbone put into it, which may have come from its whole receptive field. Otherwise it is the cosine of the embeddings, and the path goes
through the pixels, whose attributions are summed over the places of the grid: an embedding may read a single token, such as CLIP's.

Legend: T image tokens of width D, h x w their grid, M variants of the text, L text length, S side of a picture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unimodal import arguments
from unimodal.backbones import move_pixels
from unimodal.data.images import load_image
from unimodal.data.processor import Processor
from unimodal.model import ImageState, TextState, UnimodalModel
from unimodal.retrieval import row_similarity

MOST_STEPS = 10_000  # the gap is far below rounding by then


@dataclass(frozen=True)
class Explanation:
    """Why a text matches an image.

    Attributes:
        logit: the score of the pair: its match logit, or the cosine of the embeddings.
        blank_logit: of the text with a blank picture.
        tokens: [T] attribution of each image token, in units of the score.
        heatmap: [h, w] those of the tokens that lie on the image grid.
        words: the text's words with their weights, in units of the score.
        gap: how far `tokens` are from summing to logit - blank_logit; more steps make it smaller.
        image: the picture as the model sees it.
        score: what the score is.
    """

    logit: float
    blank_logit: float
    tokens: np.ndarray
    heatmap: np.ndarray
    words: list[tuple[str, float]]
    gap: float
    image: Image.Image
    score: str = "match logit"

    def overlay(self, strength: float = 0.6) -> Image.Image:
        """The picture in grey, red where it speaks for the match and blue where it speaks against it."""
        heat = Image.fromarray((self.heatmap / (np.abs(self.heatmap).max() or 1)).astype(np.float32))
        weight = np.asarray(heat.resize(self.image.size, Image.Resampling.BICUBIC)).clip(-1, 1)[..., None]
        grey = np.asarray(self.image.convert("L").convert("RGB"), np.float32)
        colour = np.where(weight > 0, (255.0, 0.0, 0.0), (0.0, 0.0, 255.0))
        share = strength * np.abs(weight)
        return Image.fromarray(((1 - share) * grey + share * colour).round().astype(np.uint8))

    def picture(self, side: int = 320) -> Image.Image:
        """All of it in one: the picture and the heat-map side by side, `side` pixels wide each, and under them the words, each with its
        weight, on red where it speaks for the match and on blue where it speaks against it."""
        gap, font, small = 12, ImageFont.load_default(18), ImageFont.load_default(13)
        height = round(side * self.image.height / self.image.width)
        most = max((abs(weight) for _, weight in self.words), default=0) or 1
        places, x, y = [], gap, height + 2 * gap  # of words, line by line
        for word, weight in self.words:
            width = round(max(font.getlength(word), small.getlength(f"{weight:+.3f}"))) + 10
            if x > gap and x + width > 2 * side + 2 * gap:
                x, y = gap, y + 56
            places.append((x, y, width, word, weight))
            x += width + 6
        out = Image.new("RGB", (2 * side + 3 * gap, y + 56), "white")
        for column, one in enumerate((self.image, self.overlay())):
            out.paste(one.resize((side, height), Image.Resampling.BICUBIC), (gap + column * (side + gap), gap))
        draw = ImageDraw.Draw(out)
        for x, y, width, word, weight in places:
            fade = round(255 * (1 - 0.6 * abs(weight) / most))
            draw.rounded_rectangle((x, y, x + width, y + 28), 4, (255, fade, fade) if weight > 0 else (fade, fade, 255))
            draw.text((x + 5, y + 3), word, "black", font)
            draw.text((x + 5, y + 31), f"{weight:+.3f}", (90, 90, 90), small)
        return out


def explain(
    model: UnimodalModel, processor: Processor, image: Any, text: str, *, steps: int = 64, batch_size: int = 16
) -> Explanation:
    """Explain the match logit of one image and one text, or the cosine of their embeddings where the model has no matching head.

    Args:
        model: what scored them.
        processor: its preprocessing.
        image: in any form that `load_image` takes.
        text: one text.
        steps: points on the path from the blank picture.
        batch_size: points at a time.

    Raises:
        ValueError: neither a matching head nor an embedding, a model that reads picture and words as one conversation, or pictures of any
            size without a matching head; an empty text, fewer than one step; also what `load_image` raises.
    """
    steps = arguments.integer(steps, "steps", most=MOST_STEPS)
    batch_size = arguments.integer(batch_size, "batch_size")
    text = arguments.text(text, "text")
    _require_places(model, processor)
    model.eval()
    picture = load_image(image)
    words = text.split()
    unknown = [processor.tokenizer.unk_token]
    if unknown[0] in (None, processor.tokenizer.eos_token):  # CLIP's would end the text
        unknown = []
    variants = [text] + [" ".join([*words[:i], *unknown, *words[i + 1 :]]) or "." for i in range(len(words))]
    ids, mask = processor.texts(variants)
    blank = Image.new("RGB", picture.size, tuple(round(255 * m) for m in processor.mean))
    device = model.log_scale.device
    pixels = move_pixels(processor.images([blank, picture]), device, model.log_scale.dtype)
    with torch.no_grad():
        texts = model.encode_text(ids.to(device), mask.to(device))  # [1 + words, L]
        images = model.encode_image(pixels)
        first = torch.zeros(len(variants), dtype=torch.long, device=device)
        logits = _scores(model, images, texts, first + 1)
    own = texts.select(first[:1])
    if model.matcher is None:
        assert isinstance(pixels, Tensor)  # `_require_places` refuses others
        tokens, ends = pixel_gradients(model, pixels, images, own, steps=steps, batch_size=batch_size)
    else:
        tokens, ends = integrated_gradients(model, images, own, steps=steps, batch_size=batch_size)
    return Explanation(
        logit=float(logits[0]),
        blank_logit=float(ends[0]),
        tokens=tokens.cpu().numpy(),
        heatmap=on_grid(tokens, model).cpu().numpy(),
        words=[(word, float(logits[0] - without)) for word, without in zip(words, logits[1:])],
        gap=float(tokens.sum() - (ends[1] - ends[0])),
        image=Image.fromarray(processor.image_array(picture).permute(1, 2, 0).numpy()),
        score="cosine" if model.matcher is None else "match logit",
    )


def _require_places(model: UnimodalModel, processor: Processor) -> None:
    """Refuse a model in which no place of a picture can be told to speak for a text."""
    if model.matcher is None and model.embeds is None:
        model.head("matching")  # names what there is
    if model.backbone.whole:
        raise ValueError(
            f"explain: {model.config.backbone.label} reads picture and words as one conversation, of which only the last state is scored; "
            "explain a model that reads them apart, such as CLIP, SigLIP, BLIP-2 or one with a bridge"
        )
    if model.matcher is None and getattr(processor, "any_size", False):
        raise ValueError(
            "explain: this model has no matching head, and its pictures have any size, so that pixels have no common grid; explain one of "
            "fixed resolution, or one with a matching head"
        )


def _scores(model: UnimodalModel, images: ImageState, texts: TextState, rows: Tensor) -> Tensor:
    """Scores [M] of the images in these rows with M texts, float32."""
    if model.matcher is not None:
        return model.match(images, texts, rows, torch.arange(len(rows), device=rows.device)).float()
    return row_similarity(model.image_embedding(images)[rows], model.text_embedding(texts)[:, None])[:, 0]


def integrated_gradients(
    model: UnimodalModel, images: ImageState, text: TextState, *, steps: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Attribution [T] of each token of images[1] against images[0], and the logits [2] of both with the text."""

    def logits(hidden: Tensor) -> Tensor:  # [B, T, D] -> [B]
        mask = images.mask[:1].expand(len(hidden), -1)
        state = ImageState(hidden, mask, model.read_bridge("image", hidden, mask))
        return _scores(model, state, text.select(_zeros(hidden)), _rows(hidden))

    blank, tokens = images.tokens  # [T, D] each
    with torch.no_grad():
        ends = logits(images.tokens)
    return _along(logits, blank, tokens, steps, batch_size).sum(-1), ends


def pixel_gradients(
    model: UnimodalModel, pixels: Tensor, images: ImageState, text: TextState, *, steps: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Attribution [T] of each place of pixels[1] against pixels[0], [2, 3, S, S], and the cosines [2] of both with the text. Class and
    register tokens, which have no place, get 0."""

    def cosines(shown: Tensor) -> Tensor:  # [B, 3, S, S] -> [B]
        return _scores(model, model.encode_image(shown), text.select(_zeros(shown)), _rows(shown))

    with torch.no_grad():
        ends = cosines(pixels)
    of_pixels = _along(cosines, pixels[0], pixels[1], steps, batch_size).sum(0)  # [S, S]
    prefix, places = model.backbone.prefix_tokens, images.tokens.shape[1] - model.backbone.prefix_tokens
    side = math.isqrt(places)
    place = (
        torch.arange(len(of_pixels), device=pixels.device) * side // len(of_pixels)
    )  # of each row, and of each column
    grid = of_pixels.new_zeros(side, len(of_pixels)).index_add(0, place, of_pixels)
    grid = grid.new_zeros(side, side).index_add(1, place, grid)
    return torch.cat([grid.new_zeros(prefix), grid.flatten()]), ends


def _along(score: Callable[[Tensor], Tensor], blank: Tensor, shown: Tensor, steps: int, batch_size: int) -> Tensor:
    """Attribution of each number of `shown` against `blank`, in float32: gradients of the score at the middle of each step between them."""
    gradient = torch.zeros_like(shown)
    midpoints = (torch.arange(steps).to(shown) + 0.5) / steps
    for part in midpoints.split(batch_size):
        points = (blank + part.view(-1, *[1] * shown.ndim) * (shown - blank)).requires_grad_()
        gradient += torch.autograd.grad(score(points).sum(), points)[0].sum(0)
    return ((shown - blank) * gradient).float() / steps


def _rows(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def on_grid(tokens: Tensor, model: UnimodalModel) -> Tensor:
    """Tokens [T] of a square picture -> [h, w]; class and register tokens, which come first, have no place there."""
    prefix = model.backbone.prefix_tokens
    side = math.isqrt(len(tokens) - prefix)
    return tokens[prefix:].view(side, side)
