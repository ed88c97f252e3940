"""Why did a system match these two: how much each image token and each word says for the score, and a test of the answer.

Images: gradient times cross-attention where the system's words look at image tokens (Chefer et al. 2021, arXiv 2103.15679, without their
roll-out), integrated gradients elsewhere (Sundararajan et al. 2017, arXiv 1703.01365) from the mean token of the gallery. Of a system that
reads pixels the path starts from the mean colour, and a token stands for the pixels of its place. Words: how far the score falls when the
word is hidden. The test removes the most relevant tokens first: the score must fall faster than when tokens are removed at random (Samek
et al. 2017, arXiv 1509.06321).

Legend: P pairs, T image tokens, L text length, C width, S steps, H attention heads, Q queries, g side of the grid of image tokens.
"""

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unimodal.data.images import load_image
from unimodal.explain import Explanation
from unimodal.layers import Attention
from unimodal.survey.encoders import SharedEncoders
from unimodal.systems import Encoders, Images, System, Texts

STEPS = 16
SHARES = tuple(share / 10 for share in range(1, 10))  # of the tokens removed
ORDERS = 5  # random ones


def explain(system: System, encoders: SharedEncoders, image: Any, text: str, *, steps: int = STEPS) -> Explanation:
    """Why a system matches one image and one text, as `unimodal.explain` says it of a model.

    Args:
        system: trained on these encoders.
        encoders: what reads the two.
        image: in any form that `load_image` takes.
        text: one text.
        steps: of integrated gradients, from the tokens of a blank picture.

    Raises:
        ValueError: an image encoder whose tokens are on no square grid.
    """
    picture, processor = load_image(image), encoders.processor
    blank = Image.new("RGB", picture.size, tuple(round(255 * m) for m in processor.mean))
    both = encoders.read_images(processor.images([blank, picture]))
    texts = encoders.read_texts(*encoders.tokenise([text]))
    one = both.select(torch.tensor([1]))
    tokens = image_relevance(system, one, texts, both.tokens[0], steps=steps)
    side = math.isqrt(len(tokens) - (prefix := encoders.backbone.prefix_tokens))
    if side * side != len(tokens) - prefix:
        raise ValueError(f"{len(tokens) - prefix} image tokens lie on no square grid, so there is no heat-map")
    words = whole_words(processor.tokenizer, text, int(texts.mask.sum()))
    weights = word_relevance(system, encoders, one, texts, [places for _, places in words])
    with torch.no_grad():
        logits = [float(system.score(both.select(torch.tensor([row])), texts)[0]) for row in (1, 0)]
    return Explanation(
        logit=logits[0],
        blank_logit=logits[1],
        tokens=tokens.numpy(),
        heatmap=tokens[prefix:].view(side, side).numpy(),
        words=[(word, weight) for (word, _), weight in zip(words, weights)],
        gap=float(tokens.sum()) - (logits[0] - logits[1]),
        image=Image.fromarray(processor.image_array(picture).permute(1, 2, 0).numpy()),
    )


def whole_words(tokenizer: Any, text: str, length: int) -> list[tuple[str, list[int]]]:
    """The words of a text as they are written, each with the places of its tokens among the first `length`."""
    read = tokenizer(text)
    places: dict[int, list[int]] = {}
    for place, word in enumerate(read.word_ids()[:length]):
        if word is not None:  # neither start nor end
            places.setdefault(word, []).append(place)
    return [(text[slice(*read.word_to_chars(word))], found) for word, found in places.items()]


def image_relevance(system: System, images: Images, texts: Texts, blank: Tensor, *, steps: int = STEPS) -> Tensor:
    """What each token [T] of one image says for its score with one text; more is more.

    Args:
        system: what scores.
        images: one.
        texts: one.
        blank: [T, C] or [C], the tokens of nothing, from which integrated gradients start.
        steps: on the way from there.
    """
    if system.looks:
        return _attention_relevance(system, images, texts)
    rows = torch.zeros(steps, dtype=torch.long)
    several, text = images.select(rows), texts.select(rows)
    if system.needs_pixels:
        assert images.pixels is not None
        said = _integrated(
            lambda path: system.score(several._replace(pixels=path), text),
            images.pixels[0],
            torch.zeros_like(images.pixels[0]),
            steps,
        )
        return _by_place(said.sum(0), images.tokens.shape[1])
    said = _integrated(lambda path: system.score(several._replace(tokens=path), text), images.tokens[0], blank, steps)
    return said.sum(-1) * images.mask[0]


def _integrated(score: Callable[[Tensor], Tensor], end: Tensor, start: Tensor, steps: int) -> Tensor:
    """What each number of `end` says for the score, along the straight path from `start`; `score` takes the path's points as a batch."""
    points = ((torch.arange(steps).to(end) + 0.5) / steps).view(-1, *[1] * end.ndim)
    path = (start + points * (end - start)).requires_grad_()
    with torch.enable_grad():
        gradient = torch.autograd.grad(score(path).sum(), path)[0].mean(0)
    return ((end - start) * gradient).detach()


def _by_place(said: Tensor, tokens: int) -> Tensor:
    """What pixels [H, W] say, added up over the places of a grid; tokens without a place come first and say nothing: [T]."""
    side = math.isqrt(tokens)
    cells = F.adaptive_avg_pool2d(said[None], side).flatten() * said.numel() / side**2
    return torch.cat([cells.new_zeros(tokens - side**2), cells])


