"""What every reader of image-text pairs offers, and two things that work on any of them.

A split is a sequence of images with their captions. Nothing here decodes or tokenises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

from PIL import Image


class Pairs(Protocol):
    """One split of an image-text data set, by random access; `i` counts images from 0."""

    name: str
    split: str

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image:
        """The picture, in RGB."""

    def captions(self, i: int) -> list[str]:
        """Every caption of image i, at least one."""

    def key(self, i: int) -> str:
        """File or member name: what messages call this image."""

    def image_id(self, i: int) -> int:
        """Equal for equal images: what the multi-positive losses compare."""

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the keys and captions of the split."""

    def negatives(self, i: int, c: int) -> list[str]:
        """Captions that are wrong for image i, derived from its caption number c; empty where a reader has none."""


def fingerprint(entries: Iterable[tuple[str, list[str]]]) -> str:
    """First 16 hexadecimal digits of the sha256 of (key, captions) in order."""
    digest = hashlib.sha256()
    for key, captions in entries:
        for text in (key, *captions):
            digest.update(text.encode() + b"\0")
        digest.update(b"\n")
    return digest.hexdigest()[:16]
