"""Choosing words one after another: greedy, sampling, beam search. One loop for every captioner, all rows of a batch at
once.

A captioner gives a function `step(ids [R, 1], cache, memory) -> logits [R, V]`, which continues each row by one token and
extends the cache; the memory is what its rows read besides, and does not grow. Beam search takes the cache's rows along with
the beams it keeps. Images whose captions have ended leave the batch. Nucleus sampling: Holtzman et al.
2020 (arXiv 1904.09751).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from unimodal import arguments
from unimodal.config import nearest
from unimodal.draws import Generators, own_generators
from unimodal.layers import KeyValues

Step = Callable[[Tensor, KeyValues, KeyValues], Tensor]

LEAVING = 0.2  # share of ended captions from which the others go on without them: leaving costs a copy of the cache


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a caption is chosen.

    Args:
        max_new_tokens: longest caption in tokens, the end token included.
        num_beams: hypotheses kept per image; 1 is greedy.
        do_sample: draw words by their probability instead of taking the likeliest.
        temperature: logits are divided by it before drawing; below 1 is bolder.
        top_p: draw from the fewest words whose probabilities sum to this.
        length_penalty: beams are ranked by their log-probability / length ** length_penalty, the end token counted.
        generator: what the draws follow from: a source for all images, or one for each. A caption does not depend on the images beside
            it, see `unimodal.draws`.

    Raises:
        TypeError, ValueError: a setting is of another kind or outside its range, beams are to be drawn, or a setting of the draws comes
            without `do_sample`.
    """

    max_new_tokens: int = 30
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    length_penalty: float = 1.0
    generator: Generators = None

    def __post_init__(self) -> None:
        arguments.integer(self.max_new_tokens, "max_new_tokens")
        arguments.integer(self.num_beams, "num_beams")
        arguments.flag(self.do_sample, "do_sample")
        arguments.number(self.temperature, "temperature", above=0)
        arguments.number(self.top_p, "top_p", above=0, most=1)
        arguments.number(self.length_penalty, "length_penalty")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"do_sample=True draws one caption, but num_beams is {self.num_beams}; choose one of the two"
            )
        for name in ("temperature", "top_p"):
            if not self.do_sample and (value := getattr(self, name)) != 1:
                raise ValueError(
                    f"{name}={value} shapes what is drawn, and nothing is; add do_sample=True, or leave it out"
                )


def decoding_of(settings: Mapping[str, Any]) -> Decoding:
    """The decoding of settings by name.

    Raises:
        TypeError: there is no such setting; also what `Decoding` raises.
    """
    known = [field.name for field in fields(Decoding)]
    if unknown := [name for name in settings if name not in known]:
        raise TypeError(f"caption: no option named {unknown[0]!r}; {nearest(unknown[0], known)}")
    return Decoding(**settings)


def beam_rows(images: int, num_beams: int, device: torch.device) -> Tensor:
    """The image of every row, [images * num_beams]: 0 0 0 1 1 1 ... for three beams."""
    return torch.arange(images, device=device).repeat_interleave(num_beams)


def decode(
    step: Step,
    cache: KeyValues,
    memory: KeyValues,
    bos: Tensor,
    eos_id: int,
    decoding: Decoding,
    max_length: int,
) -> list[list[int]]:
    """One caption per image, without start and end token.

    Args:
        step: continues rows by a token, see above.
        cache: what the captioner holds before the first token, one row per image and beam (`beam_rows`).
        memory: what it reads besides, with the same rows; empty where that is nothing.
        bos: [B * num_beams, 1], the start token of every row.
        eos_id: the token that ends a caption.
        decoding: how to choose.
        max_length: positions that the captioner has.
    """
    length = min(decoding.max_new_tokens, max_length)
    if decoding.num_beams > 1:
        tokens = _beam_search(step, cache, memory, bos, eos_id, length, decoding.num_beams, decoding.length_penalty)
    else:
        tokens = _one_by_one(step, cache, memory, bos, eos_id, length, decoding)
    captions = tokens.tolist()
    return [caption[: caption.index(eos_id)] if eos_id in caption else caption for caption in captions]


