"""Toy encoders and pairs for every test of a system: random image tokens, texts of random words, nothing to download."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from unimodal.systems import Batch, Images, Texts

WORDS = 60
PAD, START, END, MASK = 0, 1, 2, 3


class ToyBackbone(nn.Module):
    """Two image towers side by side (6 x 6 pixels to 3 x 3 places, 12 channels each) and a text tower, with an embedding of their own."""

    embeds = 8

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.beside = (
            nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 12, 2, 2), bn1=nn.BatchNorm2d(12))) for _ in range(2)
        )
        settings = BertConfig(
            vocab_size=WORDS, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
        )
        self.bridge_projection = nn.Linear(24, 4)  # what no feature depends on
        self.text = BertModel(settings, add_pooling_layer=False)

    def tower(self, kind: str) -> tuple[str, ...]:
        return ("text.*",) if kind == "text" else ("vision.*", "beside.*")

    def image_features(self, pixels: Tensor) -> Tensor:
        maps = torch.cat([self.vision(pixels), self.beside(pixels)], 1)
        return maps.flatten(2).transpose(1, 2)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def image_embedding(self, features: Tensor, mask: Tensor | None) -> Tensor:
        return nn.functional.normalize(features.mean(1)[:, :8], dim=-1)

    def text_embedding(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.normalize(features.sum(1)[:, :8], dim=-1)


class ToyEncoders:
    """Encoders as the survey's systems know them: 9 image tokens (a grid of 3 x 3) of width 24, texts of width 20.

    The text encoder is a table of words and a running mean: like a real one it is frozen, and tells words apart by their neighbours.
    """

    image_width, text_width, image_tokens, max_length = 24, 20, 9, 12
    vocab_size, pad_id, start_id, end_id, mask_id = WORDS, PAD, START, END, MASK
    frame, special_ids = ([START], [END]), [PAD, START, END]

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.backbone: Any = ToyBackbone().eval()
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(WORDS, self.text_width, generator=generator)

    def unplaced(self, tokens: Tensor) -> Tensor:
        return tokens

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Words are hashed by their letters."""
        rows = [[START, *(4 + sum(map(ord, word)) % (WORDS - 4) for word in text.split()), END] for text in texts]
        ids = torch.full((len(rows), max(map(len, rows))), PAD)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, ids != PAD

    def read_texts(self, ids: Tensor, mask: Tensor) -> Texts:
        words = self.table[ids] * mask[..., None]
        mean = words.sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp(min=1)
        return Texts(ids, mask, (words + 0.5 * mean) * mask[..., None])


def toy_pairs(count: int = 64, encoders: ToyEncoders | None = None, *, seed: int = 0, captions: int = 1) -> Batch:
    """`count` images with `captions` texts each, one row for a text; images have one of four categories."""
    encoders = encoders or ToyEncoders()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, encoders.image_tokens, encoders.image_width, generator=generator)
    rows = torch.arange(count).repeat_interleave(captions)
    ids = torch.randint(4, WORDS, (len(rows), 8), generator=generator)
    lengths = torch.randint(4, 7, (len(rows),), generator=generator)
    ids[:, 0] = START
    place = torch.arange(8)
    ids[place[None] == lengths[:, None]] = END
    ids[place[None] > lengths[:, None]] = PAD
    pixels = torch.randn(count, 3, 6, 6, generator=generator)
    images = Images(tokens[rows], torch.ones(len(rows), encoders.image_tokens, dtype=torch.bool), pixels[rows])
    labels = nn.functional.one_hot(rows % 4, 4).float()
    return Batch(images, encoders.read_texts(ids, ids != PAD), rows, labels)


def endless(batch: Batch, size: int, *, seed: int = 0) -> Iterator[Batch]:
    """Random batches of `size` rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield part(batch, torch.randperm(len(batch.image_id), generator=generator)[:size])


def part(batch: Batch, rows: Tensor) -> Batch:
    """These rows of a batch."""
    labels = None if batch.labels is None else batch.labels[rows]
    return Batch(batch.images.select(rows), batch.texts.select(rows), batch.image_id[rows], labels)
