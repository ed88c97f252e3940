"""A model's backbone as its system reads it: image tokens that hold where they stand, text tokens, and the words of the tokenizer.

Legend: B images, M texts, T image tokens, L text length, C width of the tokens.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.backbones import Backbone
from unimodal.backbones.towers import sincos_positions
from unimodal.config import WordsConfig
from unimodal.systems.base import Texts


class BackboneEncoders:
    """What `unimodal.systems.Encoders` asks for, of a backbone that may train.

    Args:
        backbone: reads images and texts apart, or images alone.
        words: of the tokenizer. They may change, when a training learns which tokenizer it has (`System.learn_words`).

    Raises:
        ValueError: the backbone reads items as one sequence.
    """

    def __init__(self, backbone: Backbone, words: WordsConfig) -> None:
        if backbone.whole:
            raise ValueError(
                "system: this backbone reads an item's images and words as one sequence, and a system reads images and texts apart; give "
                "another backbone (two towers, clip, siglip, siglip2, blip-2), or leave system out and let the backbone embed by itself"
            )
        self.backbone, self.words = backbone, words
        self.image_width, self.text_width = backbone.width, backbone.text_width
        self.image_tokens, self.vocab_size = backbone.most_image_tokens, backbone.vocab_size
        self.max_length = backbone.max_length

    @property
    def pad_id(self) -> int:
        return self.words.pad_id

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        start, end = ([] if token is None else [token] for token in (self.words.start_id, self.words.end_id))
        return start, end

    @property
    def special_ids(self) -> list[int]:
        return [self.pad_id, *self.frame[0], *self.frame[1]]

    @property
    def start_id(self) -> int:
        return self._required("start_id", "begins texts")

    @property
    def end_id(self) -> int:
        return self._required("end_id", "ends texts")

    @property
    def mask_id(self) -> int:
        return self._required("mask_id", "hides a word")

    def _required(self, name: str, purpose: str) -> int:
        token = getattr(self.words, name)
        if token is None:
            raise ValueError(
                f"system: it needs a token that {purpose}, and this tokenizer has none to spare (system.words.{name} is null); give a "
                "backbone whose tokenizer has one, or a system that neither hides nor writes words"
            )
        return token

    def placed(self, tokens: Tensor) -> Tensor:
        """Image tokens [B, T, C] with their positions, where the backbone adds none."""
        return tokens if self.backbone.placed else tokens + positions_like(tokens, self.backbone.prefix_tokens)

    def unplaced(self, tokens: Tensor) -> Tensor:
        """Image tokens [B, T, C] without what `placed` added."""
        return tokens if self.backbone.placed else tokens - positions_like(tokens, self.backbone.prefix_tokens)

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts that the configuration knows -> ids [M, L] and mask [M, L].

        Raises:
            ValueError: it does not know one.
        """
        if unknown := [text for text in texts if text not in self.words.known]:
            raise ValueError(
                f"system: system.words.known has no token ids of {unknown[0]!r}, which the system holds; leave system.words out, and a "
                "training fills it in"
            )
        rows = [self.words.known[text] for text in texts]
        ids = torch.full((len(rows), max(map(len, rows))), self.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        return ids, mask

    def read_texts(self, ids: Tensor, mask: Tensor) -> Texts:
        """What the text tower makes of these ids; with gradient where the tower trains."""
        tokens, mask = self.backbone.text_tokens(self.backbone.text_features(ids, mask), mask)
        return Texts(ids, mask, tokens * mask[..., None])


def positions_like(tokens: Tensor, prefix: int) -> Tensor:
    """Positions [T, C] of image tokens [B, T, C]: sine and cosine of row and column for a square grid, of the place in the sequence
    otherwise; zeros for the `prefix` class and register tokens before them, and in what a width leaves beyond a multiple of four."""
    count, width = tokens.shape[1] - prefix, tokens.shape[2]
    side = math.isqrt(count)
    positions = sincos_positions(*((side, side) if side * side == count else (count, 1)), width - width % 4)
    return F.pad(positions, (0, width % 4, prefix, 0)).to(tokens)
