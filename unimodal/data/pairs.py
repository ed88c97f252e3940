"""What every reader of image-text pairs offers, and what works on any of them: a fingerprint and a check.

A split is a sequence of images with their captions. Nothing here tokenises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from unimodal.data.captions import MISSING, is_written_list


class Pairs(Protocol):
    """One split of an image-text data set, by random access; `i` counts images from 0."""

    name: str
    split: str

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image:
        """The picture, in RGB."""

    def captions(self, i: int) -> list[str]:
        """Every caption of image i: at least one, or none for every image of a gallery."""

    def labels(self, i: int) -> frozenset[str]:
        """The categories of image i, which its captions share; empty where a reader has none."""

    def key(self, i: int) -> str:
        """File or member name: what messages call this image."""

    def image_id(self, i: int) -> int:
        """Equal for equal images: what the multi-positive losses compare."""

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the keys, captions and labels of the split."""

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


@dataclass(frozen=True)
class Problem:
    """What is wrong with image `index` of a split, which `key` names."""

    index: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def check(pairs: Pairs) -> list[Problem]:
    """Open every picture and look at every caption of a split; a sound split gives an empty list."""
    problems, gallery = [], is_gallery(pairs)
    for i in range(len(pairs)):
        reasons = [None if gallery else caption_fault(pairs.captions(i))]
        try:
            pairs.image(i)
        except (OSError, ValueError) as error:
            reasons.append(str(error))
        problems += [Problem(i, pairs.key(i), reason) for reason in reasons if reason]
    return problems


def is_gallery(pairs: Pairs) -> bool:
    """Whether the split has pictures without any caption: enough to search and to caption, not to train."""
    return not any(pairs.captions(i) for i in range(len(pairs)))


def require_captions(pairs: Pairs, purpose: str) -> None:
    """Refuse a gallery for a purpose that reads captions.

    Raises:
        ValueError: names the split, and says where captions go.
    """
    if is_gallery(pairs):
        raise ValueError(
            f"{pairs.name} {pairs.split} holds {len(pairs)} pictures and no caption, and {purpose} reads captions; write one "
            "caption a line into a .txt file beside each picture, or name a reader that has captions"
        )


def caption_fault(captions: Any) -> str | None:
    """What is wrong with the captions of one image, or None."""
    if not isinstance(captions, list) or not captions:
        return f"expected a list of at least one caption, got {captions!r:.60}"
    for c, caption in enumerate(captions):
        if not isinstance(caption, str):
            return f"caption {c} is {type(caption).__name__} {caption!r:.60}; expected a string"
        if not caption.strip():
            return f"caption {c} is empty; give it words"
        if caption.strip() in MISSING:
            return f"caption {c} is {caption.strip()!r}, which stands for a missing one; give it words"
        if wrong := next((character for character in caption if "\ud800" <= character <= "\udfff"), None):
            byte = f" (byte 0x{ord(wrong) - 0xDC00:02x})" if "\udc80" <= wrong <= "\udcff" else ""
            return f"caption {c} is {caption!r:.60}, which is no valid Unicode{byte}; write it as UTF-8"
        if "\0" in caption:
            return f"caption {c} is {caption!r:.60}, which holds a zero byte; write it as UTF-8"
        if not any(
            character.isprintable() and character != " " for character in caption
        ):  # such as a byte-order mark alone
            return f"caption {c} is {caption!r:.60}, which shows nothing; give it words"
        if is_written_list(caption):
            return f"caption {c} is {caption!r:.60}, a list written as text; give each caption its own place"
    return None
