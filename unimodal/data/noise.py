"""Captions corrupted on purpose, and the same ones every time: how well does a system bear noise?

Three kinds, from crude to fine: the caption of any other image (`random`), the caption of another image that shows an object of the same
name (`category`), the own caption with one attribute changed (`swap`).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unimodal.data.nouns import objects_in
from unimodal.data.pairs import Pairs

Kind = Literal["random", "category", "swap"]

# Attributes that can stand for each other; the first list that names a word of the caption is used.
ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    ("red", "blue", "green", "yellow", "orange", "purple", "pink", "cyan", "black", "white", "brown", "grey"),
    ("two", "three", "four", "five"),
    ("big", "little"),
    ("large", "small"),
    ("left", "right"),
    ("above", "below"),
    ("young", "old"),
    ("man", "woman"),
    ("boy", "girl"),
    ("dog", "cat"),
)


@dataclass(frozen=True)
class Noise:
    """What share of the training captions is corrupted, and how.

    Raises:
        ValueError: a share outside [0, 1], or an unknown kind.
    """

    share: float = 0.0
    kind: Kind = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"noise: expected a share of the captions between 0 and 1, got {self.share}")
        if self.kind not in ("random", "category", "swap"):
            raise ValueError(f"noise: expected random, category or swap, got {self.kind!r}")


def corrupted(
    pairs: Pairs, captions: Sequence[Sequence[str]], places: Sequence[Sequence[tuple[int, int]]], noise: Noise
) -> list[list[str]]:
    """The captions of a split with a share of them corrupted; a caption that no corruption of the kind fits stays as it is
    (`changed` counts those that did not).

    Args:
        pairs: the split; its own false captions serve `swap` where it has them.
        captions: of each image in use, as they are.
        places: row and caption number in the split of each of them.
        noise: how much, which kind, which seed.
    """
    out = [list(texts) for texts in captions]
    draw = random.Random(f"noise-{noise.seed}-{noise.kind}")
    every = [(i, c) for i, texts in enumerate(captions) for c in range(len(texts))]
    chosen = draw.sample(every, round(noise.share * len(every)))
    showing: dict[str, list[int]] = {}
    if noise.kind == "category":
        for i, texts in enumerate(captions):
            for thing in {thing for text in texts for thing in objects_in(text)}:
                showing.setdefault(thing, []).append(i)
    for i, c in chosen:
        text = captions[i][c]
        if noise.kind == "swap":
            false = pairs.negatives(*places[i][c]) or swaps(text, draw)
            out[i][c] = draw.choice(false) if false else text
            continue
        others: Sequence[int] = range(len(captions))
        if noise.kind == "category":
            others = sorted({j for thing in objects_in(text) for j in showing[thing]})
        others = [j for j in others if j != i]
        if others:
            out[i][c] = draw.choice(list(captions[draw.choice(others)]))
    return out


def changed(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> float:
    """The share of captions that are no longer what they were."""
    pairs = [pair for texts in zip(before, after, strict=True) for pair in zip(*texts, strict=True)]
    return sum(old != new for old, new in pairs) / len(pairs)


def swaps(text: str, draw: random.Random) -> list[str]:
    """The text with one attribute changed for another of its kind, at most one variant for each kind."""
    out = []
    for kind in ATTRIBUTES:
        pattern = re.compile(rf"\b({'|'.join(kind)})\b", re.IGNORECASE)
        if found := pattern.search(text):
            other = draw.choice([word for word in kind if word != found[0].lower()])
            out.append(text[: found.start()] + other + text[found.end() :])
    return out


class NoisyCaptions:
    """A split with a share of its captions corrupted (`unimodal.data.pairs.Pairs`).

    Args:
        pairs: the split.
        noise: how much, which kind, which seed.
    """

    def __init__(self, pairs: Pairs, noise: Noise) -> None:
        clean = [pairs.captions(i) for i in range(len(pairs))]
        places = [[(i, c) for c in range(len(texts))] for i, texts in enumerate(clean)]
        self.pairs, self.noisy = pairs, corrupted(pairs, clean, places, noise)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pairs, name)

    def captions(self, i: int) -> list[str]:
        return self.noisy[i]