def _one_by_one(
    step: Step, cache: KeyValues, memory: KeyValues, last: Tensor, eos_id: int, length: int, decoding: Decoding
) -> Tensor:
    """The likeliest or a drawn word at a time: -> [B, length]; what follows an end token means nothing."""
    chosen = last.new_full((len(last), length), eos_id)
    image = torch.arange(len(last), device=last.device)  # of each row that is left
    done = torch.zeros_like(image, dtype=torch.bool)
    uniform = _uniform(decoding.generator, len(last), length).to(last.device) if decoding.do_sample else None
    for place in range(length):
        logits = step(last, cache, memory)
        last = logits.argmax(-1, keepdim=True) if uniform is None else _draw(logits, decoding, uniform[image, place])
        chosen[image, place] = last[:, 0]
        done = done | (last[:, 0] == eos_id)
        ended = done.float().mean().item()
        if ended == 1:
            break
        if ended >= LEAVING:
            left = (~done).nonzero()[:, 0]
            image, last, done = image[left], last[left], done[left]
            cache, memory = cache.select(left), memory.select(left)
    return chosen


def _uniform(generator: Generators, images: int, length: int) -> Tensor:
    """Numbers in [0, 1) that every image draws its words by, [B, length]."""
    return torch.stack([torch.rand(length, generator=own) for own in own_generators(generator, images)])


def _draw(logits: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """One word per row from the nucleus, [B, V] -> [B, 1]: the word at which the summed probability passes `uniform` [B]."""
    # The likeliest word has 0 before the division: at whatever temperature, no number overflows.
    bolder = (logits.float() - logits.float().amax(-1, keepdim=True)) / decoding.temperature
    probabilities = bolder.softmax(-1)
    ordered, words = probabilities.sort(-1, descending=True)
    likelier = ordered.cumsum(-1) - ordered  # the mass before each word: the likeliest is always in
    outside = (likelier >= decoding.top_p).scatter(-1, words, likelier >= decoding.top_p)
    # Summed in the order of the vocabulary: words of nearly equal probability may swap places in the sorted order.
    summed = probabilities.masked_fill(outside, 0).cumsum(-1)
    whole = summed[:, -1:]
    below = (uniform[:, None] * whole).minimum(torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(summed, below, right=True)


def _beam_search(
    step: Step,
    cache: KeyValues,
    memory: KeyValues,
    last: Tensor,
    eos_id: int,
    length: int,
    beams: int,
    penalty: float,
) -> Tensor:
    """The best of `beams` hypotheses per image: -> [B, length]; what follows an end token means nothing.

    A finished hypothesis stays in its beam with its score and competes, by score per length, with those still growing.
    """
    images = len(last) // beams
    chosen = last.new_full((images, length), eos_id)
    image = torch.arange(images, device=last.device)  # of those that are left
    tokens = last.new_empty(images, beams, 0)
    size = last.new_zeros(images, beams)  # tokens of each hypothesis
    done = torch.zeros_like(size, dtype=torch.bool)
    total = torch.zeros(images, beams, device=last.device)
    total[:, 1:] = float("-inf")  # all beams start equal: let the first one branch
    for place in range(length):
        logits = step(last, cache, memory).float()
        # No hypothesis has more than K heirs among the best K.
        likeliest = logits.topk(min(beams, logits.shape[1]))
        growth = (likeliest.values - logits.logsumexp(-1, keepdim=True)).unflatten(0, (-1, beams))  # [B, K, K]
        words = likeliest.indices.unflatten(0, (-1, beams))
        stay = torch.full_like(growth[0, 0], float("-inf"))
        stay[0] = 0.0
        growth, words = torch.where(done[..., None], stay, growth), words.masked_fill(done[..., None], eos_id)
        size = size + ~done
        candidates = total[..., None] + growth
        ranked = candidates / size[..., None] ** penalty
        best = ranked.flatten(1).topk(beams).indices  # [B, K]
        total = candidates.flatten(1).gather(1, best)
        parent, word = best // growth.shape[-1], words.flatten(1).gather(1, best)
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand_as(tokens)), word[..., None]], 2)
        size, done = size.gather(1, parent), done.gather(1, parent) | (word == eos_id)
        chosen[image, : place + 1] = tokens[:, 0]
        ended = done.all(1)
        share = ended.float().mean().item()
        if share == 1:
            break
        first_row = torch.arange(len(image), device=last.device)[:, None] * beams  # [B, 1]
        rows = first_row + parent
        if share >= LEAVING:
            left = (~ended).nonzero()[:, 0]
            image, tokens, size, done, total = (x[left] for x in (image, tokens, size, done, total))
            rows, word = rows[left], word[left]
            memory = memory.select(rows.flatten())
        cache = cache.select(rows.flatten())
        last = word.reshape(-1, 1)
    return chosen
