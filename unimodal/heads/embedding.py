"""The embedding head: bridged tokens -> unit vectors that retrieve by cosine.

One vector per query, scored by the best one (BLIP-2, arXiv 2301.12597), or one vector per item: the first token's, the mean,
or attention pooling. A learned gate can mix in a pooled view of the backbone's own tokens (OmniBridge, arXiv 2509.19018), which the
bridge need not relearn.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from unimodal.heads.base import WORDS, Body, Embedder, Reads
from unimodal.layers import AttentionPool, init_weights, masked_mean, unit
from unimodal.states import ImageState, TextState


class EmbeddingHead(nn.Module):
    """Unit vectors from what the bridge read, and with `gate` also from the backbone tokens.

    With g = sigmoid(gate), e = normalise(g e_bridge + (1 - g) e_backbone), both normalised before; g is 1/2 at the
    start.

    Args:
        width: W, width of the bridged tokens.
        backbone_width: D, width of the backbone tokens.
        dim: E, width of the embedding.
        pool: how N bridged tokens become vectors: `first`, `mean` or `attention` give one, `query` keeps N. The backbone
            tokens are pooled by attention under `attention`, else by their mean.
        gate: whether the backbone takes part.
        heads: attention heads of the pooling.
    """

    def __init__(
        self,
        *,
        width: int,
        backbone_width: int,
        dim: int,
        pool: Literal["query", "first", "mean", "attention"],
        gate: bool,
        heads: int = 4,
    ):
        super().__init__()
        if pool not in ("query", "first", "mean", "attention"):
            raise ValueError(f"pool: expected 'query', 'first', 'mean' or 'attention', got {pool!r}")
        self.pool = pool
        if pool == "attention":
            self.bridge_pool = AttentionPool(width, heads)
        self.bridge_projection = nn.Linear(width, dim)
        self.gate = nn.Parameter(torch.zeros(())) if gate else None
        if gate:
            if pool == "attention":
                self.backbone_pool = AttentionPool(backbone_width, heads)
            self.backbone_projection = nn.Linear(backbone_width, dim)
        self.apply(init_weights)

    def forward(self, bridged: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """bridged [B, N, W], tokens [B, T, D], mask [B, T] -> [B, E], or [B, N, E] under `query`; norm 1."""
        if self.pool == "attention":
            bridged = self.bridge_pool(bridged, None)  # [B, W]
        elif self.pool == "mean":
            bridged = bridged.mean(1)
        elif self.pool == "first":
            bridged = bridged[:, 0]
        embedding = unit(self.bridge_projection(bridged))  # [B, E] or [B, N, E]
        if self.gate is None:
            return embedding
        pooled = self.backbone_pool(tokens, mask) if self.pool == "attention" else masked_mean(tokens, mask)  # [B, D]
        backbone = unit(self.backbone_projection(pooled))  # [B, E]
        if self.pool == "query":
            backbone = backbone[:, None]  # the same for every query
        return unit(torch.lerp(backbone, embedding, self.gate.sigmoid().to(embedding.dtype)))


class BridgedEmbedder(Embedder):
    """Embeds what the bridge read, by the heads `image_embedding` and `text_embedding`.

    Args:
        words: whether a text's vector comes from the bridge's own text branch, in place of the queries that read the backbone's tokens.
    """

    def __init__(self, *, words: bool) -> None:
        self.words = words

    def vectors(self, body: Body) -> int:
        head: Any = body.heads["image_embedding"]
        return len(body.bridge.query_sets["image"]) if head.pool == "query" else 0

    def image(self, body: Body, state: ImageState) -> Tensor:
        return body.heads["image_embedding"](state.bridged, state.tokens, state.mask)

    def text(self, body: Body, state: TextState) -> Tensor:
        bridged = body.bridge.text(state.ids, state.mask) if self.words else state.bridged  # [M, L, W] or [M, N, W]
        return body.heads["text_embedding"](bridged, state.tokens, state.mask)

    def path(self, reads: Reads) -> tuple[str, ...]:
        heads = ("heads.image_embedding.*", "heads.text_embedding.*")
        return (*reads.bridged, *reads.texts, "bridge.query_sets.text", *heads, *(WORDS if self.words else ()))


class OwnEmbedder(Embedder):
    """The backbone's own embedding, of a published model or of two towers."""

    by_backbone = True

    def own_image(self, body: Body, features: Tensor, mask: Tensor | None) -> Tensor:
        return body.backbone.image_embedding(features, mask)

    def own_text(self, body: Body, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return body.backbone.text_embedding(features, ids, mask)

    def image(self, body: Body, state: ImageState) -> Tensor:
        return _read(state.own)

    def text(self, body: Body, state: TextState) -> Tensor:
        return _read(state.own)

    def path(self, reads: Reads) -> tuple[str, ...]:
        return (*reads.features, *reads.own)


def _read(own: Tensor | None) -> Tensor:
    assert own is not None  # `own_image` and `own_text` made it when the item was read
    return own