def _attention_relevance(system: System, images: Images, texts: Texts) -> Tensor:
    """Gradient times attention, summed over layers, heads and queries, what speaks against the match left out: [T]."""
    count = images.tokens.shape[1]
    total = images.tokens.new_zeros(count)
    with torch.enable_grad(), _watched(system) as seen:
        score = system.score(images, texts).sum()
        mixed = [entry["mixed"] for entry in seen]
        gradients = torch.autograd.grad(score, mixed, allow_unused=True)
    for entry, gradient in zip(seen, gradients):
        if gradient is None:  # of a part that does not reach the score
            continue
        heads = entry["weights"].shape[1]
        by_head = gradient.unflatten(-1, (heads, -1)).transpose(1, 2)  # [P, H, Q, h]
        of_weights = by_head @ entry["values"].transpose(
            -1, -2
        )  # how the score grows with each attention weight: [P, H, Q, T]
        total += (
            (of_weights * entry["weights"]).clamp(min=0).sum((0, 1, 2))[-count:].detach()
        )  # a class token comes first
    return total * images.mask[0]


@contextmanager
def _watched(system: System) -> Iterator[list[dict[str, Tensor]]]:
    """Attention weights, values and mixed values of every pass through the layers that look at image tokens."""
    seen: list[dict[str, Tensor]] = []

    def watch(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert isinstance(layer, Attention)
        x, keys, values, *rest = inputs
        bias = rest[0] if rest else options.get("bias")
        index = rest[1] if len(rest) > 1 else options.get("index")
        if index is not None:
            keys, values = keys[index], values[index]
            bias = None if bias is None else bias[index]
        queries = layer.query(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        seen.append({"weights": weights.detach(), "values": values.detach()})

    def keep(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen[-1]["mixed"] = inputs[0]

    hooks = []
    for name, module in system.named_modules():
        if isinstance(module, Attention) and any(fnmatch.fnmatchcase(name, pattern) for pattern in system.looks):
            hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
            hooks.append(module.output.register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def word_relevance(
    system: System, encoders: Encoders, images: Images, texts: Texts, words: Sequence[Sequence[int]]
) -> list[float]:
    """How far the score of one image with one text falls when a word is hidden, for each word; a word is the places of its tokens."""
    ids, mask = texts.ids[0], texts.mask[0]
    hidden = ids.repeat(len(words), 1)
    for row, places in enumerate(words):
        hidden[row, list(places)] = encoders.mask_id
    variants = encoders.read_texts(hidden, mask.repeat(len(words), 1))
    whole = float(system.score(images, texts)[0])
    rows = torch.zeros(len(words), dtype=torch.long)
    return [whole - float(score) for score in system.score(images.select(rows), variants)]


def deletion_test(
    system: System,
    images: Images,
    texts: Texts,
    image_id: Tensor,
    text_image_id: Tensor,
    *,
    pairs: int,
    seed: int = 0,
) -> dict[str, float]:
    """Remove tokens, the most relevant first, and at random: how much faster the score falls.

    Args:
        system: what scores.
        images, texts, image_id, text_image_id: the gallery, whose first `pairs` images are explained with the first caption of each.

    Returns:
        `gap`: score after random minus score after relevant removal, the mean over nine shares of the tokens and all pairs, in standard
        deviations of the score over wrong pairs; `faster`: the share of pairs for which it is above zero.
    """
    system.eval()
    generator = torch.Generator().manual_seed(seed)
    blank = images.tokens[: 4 * pairs].mean((0, 1))
    count = min(pairs, len(image_id))
    first = torch.tensor([int((text_image_id == image_id[i]).nonzero()[0, 0]) for i in range(count)])
    with torch.no_grad():
        wrong = system.score(images.select(torch.arange(count)), texts.select(first.roll(1)))
    spread = max(float(wrong.std()), 1e-12)
    gaps = []
    for i in range(count):
        image, text = images.select(torch.tensor([i])), texts.select(first[i : i + 1])
        relevance = image_relevance(system, image, text, blank)
        real = image.mask[0].nonzero()[:, 0]
        orders = [real[torch.randperm(len(real), generator=generator)] for _ in range(ORDERS)]
        best_first = real[relevance[real].argsort(descending=True)]
        fallen = _removed(system, image, text, [best_first, *orders], blank)
        gaps.append(float(fallen[1:].mean() - fallen[0]) / spread)
    return {
        "gap": sum(gaps) / len(gaps),
        "faster": sum(gap > 0 for gap in gaps) / len(gaps),
        "pairs": float(count),
    }


@torch.no_grad()
def _removed(system: System, image: Images, text: Texts, orders: list[Tensor], blank: Tensor) -> Tensor:
    """The score after the first tokens of each order are removed, the mean over the shares: [orders]. `blank` [C] stands in their place for
    a system that looks at all places alike."""
    masks = []
    for order in orders:
        for share in SHARES:
            mask = image.mask[0].clone()
            mask[order[: min(len(order) - 1, math.ceil(share * len(order)))]] = False
            masks.append(mask)
    kept = torch.stack(masks)
    rows = torch.zeros(len(masks), dtype=torch.long)
    several = image.select(rows)._replace(mask=kept)
    several = several._replace(tokens=torch.where(kept[..., None], several.tokens, blank))
    if several.pixels is not None:  # the mean colour in their place
        side = math.isqrt(kept.shape[1])
        places = kept[:, kept.shape[1] - side**2 :].float().unflatten(1, (1, side, side))
        several = several._replace(pixels=several.pixels * F.interpolate(places, several.pixels.shape[-2:]))
    scores = system.score(several, text.select(rows))
    return scores.view(len(orders), len(SHARES)).mean(1)
