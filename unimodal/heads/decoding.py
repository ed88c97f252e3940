"""Choosing words one after another: greedy, sampling, beam search. One loop for every captioner, all rows of a batch at
once.

A captioner gives a function `step(ids [R, 1], cache) -> logits [R, V]`, which continues each row by one token and
extends the cache. Beam search takes the cache's rows along with the beams it keeps. Nucleus sampling: Holtzman et al.
2020 (arXiv 1904.09751).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unimodal.layers import KeyValues

Step = Callable[[Tensor, KeyValues], Tensor]


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
        generator: source of randomness of the draws.

    Raises:
        ValueError: a setting is outside its range, or beams are to be drawn.
    """

    max_new_tokens: int = 30
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    length_penalty: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams: expected at least 1, got {self.num_beams}")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature: expected more than 0, got {self.temperature}; for the likeliest word use do_sample=False"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a share in (0, 1], got {self.top_p}")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"do_sample=True draws one caption, but num_beams is {self.num_beams}; choose one of the two"
            )


def beam_rows(images: int, num_beams: int, device: torch.device) -> Tensor:
    """The image of every row, [images * num_beams]: 0 0 0 1 1 1 ... for three beams."""
    return torch.arange(images, device=device).repeat_interleave(num_beams)


def decode(
    step: Step, cache: KeyValues, bos: Tensor, eos_id: int, decoding: Decoding, max_length: int
) -> list[list[int]]:
    """One caption per image, without start and end token.

    Args:
        step: continues rows by a token, see above.
        cache: what the captioner holds before the first token, one row per image and beam (`beam_rows`).
        bos: [B * num_beams, 1], the start token of every row.
        eos_id: the token that ends a caption.
        decoding: how to choose.
        max_length: positions that the captioner has.
    """
    length = min(decoding.max_new_tokens, max_length)
    if decoding.num_beams > 1:
        tokens = _beam_search(step, cache, bos, eos_id, length, decoding.num_beams, decoding.length_penalty)
    else:
        tokens = _one_by_one(step, cache, bos, eos_id, length, decoding)
    captions = tokens.tolist()
    return [caption[: caption.index(eos_id)] if eos_id in caption else caption for caption in captions]


def _one_by_one(step: Step, cache: KeyValues, last: Tensor, eos_id: int, length: int, decoding: Decoding) -> Tensor:
    """The likeliest or a drawn word at a time: -> [B, at most length]; what follows an end token means nothing."""
    chosen = []
    done = torch.zeros_like(last, dtype=torch.bool)  # [B, 1]
    for _ in range(length):
        logits = step(last, cache)
        last = _draw(logits, decoding) if decoding.do_sample else logits.argmax(-1, keepdim=True)
        chosen.append(last)
        done = done | (last == eos_id)
        if done.all():
            break
    return torch.cat(chosen, 1)


def _draw(logits: Tensor, decoding: Decoding) -> Tensor:
    """One word per row from the nucleus: [B, V] -> [B, 1]."""
    probabilities, words = (logits.float() / decoding.temperature).softmax(-1).sort(-1, descending=True)
    likelier = probabilities.cumsum(-1) - probabilities  # the mass before each word: the likeliest is always in
    probabilities = probabilities.masked_fill(likelier >= decoding.top_p, 0)
    return words.gather(1, torch.multinomial(probabilities, 1, generator=decoding.generator))


def _beam_search(
    step: Step, cache: KeyValues, last: Tensor, eos_id: int, length: int, beams: int, penalty: float
) -> Tensor:
    """The best of `beams` hypotheses per image: -> [B, at most length].

    A finished hypothesis stays in its beam with its score and competes, by score per length, with those still growing.
    """
    images = len(last) // beams
    first_row = torch.arange(images, device=last.device)[:, None] * beams  # [B, 1]
    tokens = last.new_empty(images, beams, 0)
    size = last.new_zeros(images, beams)  # tokens of each hypothesis
    done = torch.zeros_like(size, dtype=torch.bool)
    total = torch.zeros(images, beams, device=last.device)
    total[:, 1:] = float("-inf")  # all beams start equal: let the first one branch
    for _ in range(length):
        growth = step(last, cache).float().log_softmax(-1).unflatten(0, (images, beams))  # [B, K, V]
        stay = torch.full_like(growth[0, 0], float("-inf"))
        stay[eos_id] = 0.0
        growth = torch.where(done[..., None], stay, growth)
        size = size + ~done
        candidates = total[..., None] + growth  # [B, K, V]
        ranked = candidates / size[..., None] ** penalty
        best = ranked.flatten(1).topk(beams).indices  # [B, K]
        total = candidates.flatten(1).gather(1, best)
        parent, word = best // growth.shape[-1], best % growth.shape[-1]
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand_as(tokens)), word[..., None]], 2)
        size, done = size.gather(1, parent), done.gather(1, parent) | (word == eos_id)
        if done.all():
            break
        cache = cache.select((first_row + parent).flatten())
        last = word.reshape(-1, 1)
    return tokens[:, 0]
