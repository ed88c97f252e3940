"""The captioning heads: bridged image tokens -> words.

`CaptionDecoder` is a small causal transformer that cross-attends to the image tokens. `BridgeCaptioner` speaks through
the bridge's own text branch (BLIP-2, arXiv 2301.12597). Both are trained by predicting token i + 1 at position i and
decode by the same loop.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.heads.base import WORDS, Body, CaptioningHead, Reads
from unimodal.heads.decoding import beam_rows, decode, decoding_of
from unimodal.layers import Block, KeyValues, causal_bias, init_weights
from unimodal.states import ImageState

WHOLE = (
    "the captioning of this model is its backbone's own, which writes after a whole conversation and not from what was read of an image: "
    "use caption"
)


class CaptionDecoder(CaptioningHead):
    """A causal transformer over image tokens, its output layer tied to its token embedding.

    It may know fewer words than the tokenizer: `vocabulary` (part of the state) lists the tokenizer ids that its V rows
    stand for, and all others are read as `unk_id`. Ids are the tokenizer's everywhere outside; `rows_of` gives the rows
    that logits are indexed by.

    Args:
        vocab_size: V; rows stand for the tokenizer ids 0 to V - 1 until `set_vocabulary`.
        width: W, width of the image tokens.
        hidden: width inside.
        layers: number of blocks.
        heads: attention heads.
        max_length: longest caption in tokens.
        bos_id: tokenizer id that starts a caption.
        eos_id: tokenizer id that ends it.
        unk_id: tokenizer id that stands for words outside the vocabulary.
        dropout: dropout of embeddings, attention weights and every sublayer's output.
    """

    vocabulary: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        hidden: int,
        layers: int,
        heads: int,
        max_length: int,
        bos_id: int,
        eos_id: int,
        unk_id: int,
        dropout: float,
    ):
        super().__init__()
        self.max_length = max_length
        self.bos_id, self.eos_id, self.unk_id = bos_id, eos_id, unk_id
        self.register_buffer("vocabulary", torch.arange(vocab_size))
        self.token_embedding = nn.Embedding(vocab_size, hidden)
        self.position_embedding = nn.Embedding(max_length, hidden)
        self.dropout = nn.Dropout(dropout)
        self.image_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(hidden, heads, memory_width=width, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_weights)

    def set_vocabulary(self, ids: Tensor) -> None:
        """Let the V rows stand for these tokenizer ids (any order, V different ones, the special ids among them)."""
        ids = ids.unique()  # sorted, which `rows_of` searches
        absent = {self.bos_id, self.eos_id, self.unk_id} - set(ids.tolist())
        if len(ids) != len(self.vocabulary) or absent:
            raise ValueError(
                f"vocabulary: expected {len(self.vocabulary)} different ids with bos, eos and unk among them, "
                f"got {len(ids)}" + (f" without {sorted(absent)}" if absent else "")
            )
        self.vocabulary.copy_(ids)

    def rows_of(self, ids: Tensor) -> Tensor:
        """Tokenizer ids -> vocabulary rows, the targets of the caption loss; unknown ids -> the row of `unk_id`."""
        rows = torch.searchsorted(self.vocabulary, ids).clamp(max=len(self.vocabulary) - 1)
        unknown = torch.searchsorted(self.vocabulary, self.unk_id)
        return torch.where(self.vocabulary[rows] == ids, rows, unknown)

    def project_images(self, image_tokens: Tensor) -> KeyValues:
        """Keys and values of image tokens [B, N, W], for every block; `.select(index)` repeats rows."""
        return KeyValues.of((block.cross_attention for block in self.blocks), self.image_norm(image_tokens))

    def forward(self, ids: Tensor, images: Tensor | KeyValues) -> Tensor:
        """Captions [B, L], padded on the right; image tokens [B, N, W] or their keys and values -> logits [B, L, V].

        Position i predicts token i + 1. No token looks to its right, so padding needs no mask.
        """
        if isinstance(images, Tensor):
            images = self.project_images(images)
        return self._logits(self.rows_of(ids), images, KeyValues())

    @torch.no_grad()
    def generate(self, images: Tensor | KeyValues, **settings: Any) -> list[list[int]]:
        """One caption per image: tokenizer ids without start and end.

        Args:
            images: image tokens [B, N, W], or their keys and values.
            settings: `max_new_tokens`, `num_beams`, `do_sample`, `temperature`, `top_p`, `length_penalty`, `generator`:
                see `Decoding`.
        """
        decoding = decoding_of(settings)
        if isinstance(images, Tensor):
            images = self.project_images(images)
        device = self.vocabulary.device
        rows = beam_rows(images.rows, decoding.num_beams, device)
        bos, eos = self.rows_of(torch.tensor([self.bos_id, self.eos_id], device=device))
        captions = decode(
            lambda last, cache, memory: self._logits(last, memory, cache)[:, -1],
            KeyValues(),
            images if decoding.num_beams == 1 else images.select(rows),
            bos.expand(len(rows), 1),
            int(eos),
            decoding,
            self.max_length,
        )
        return [self.vocabulary[caption].tolist() for caption in captions]

    def start(self, ids: Tensor) -> Tensor:
        return _from(self.bos_id, ids)

    def targets(self, ids: Tensor) -> Tensor:
        """Rows of the vocabulary."""
        return self.rows_of(ids)

    def logits(self, body: Body, image: ImageState, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self(ids, image.bridged)

    def write(self, body: Body, image: ImageState, **options: Any) -> list[list[int]]:
        return self.generate(image.bridged, **options)

    def path(self, reads: Reads) -> tuple[str, ...]:
        return (*reads.bridged, "heads.captioning.*")

    def _logits(self, rows: Tensor, memory: KeyValues, cache: KeyValues) -> Tensor:
        past, length = cache.length, rows.shape[1]
        if past + length > self.max_length:
            raise ValueError(
                f"caption: {past + length} tokens for {self.max_length} positions; shorten it or raise max_length"
            )
        bias = causal_bias(length, past, rows.device)
        x = self.token_embedding(rows) + self.position_embedding.weight[past : past + length]
        # To unit scale, or the first block's output would drown word and place (Vaswani et al. 2017, arXiv 1706.03762, section 3.4).
        x = self.dropout(x * x.shape[-1] ** 0.5)  # [B, L, hidden]
        for i, block in enumerate(self.blocks):
            x = block(x, bias, memory, i, cache)
        return F.linear(self.norm(x), self.token_embedding.weight, self.output_bias)


def _from(bos_id: int, ids: Tensor) -> Tensor:
    """Token ids [B, L] whose first becomes the caption's start token."""
    return torch.cat([torch.full_like(ids[:, :1], bos_id), ids[:, 1:]], dim=1)


