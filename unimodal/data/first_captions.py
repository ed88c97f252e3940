"""A split of which only the first captions of each image are read: COCO's protocol has five, where some images have seven."""

from __future__ import annotations

from PIL import Image

from unimodal.data.pairs import Pairs, fingerprint


class FirstCaptions:
    """The first `count` captions of every image of another split (`unimodal.data.pairs.Pairs`).

    Raises:
        ValueError: for a count below 1, or an image with fewer captions.
    """

    def __init__(self, pairs: Pairs, count: int) -> None:
        if count < 1:
            raise ValueError(f"got {count} captions per image; expected at least 1")
        for i in range(len(pairs)):
            if len(pairs.captions(i)) < count:
                raise ValueError(
                    f"{pairs.key(i)} has {len(pairs.captions(i))} captions, fewer than the {count} per image asked for; "
                    "ask for fewer, or leave the number out to use all"
                )
        self.pairs, self.count = pairs, count
        self.name, self.split = pairs.name, pairs.split

    def __len__(self) -> int:
        return len(self.pairs)

    def image(self, i: int) -> Image.Image:
        return self.pairs.image(i)

    def captions(self, i: int) -> list[str]:
        return self.pairs.captions(i)[: self.count]

    def key(self, i: int) -> str:
        return self.pairs.key(i)

    def image_id(self, i: int) -> int:
        return self.pairs.image_id(i)

    def fingerprint(self) -> str:
        return fingerprint((self.key(i), self.captions(i)) for i in range(len(self)))

    def negatives(self, i: int, c: int) -> list[str]:
        return self.pairs.negatives(i, c)
