"""The matching heads: does this text describe this image? One logit per pair.

`CachedMatchingHead` reads bridged image tokens that were computed once, so that a search scores a new text against
stored images without touching a picture. `BridgeMatchingHead` reads what the bridge's queries found with the text
beside them (BLIP-2, arXiv 2301.12597). `AnswerHead` reads what a vision-language model is about to answer.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.heads.base import WORDS, Body, MatchingHead, Reads
from unimodal.layers import Block, KeyValues, init_weights, key_mask_to_bias, masked_mean
from unimodal.states import ImageState, TextState


class CachedMatchingHead(MatchingHead):
    """A small transformer: text tokens attend to each other and to the image tokens; their mean is scored.

    Args:
        width: W, width of the image tokens.
        text_width: D, width of the text tokens.
        hidden: width inside.
        layers: number of blocks.
        heads: attention heads.
        dropout: dropout of attention weights and of every sublayer's output.
    """

    def __init__(self, *, width: int, text_width: int, hidden: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.text_norm = nn.LayerNorm(text_width)
        self.text_projection = nn.Linear(text_width, hidden)
        self.image_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(hidden, heads, memory_width=width, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.score = nn.Linear(hidden, 1)
        self.apply(init_weights)

    def project_images(self, image_tokens: Tensor) -> KeyValues:
        """Keys and values of image tokens [B, N, W] for every block; `.select(index)` gives those of P pairs."""
        return KeyValues.of((block.cross_attention for block in self.blocks), self.image_norm(image_tokens))

    def forward(self, text_hidden: Tensor, text_mask: Tensor | None, images: Tensor | KeyValues) -> Tensor:
        """Text tokens [P, L, D], mask [P, L]; image tokens [P, N, W] or their keys and values -> logits [P]."""
        if isinstance(images, Tensor):
            images = self.project_images(images)
        bias = key_mask_to_bias(text_mask)
        x = self.text_projection(self.text_norm(text_hidden))  # [P, L, hidden]
        for i, block in enumerate(self.blocks):
            x = block(x, bias, images, i)
        return self.score(masked_mean(self.norm(x), text_mask))[:, 0]

    def image_kept(self, image: ImageState) -> tuple[Tensor, Tensor | None]:
        """Bridged tokens [B, N, W]."""
        return image.bridged, None

    def kept_of_text(self, text: TextState) -> Tensor:
        """Backbone tokens [M, L, D]."""
        return text.tokens

    def restored(
        self, image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor
    ) -> tuple[ImageState, TextState]:
        nothing, no_words = image.new_empty(len(image), 0), text.new_empty(len(text), 0)
        return ImageState(nothing, nothing, image), TextState(no_words, text_mask, text, no_words)

    def match(self, body: Body, image: ImageState, text: TextState, image_index: Tensor, text_index: Tensor) -> Tensor:
        images = self.project_images(image.bridged).shared(image_index)
        return self(text.tokens[text_index], text.mask[text_index], images)

    def rows(self, body: Body, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return self(text, text_mask, image)

    def path(self, reads: Reads) -> tuple[str, ...]:
        return (*reads.bridged, *reads.texts, "heads.matching.*")


class KeepsTokens(MatchingHead):
    """A head that reads the backbone's image tokens and the ids of texts: these are what an index keeps."""

    text_kept = "ids"

    def image_kept(self, image: ImageState) -> tuple[Tensor, Tensor | None]:
        """Backbone tokens [B, T, D]."""
        return image.tokens, image.mask

    def kept_of_text(self, text: TextState) -> Tensor:
        """Token ids [M, L]."""
        return text.ids

    def restored(
        self, image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor
    ) -> tuple[ImageState, TextState]:
        no_words = text.new_empty(len(text), 0)
        return ImageState(image, image_mask, image.new_empty(len(image), 0)), TextState(
            text, text_mask, no_words, no_words
        )


class BridgeMatchingHead(KeepsTokens):
    """BLIP-2's: a two-way linear on every query, averaged; the logit is the difference, "match" minus "no match".

    Args:
        width: W, width of the query outputs.
    """

    def __init__(self, *, width: int):
        super().__init__()
        self.score = nn.Linear(width, 2)
        self.apply(init_weights)

    def forward(self, query_outputs: Tensor) -> Tensor:
        """What the queries found in P pairs (`QFormer.match`), [P, N, W] -> logits [P]."""
        no_match, match = self.score(query_outputs).mean(1).unbind(-1)
        return match - no_match

    def memory(self, body: Body, tokens: Tensor, mask: Tensor) -> KeyValues | None:
        return body.bridge.project_memory(tokens, mask)

    def match(self, body: Body, image: ImageState, text: TextState, image_index: Tensor, text_index: Tensor) -> Tensor:
        memory = image.memory or body.bridge.project_memory(image.tokens, image.mask)
        pair = text.select(text_index)
        return self(body.bridge.match("image", pair.ids, pair.mask, memory.shared(image_index)))

    def rows(self, body: Body, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return self(body.bridge.match("image", text, text_mask, image))

    def path(self, reads: Reads) -> tuple[str, ...]:
        return (*reads.bridged, *WORDS, "heads.matching.*")


class AnswerHead(MatchingHead):
    """The logit of the answer yes minus that of no: one row, the difference of the two words' rows in the language model's output, in place
    of its whole vocabulary (Qwen3-VL-Reranker, arXiv 2601.04720).

    Args:
        width: C, width of the language model's states.
    """

    whole = True

    def __init__(self, *, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        self.apply(init_weights)

    def forward(self, states: Tensor) -> Tensor:
        """The last state of P conversations [P, C] -> logits [P], float32: in fewer bits the best candidates would tie."""
        return F.linear(states.float(), self.score.weight.float())[:, 0]

    def match(self, body: Body, image: ImageState, text: TextState, image_index: Tensor, text_index: Tensor) -> Tensor:
        raise ValueError(
            "this matching head judges a query and a document that were read as one conversation: use judge, or predict and rank"
        )

    def probe(self, body: Body, pixels: Any, image: ImageState, text: TextState) -> Tensor:
        """Logits [B] of fixed conversations."""
        return self(body.backbone.last_states(pixels))

    def path(self, reads: Reads) -> tuple[str, ...]:
        return ("backbone.model.*", "heads.matching.*")