class SpeakingBridge(Protocol):
    """What `BridgeCaptioner` needs of a bridge: the `QFormer` with a text branch."""

    max_positions: int

    def read(
        self, name: str, memory: Tensor | KeyValues, memory_mask: Tensor | None, *, cache: KeyValues | None
    ) -> Tensor: ...

    def caption(
        self,
        name: str,
        ids: Tensor,
        memory: Tensor | KeyValues | None,
        memory_mask: Tensor | None,
        *,
        cache: KeyValues | None,
        text_mask: Tensor | None = None,
    ) -> Tensor: ...

    def lm_logits(self, hidden: Tensor) -> Tensor: ...


class BridgeCaptioner(CaptioningHead):
    """Captions by the causal pass of a bridge, which is given in the call; it has no weights of its own.

    Args:
        bos_id: id that starts a caption.
        eos_id: id that ends it.
        queries: the bridge's query set that reads the image.
    """

    def __init__(self, *, bos_id: int, eos_id: int, queries: str = "image"):
        super().__init__()
        self.bos_id, self.eos_id, self.queries = bos_id, eos_id, queries

    def forward(
        self,
        bridge: SpeakingBridge,
        ids: Tensor,
        memory: Tensor | KeyValues | None = None,
        memory_mask: Tensor | None = None,
        *,
        cache: KeyValues | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Captions ids [B, L], padded on the right -> logits [B, L, V]; memory, cache and text mask as in `QFormer.caption`."""
        hidden = bridge.caption(self.queries, ids, memory, memory_mask, cache=cache, text_mask=text_mask)
        return bridge.lm_logits(hidden)

    @torch.no_grad()
    def generate(
        self,
        bridge: SpeakingBridge,
        memory: Tensor | KeyValues | None = None,
        memory_mask: Tensor | None = None,
        *,
        cache: KeyValues | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """One caption per image: ids without start and end.

        Args:
            bridge: a `QFormer` with a text branch.
            memory: the image's tokens [B, T, D], or their keys and values.
            memory_mask: [B, T], True = real token.
            cache: what `QFormer.read` left of the image, in place of the memory; it is not changed.
            settings: see `Decoding`.
        """
        decoding = decoding_of(settings)
        if cache is None:
            if memory is None:
                raise ValueError(
                    "generate: nothing to describe: pass the memory, or a cache that `QFormer.read` has filled"
                )
            cache = KeyValues()
            bridge.read(self.queries, memory, memory_mask, cache=cache)
        rows = beam_rows(cache.rows, decoding.num_beams, cache.layers[0][0].device)
        return decode(
            lambda last, cache, _: self(bridge, last, cache=cache)[:, -1],
            cache.select(rows),
            KeyValues(),
            torch.full((len(rows), 1), self.bos_id, device=rows.device),
            self.eos_id,
            decoding,
            bridge.max_positions,
        )

    def cache(self) -> KeyValues | None:
        return KeyValues()

    def start(self, ids: Tensor) -> Tensor:
        return _from(self.bos_id, ids)

    def logits(self, body: Body, image: ImageState, ids: Tensor, mask: Tensor | None) -> Tensor:
        assert image.cache is not None
        cache = KeyValues(list(image.cache.layers))  # a copy, for the text's keys to be added to
        return self(body.bridge, ids, cache=cache, text_mask=mask)

    def write(self, body: Body, image: ImageState, **options: Any) -> list[list[int]]:
        return self.generate(body.bridge, cache=image.cache, **options)

    def path(self, reads: Reads) -> tuple[str, ...]:
        return (*reads.bridged, *WORDS, "bridge.lm_*", "heads.captioning.*")


class OwnCaptioner(CaptioningHead):
    """A vision-language model writes by itself, after a whole conversation; there is nothing beside its backbone."""

    whole = True

    def logits(self, body: Body, image: ImageState, ids: Tensor, mask: Tensor | None) -> Tensor:
        raise ValueError(WHOLE)

    def write(self, body: Body, image: ImageState, **options: Any) -> list[list[int]]:
        raise ValueError(WHOLE)

    def probe(self, body: Body, pixels: Any, image: ImageState, ids: Tensor) -> Tensor:
        """Logits [B, L, V] of the word after each token of fixed conversations."""
        return body.backbone.word_logits(body.backbone.image_features(pixels))

    def example(self, body: Body, pixels: Any, image: ImageState, length: int) -> dict[str, Tensor]:
        return {"next_word": body.backbone.word_logits(body.backbone.image_features(pixels)[:, -1])}

    def path(self, reads: Reads) -> tuple[str, ...]:
        return ("backbone.model.*",)
