"""Why does this text match this image: a heat-map over the image, a weight per word.

Image: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) of the match logit, along the straight path
from the tokens of a blank picture to those of this one. The attributions sum to the difference between the two logits,
and `Explanation.gap` says by how much the sum misses it. Words: how much the logit falls when the word is replaced by
the tokenizer's unknown token, everything else left as it is.

Both speak of the match score, not of the embedding, and of what the backbone put into a token, which may have come from
its whole receptive field.

Legend: T image tokens of width D, h x w their grid, M variants of the text, L text length, S steps.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unimodal import arguments
from unimodal.data.images import load_image
from unimodal.data.processor import Processor
from unimodal.model import ImageState, TextState, UnimodalModel

MOST_STEPS = 10_000  # the gap is far below rounding by then


@dataclass(frozen=True)
class Explanation:
    """Why a text matches an image.

    Attributes:
        logit: of the pair.
        blank_logit: of the text with a blank picture.
        tokens: [T] attribution of each image token, in logits.
        heatmap: [h, w] those of the tokens that lie on the image grid.
        words: the text's words with their weights, in logits.
        gap: how far `tokens` are from summing to logit - blank_logit; more steps make it smaller.
        image: the picture as the model sees it.
    """

    logit: float
    blank_logit: float
    tokens: np.ndarray
    heatmap: np.ndarray
    words: list[tuple[str, float]]
    gap: float
    image: Image.Image

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
    """Explain the match logit of one image and one text.

    Args:
        model: with a matching head of either kind.
        processor: its preprocessing.
        image: in any form that `load_image` takes.
        text: one text.
        steps: points on the path from the blank picture.
        batch_size: points at a time.

    Raises:
        ValueError: no matching head, an empty text, fewer than one step; also what `load_image` raises.
    """
    steps = arguments.integer(steps, "steps", most=MOST_STEPS)
    batch_size = arguments.integer(batch_size, "batch_size")
    text = arguments.text(text, "text")
    model.head("matching")
    model.eval()
    picture = load_image(image)
    words = text.split()
    unknown = processor.tokenizer.unk_token
    variants = [text] + [" ".join([*words[:i], unknown, *words[i + 1 :]]) for i in range(len(words))]
    ids, mask = processor.texts(variants)
    blank = Image.new("RGB", picture.size, tuple(round(255 * m) for m in processor.mean))
    pixels = processor.images([blank, picture])
    device = model.log_scale.device
    with torch.no_grad():
        texts = model.encode_text(ids.to(device), mask.to(device))  # [1 + words, L]
        images = model.encode_image(pixels.to(device, model.log_scale.dtype))
        first = torch.zeros(len(variants), dtype=torch.long, device=device)
        logits = model.match(images, texts, first + 1, torch.arange(len(variants), device=device)).float()
    tokens, ends = integrated_gradients(model, images, texts.select(first[:1]), steps=steps, batch_size=batch_size)
    return Explanation(
        logit=float(logits[0]),
        blank_logit=float(ends[0]),
        tokens=tokens.cpu().numpy(),
        heatmap=on_grid(tokens, model).cpu().numpy(),
        words=[(word, float(logits[0] - without)) for word, without in zip(words, logits[1:])],
        gap=float(tokens.sum() - (ends[1] - ends[0])),
        image=Image.fromarray(processor.image_array(picture).permute(1, 2, 0).numpy()),
    )


def integrated_gradients(
    model: UnimodalModel, images: ImageState, text: TextState, *, steps: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Attribution [T] of each token of images[1] against images[0], and the logits [2] of both with the text."""

    def logits(hidden: Tensor) -> Tensor:  # [B, T, D] -> [B]
        mask = images.mask[:1].expand(len(hidden), -1)
        rows = torch.arange(len(hidden), device=hidden.device)
        state = ImageState(hidden, mask, model.bridge.read("image", hidden, mask))
        return model.match(state, text, rows, torch.zeros_like(rows)).float()

    blank, tokens = images.tokens  # [T, D] each
    gradient = torch.zeros_like(tokens)
    midpoints = (torch.arange(steps).to(tokens) + 0.5) / steps
    for part in midpoints.split(batch_size):
        hidden = (blank + part[:, None, None] * (tokens - blank)).requires_grad_()  # [B, T, D]
        gradient += torch.autograd.grad(logits(hidden).sum(), hidden)[0].sum(0)
    with torch.no_grad():
        return ((tokens - blank) * gradient).float().sum(-1) / steps, logits(images.tokens)


def on_grid(tokens: Tensor, model: UnimodalModel) -> Tensor:
    """Tokens [T] of a square picture -> [h, w]; class and register tokens, which come first, have no place there."""
    prefix = model.backbone.prefix_tokens
    side = math.isqrt(len(tokens) - prefix)
    return tokens[prefix:].view(side, side)
