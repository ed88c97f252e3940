"""Scenes as a split of image-text pairs, made by the program: no download, no file.

Scene i depends on (seed, split, i) and on the scenes before it, never on how many are asked for: a longer split begins
with the shorter one. No two scenes of a split, and none of two splits, have the same objects in the same relation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unimodal.data.pairs import fingerprint
from unimodal.data.scenes.drawing import render
from unimodal.data.scenes.language import Form, sample_forms, write
from unimodal.data.scenes.symbols import SPLITS, Scene, false_variants, names_held_out, sample_scene


@dataclass(frozen=True)
class Swap:
    """A true caption, a false one that differs in one respect, and which respect (see `false_variants`)."""

    caption: str
    negative: str
    kind: str


class Scenes:
    """Pictures of two or three objects with five captions each (`unimodal.data.pairs.Pairs`).

    Args:
        split: "train", "val" or "test"; see `symbols.HELD_OUT` for what they hold out.
        size: side of the pictures in pixels, at least 32.
        count: number of scenes; by default 6000, 500 and 500.
        seed: another seed gives another data set.
        objects: 2 or 3.
        first: scenes of the split that are left out at its start; what follows those of a training was not in it, and its combinations of
            attributes were.
    """

    name = "scenes"

    def __init__(
        self, split: str, *, size: int = 32, count: int | None = None, seed: int = 0, objects: int = 2, first: int = 0
    ):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        if objects not in (2, 3):
            raise ValueError(f"a scene has 2 or 3 objects, got objects={objects}")
        if size < 32:
            raise ValueError(f"scenes need at least 32 pixels to show their objects, got size={size}")
        if count is not None and count < 1:
            raise ValueError(f"count={count}: a split needs at least one scene")
        if first < 0:
            raise ValueError(f"first={first}: a split is read from its start on, so give 0 or more")
        self.split, self.size, self.seed, self.objects, self.first = split, size, seed, objects, first
        self.scenes: list[Scene] = []
        self._forms: list[list[Form]] = []
        seen: set[tuple] = set()
        for i in range(first + (SPLITS[split] if count is None else count)):
            rng = self._rng("scene", i - first)
            tries = (sample_scene(rng, split, objects) for _ in range(2000))
            scene = next((s for s in tries if s.key() not in seen), None)
            if scene is None:
                raise ValueError(
                    f"count={count}: the {split} split has few more than {i} different scenes; ask for fewer"
                )
            seen.add(scene.key())
            if i >= first:
                self.scenes.append(scene)
                self._forms.append(sample_forms(rng, objects))

    def __len__(self) -> int:
        return len(self.scenes)

    def array(self, i: int) -> np.ndarray:
        """The picture as uint8 [size, size, 3]."""
        return render(self.scenes[i], self.size, self._rng("jitter", i))

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.array(i))

    def captions(self, i: int) -> list[str]:
        return [write(self.scenes[i], form) for form in self._forms[i]]

    def labels(self, i: int) -> frozenset[str]:
        return frozenset()

    def key(self, i: int) -> str:
        return f"scenes/{self.split}/{self.first + i:06d}"

    def image_id(self, i: int) -> int:
        return i

    def fingerprint(self) -> str:
        return fingerprint((self.key(i), self.captions(i)) for i in range(len(self)))

    def later(self, count: int) -> Scenes:
        """The `count` scenes of the same split that follow these: new scenes of the same combinations of attributes."""
        first = self.first + len(self)
        return Scenes(self.split, size=self.size, count=count, seed=self.seed, objects=self.objects, first=first)

    def swaps(self, i: int) -> list[Swap]:
        """One swap of each kind that the scene allows, its captions taken in turn."""
        by_kind: dict[str, list[Swap]] = {}
        for c in range(len(self._forms[i])):
            for swap in self._swaps(i, c):
                by_kind.setdefault(swap.kind, []).append(swap)
        return [swaps[turn % len(swaps)] for turn, swaps in enumerate(by_kind.values())]

    def negatives(self, i: int, c: int) -> list[str]:
        """False captions of image i in the form of its caption number c, one of each kind."""
        return [swap.negative for swap in self._swaps(i, c)]

    def _swaps(self, i: int, c: int) -> list[Swap]:
        scene, form = self.scenes[i], self._forms[i][c]
        caption = write(scene, form)
        swaps = []
        for kind, variant in false_variants(scene, self._rng(f"swap {c}", i)):
            # A held-out pair would occur in false captions only, and training would teach that it is always false.
            learnable = self.split != "train" or not any(names_held_out(variant, held) for held in ("val", "test"))
            negative = write(variant, form)
            if learnable and negative != caption:  # equal if the caption does not name the background
                swaps.append(Swap(caption, negative, kind))
        return swaps

    def _rng(self, purpose: str, i: int) -> random.Random:
        return random.Random(f"{purpose}/{self.seed}/{self.split}/{self.objects}/{self.first + i}")
