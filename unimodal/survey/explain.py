"""Why did a system match these two: how much each image token and each word says for the score, and a test of the answer.

Images: gradient times cross-attention where the system's words look at image tokens, integrated gradients elsewhere (Sundararajan et al.
2017, arXiv 1703.01365), both along the straight path from the mean token of the gallery. Of a system that reads pixels the path starts from
the mean colour, and a token stands for the pixels of its place. Words: integrated gradients from the embedding of the mask token to that of
the word. In cross-attention words ask, and a row of weights that sums to one says where a word looks, not how much it counts. Hidden in
the order of these weights, words make the score fall faster than in the order of what each costs alone in seven of ten systems (50 steps).

Gradient times attention is Chefer et al.'s (2021, arXiv 2103.15679) without their roll-out and with three changes. What the gradient has
in common over all tokens is taken out: weights sum to one, so removing one of many that are alike changes nothing. Heads are added before
what speaks against the match is left out. And it is the mean along the path, as a match that is certain has hardly a gradient. In a BLIP-2
of 50 steps on drawn scenes the test failed without them: -0.05 standard deviations and 25 % of 16 pairs, now 0.16 and all of them.

The test removes the most relevant tokens first: the score must fall faster than when tokens are removed at random (Samek et al. 2017, arXiv
1509.06321).

Legend: P pairs, T image tokens, L text length, C width, S steps, H attention heads, Q queries, g side of the grid of image tokens.
"""

import fnmatch
import math
from collections.abc import Iterator, Sequence
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
        steps: on the paths from a blank picture and from hidden words.

    Raises:
        ValueError: an image encoder whose tokens are on no square grid, or a system that reads none of those that are.
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
    if not tokens[prefix:].any():
        raise ValueError(
            f"{type(system).__name__} reads none of the {side * side} image tokens that have a place, so there is no heat-map; explain a "
            "system that does, or give encoders whose embedding is not made of a class token alone"
        )
    words = whole_words(processor.tokenizer, text, int(texts.mask.sum()))
    weights = word_relevance(system, encoders, one, texts, [places for _, places in words], steps=steps)
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
        blank: [T, C] or [C], the tokens of nothing, from which the path starts.
        steps: on the way from there.
    """
    rows = torch.zeros(steps, dtype=torch.long)
    several, text = images.select(rows), texts.select(rows)
    if system.needs_pixels:
        assert images.pixels is not None
        pixels = images.pixels[0]
        path = _path(torch.zeros_like(pixels), pixels, steps)
        with torch.enable_grad():
            (slope,) = _slopes(system.score(several._replace(pixels=path), text), [path])
        return _by_place((pixels * slope).sum(0), images.tokens.shape[1])
    path = _path(blank, images.tokens[0], steps)
    several = several._replace(tokens=path)
    if system.looks:
        return _attention_relevance(system, several, text) * images.mask[0]
    with torch.enable_grad():
        (slope,) = _slopes(system.score(several, text), [path])
    return ((images.tokens[0] - blank) * slope).sum(-1) * images.mask[0]


def _path(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Points on the straight path from start to end, each in the middle of a step: [S, *end]."""
    points = ((torch.arange(steps).to(end) + 0.5) / steps).view(-1, *[1] * end.ndim)
    return (start + points * (end - start)).detach().requires_grad_()


def _slopes(scores: Tensor, paths: Sequence[Tensor]) -> list[Tensor]:
    """The mean gradient of scores [S] along each path [S, *]; zero where they do not depend on it."""
    return [gradient.mean(0) for gradient in torch.autograd.grad(scores.sum(), paths, materialize_grads=True)]


def _by_place(said: Tensor, tokens: int) -> Tensor:
    """What pixels [H, W] say, added up over the places of a grid; tokens without a place come first and say nothing: [T]."""
    side = math.isqrt(tokens)
    cells = F.adaptive_avg_pool2d(said[None], side).flatten() * said.numel() / side**2
    return torch.cat([cells.new_zeros(tokens - side**2), cells])


def _attention_relevance(system: System, images: Images, texts: Texts) -> Tensor:
    """Gradient times attention, summed over heads, what speaks against the match left out, summed over queries and layers: [T], the mean of
    S points.

    As w (g - sum of w g), for weights w and the score's gradient g of them, it is the gradient of what the softmax makes the weights of.
    """
    with torch.enable_grad(), _watched(system) as seen:
        score = system.score(images, texts).sum()
        if not seen:
            raise ValueError(
                f"{type(system).__name__}.looks is {system.looks!r}, but scoring a pair calls no Attention or nn.Softmax of such a name; "
                "name the layers by which texts look at image tokens, or leave it empty"
            )
        gradients = torch.autograd.grad(score, seen, materialize_grads=True)
    steps, count = images.tokens.shape[:2]
    by_query = [gradient.reshape(steps, -1, *gradient.shape[-2:]).sum(1) for gradient in gradients]  # [S, Q, T]
    by_token = [said.clamp(min=0).sum((0, 1))[-count:] for said in by_query]  # class tokens come first
    return torch.stack(by_token).sum(0) / steps


