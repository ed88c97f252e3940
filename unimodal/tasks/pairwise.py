"""How an evaluation scores pairs of a split: from what was read of each image and text once, or each pair read whole, as one conversation.

Legend: I images, C captions, P pairs, M texts.
"""

from typing import Protocol

import torch
from torch import Tensor

from unimodal.data.items import Item
from unimodal.data.pairs import Pairs
from unimodal.model import ImageState, TextState, UnimodalModel
from unimodal.search import Encoder

CONVERSATIONS = 32  # pairs that are read as one conversation each, at a time


class Pairwise(Protocol):
    """Match logits of pairs of a split's images and captions, by their rows."""

    def add(self, image: ImageState, text: TextState) -> None:
        """Take what was read of the next images and of their captions."""

    @property
    def held(self) -> list[ImageState | TextState]:
        """The states that it keeps."""

    def match(self, image_rows: Tensor, text_rows: Tensor, *, image_asks: bool) -> Tensor:
        """Match logits [P], float32, of images and captions; whether the image is the query, or the text."""

    def match_texts(self, image_rows: Tensor, texts: list[str], state: TextState) -> Tensor:
        """Match logits [M], float32, of images with texts of no split, and what was read of these texts."""


class StatePairs:
    """Pairs scored from states, each read once.

    Args:
        model: with a matching head that reads states.
        batch_size: pairs at a time.
    """

    def __init__(self, model: UnimodalModel, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.images: list[ImageState] = []
        self.texts: list[TextState] = []

    def add(self, image: ImageState, text: TextState) -> None:
        self.images.append(image)
        self.texts.append(text)

    @property
    def held(self) -> list[ImageState | TextState]:
        return [*self.images, *self.texts]

    def _whole(self) -> tuple[ImageState, TextState]:
        """All images and all texts as one state each; padded to the longest."""
        if len(self.images) > 1:
            tokens, mask, bridged = zip(*(image[:3] for image in self.images), strict=True)
            self.images = [ImageState(_padded(tokens), _padded(mask), torch.cat(bridged))]
            ids, mask, tokens, bridged = zip(*(text[:4] for text in self.texts), strict=True)
            self.texts = [TextState(_padded(ids), _padded(mask), _padded(tokens), torch.cat(bridged))]
        return self.images[0], self.texts[0]

    def match(self, image_rows: Tensor, text_rows: Tensor, *, image_asks: bool) -> Tensor:
        image, text = self._whole()
        order = text.mask.sum(1)[text_rows].argsort(stable=True)  # by length, so that few read another's padding
        out = torch.empty(len(text_rows), dtype=torch.float32, device=text_rows.device)
        for rows in order.split(self.batch_size):
            images, image_index = image_rows[rows].unique(return_inverse=True)
            texts, text_index = text_rows[rows].unique(return_inverse=True)
            some = text.select(texts).trim()
            out[rows] = self.model.match(image.select(images), some, image_index, text_index).float()
        return out

    def match_texts(self, image_rows: Tensor, texts: list[str], state: TextState) -> Tensor:
        image, _ = self._whole()
        images, index = image_rows.unique(return_inverse=True)
        rows = torch.arange(len(texts), device=image_rows.device)
        return self.model.match(image.select(images), state, index, rows).float()


class ConversationPairs:
    """Pairs that a vision-language model reads whole: query and document as one conversation.

    Args:
        encoder: reads and judges.
        pairs: the split.
    """

    def __init__(self, encoder: Encoder, pairs: Pairs) -> None:
        self.encoder, self.pairs = encoder, pairs
        self.captions = [caption for i in range(len(pairs)) for caption in pairs.captions(i)]

    def add(self, image: ImageState, text: TextState) -> None:
        """A conversation reads both anew."""

    @property
    def held(self) -> list[ImageState | TextState]:
        return []

    def match(self, image_rows: Tensor, text_rows: Tensor, *, image_asks: bool) -> Tensor:
        texts = [self.captions[row] for row in text_rows.tolist()]
        return self._judge(image_rows, texts, image_asks=image_asks)

    def match_texts(self, image_rows: Tensor, texts: list[str], state: TextState) -> Tensor:
        return self._judge(image_rows, texts, image_asks=False)

    def _judge(self, image_rows: Tensor, texts: list[str], *, image_asks: bool) -> Tensor:
        asked = {text: Item(text=text) for text in texts}
        out = []
        for rows in torch.arange(len(texts)).split(32 * CONVERSATIONS):  # their pictures are in memory together
            images = image_rows[rows.to(image_rows.device)].tolist()
            shown = {row: Item(image=self.pairs.image(row)) for row in set(images)}
            both = [(asked[texts[i]], shown[row]) for i, row in zip(rows.tolist(), images)]
            ordered = [(image, text) for text, image in both] if image_asks else both
            out.append(self.encoder.judge(ordered, None, CONVERSATIONS))
        return torch.cat(out).to(image_rows.device)


def _padded(parts: tuple[Tensor, ...]) -> Tensor:
    """Rows [n, L, ...] of different L one after another, with zeros, or False in a mask, to the longest; [n, 0] stays."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(p, (*[0, 0] * (p.ndim - 2), 0, longest - p.shape[1])) for p in parts])
