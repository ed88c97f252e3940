"""The heads that a published design is by itself: its embedding, its pair score, its captions. Their weights are the system's.

Legend: B images, M texts, P pairs, T image tokens, L text length, C width of the tokens, E embedding width.
"""

from typing import Any

import torch
from torch import Tensor

from unimodal.heads.base import Body, CaptioningHead, Embedder, Reads
from unimodal.heads.matching import KeepsTokens
from unimodal.states import ImageState, TextState
from unimodal.systems import Images, Texts


def images_of(state: ImageState) -> Images:
    """What a system reads of images."""
    return Images(state.tokens, state.mask)


def texts_of(state: TextState) -> Texts:
    """What a system reads of texts; padding is zero."""
    tokens = state.tokens * state.mask[..., None] if state.tokens.ndim == 3 else state.tokens
    return Texts(state.ids, state.mask, tokens)


class SystemEmbedder(Embedder):
    """A system's embedding.

    Args:
        towers: the towers whose tokens the system reads.
        several: the number of vectors of an image, 0 where an image has a single one.
    """

    def __init__(self, towers: tuple[str, ...], several: int) -> None:
        self.towers, self.several = towers, several

    def vectors(self, body: Body) -> int:
        return self.several

    def image(self, body: Body, state: ImageState) -> Tensor:
        return body.system.embed_images(images_of(state))

    def text(self, body: Body, state: TextState) -> Tensor:
        return body.system.embed_texts(texts_of(state))

    def path(self, reads: Reads) -> tuple[str, ...]:
        return _path(reads, self.towers)


class SystemMatchingHead(KeepsTokens):
    """A system's pair score. An index keeps image tokens, and the ids of texts, which the text tower reads again.

    Args:
        towers: the towers whose tokens the system reads.
    """

    def __init__(self, towers: tuple[str, ...]) -> None:
        super().__init__()
        self.towers = towers

    def match(self, body: Body, image: ImageState, text: TextState, image_index: Tensor, text_index: Tensor) -> Tensor:
        texts = texts_of(text)
        if "text" in self.towers and texts.tokens.ndim == 2:  # ids of an index
            texts = body.system.encoders.read_texts(text.ids, text.mask)
        images, words = body.system.image_state(images_of(image)), body.system.text_state(texts)
        return body.system.score_pairs(tuple(x[image_index] for x in images), tuple(x[text_index] for x in words))

    def rows(self, body: Body, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        row = torch.arange(len(text), device=text.device)
        mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        return self.match(body, *self.restored(image, mask, text, text_mask), row, row)

    def path(self, reads: Reads) -> tuple[str, ...]:
        return _path(reads, self.towers)


class SystemCaptioner(CaptioningHead):
    """A system's own captions, the likeliest word at a time."""

    def logits(self, body: Body, image: ImageState, ids: Tensor, mask: Tensor | None) -> Tensor:
        raise ValueError(
            "this model's captions are a published design's own, which trains them by its own losses (unimodal.tasks.SystemLosses) and "
            "scores no caption of others"
        )

    def write(self, body: Body, image: ImageState, **options: Any) -> list[list[int]]:
        most = options.pop("max_new_tokens", None)
        if asked := [name for name, value in options.items() if value not in (None, False, 1, 1.0)]:
            raise ValueError(
                f"caption: {asked[0]} is {options[asked[0]]!r}, but this model's captions are a published design's own, which writes the "
                "likeliest word at a time; leave it out"
            )
        return [ids[:most] for ids in body.system.write(images_of(image))]

    def probe(self, body: Body, pixels: Any, image: ImageState, ids: Tensor) -> Tensor:
        """Captions of fixed images, padded by -1."""
        return self.example(body, pixels, image, ids.shape[1])["caption"]

    def path(self, reads: Reads) -> tuple[str, ...]:
        return _path(reads, ("image",))


def _path(reads: Reads, towers: tuple[str, ...]) -> tuple[str, ...]:
    return ("system.*", *reads.images, *(reads.texts if "text" in towers else ()))