@contextmanager
def _watched(system: System) -> Iterator[list[Tensor]]:
    """What the softmax makes attention weights of, [S, H, Q, T] or [S, Q, T], in each pass through layers that look at image tokens."""
    seen: list[Tensor] = []

    def attend(layer: Attention, inputs: tuple[Any, ...], _: Tensor) -> Tensor:
        """The layer's output once more, step by step: its own attention is in one piece."""
        x, keys, values, bias, index = (*inputs, None, None)[:5]
        rows = slice(None) if index is None else index
        queries = layer.query(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        scores = queries @ keys[rows].transpose(-1, -2) * queries.shape[-1] ** -0.5
        seen.append(scores if bias is None else scores + bias[rows])
        return layer.output((seen[-1].softmax(-1) @ values[rows]).transpose(1, 2).flatten(2))

    def keep(layer: nn.Softmax, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])

    hooks = []
    for name, module in system.named_modules():
        looks = any(fnmatch.fnmatchcase(name, pattern) for pattern in system.looks)
        if looks and isinstance(module, Attention):
            hooks.append(module.register_forward_hook(attend))
        elif looks and isinstance(module, nn.Softmax):
            hooks.append(module.register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def word_relevance(
    system: System,
    encoders: Encoders,
    images: Images,
    texts: Texts,
    words: Sequence[Sequence[int]],
    *,
    steps: int = STEPS,
) -> list[float]:
    """What each word says for the score of one image with one text, which is read anew for it; all words together say what the score falls
    by when they are hidden.

    Args:
        system: what scores.
        encoders: by which it was trained.
        images: one.
        texts: one.
        words: the places of each word's tokens.
        steps: on the way from hidden words.

    Raises:
        ValueError: an encoder that does not look its words up in an `nn.Embedding`.
    """
    hidden = texts.ids[0].clone()
    hidden[[place for places in words for place in places]] = encoders.mask_id
    rows = torch.zeros(steps, dtype=torch.long)
    ids, mask, _ = texts.select(rows)
    with torch.enable_grad(), _on_the_way((encoders.backbone, system), ids, hidden) as paths:
        tokens = encoders.backbone.text_features(ids, mask) * mask[..., None]
        scores = system.score(images.select(rows), Texts(ids, mask, tokens))
        if not paths:
            raise ValueError(
                f"{type(encoders.backbone).__name__} looked up no word in an embedding (torch.nn.Embedding), so there is no path from a "
                "hidden word to the word; give the text tower one"
            )
        slopes = _slopes(scores, [path for path, _ in paths])
    said = torch.stack([(way * slope).sum(-1) for (_, way), slope in zip(paths, slopes)]).sum(0)  # [L]
    return [float(said[list(places)].sum()) for places in words]


@contextmanager
def _on_the_way(modules: Sequence[nn.Module], ids: Tensor, hidden: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Whoever looks up ids [S, L], S times the same text, gets the points of the path from its hidden words [L] to them. Yields each path
    [S, L, C] with the whole way [L, C]: one of the frozen text encoder, one of a system that reads ids itself."""
    paths: list[tuple[Tensor, Tensor]] = []

    def lead(layer: nn.Embedding, inputs: tuple[Tensor], found: Tensor) -> Tensor | None:
        if not torch.equal(inputs[0], ids):  # positions, for example
            return None
        start = layer.forward(hidden)
        path = _path(start, found[0], len(ids))
        paths.append((path, (found[0] - start).detach()))
        return path

    embeddings = [part for module in modules for part in module.modules() if isinstance(part, nn.Embedding)]
    hooks = [embedding.register_forward_hook(lead) for embedding in embeddings]
    try:
        yield paths
    finally:
        for hook in hooks:
            hook.remove()


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
        images, texts, image_id, text_image_id: the gallery, whose first images are explained with the first caption of each.
        pairs: how many, at most.
        seed: of the random orders.

    Raises:
        ValueError: fewer than two images, of which no wrong pair can be made.

    Returns:
        `gap`: score after random minus score after relevant removal, the mean over nine shares of the tokens and all pairs, in standard
        deviations of the score over wrong pairs; `faster`: the share of pairs for which it is above zero.
    """
    system.eval()
    generator = torch.Generator().manual_seed(seed)
    blank = images.tokens[: 4 * pairs].mean((0, 1))
    count = min(pairs, len(image_id))
    if count < 2:
        raise ValueError(
            f"deletion test: got {count} pair; expected at least 2, whose wrong pairs say how far scores spread: rank more images"
        )
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
