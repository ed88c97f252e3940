"""The table that builds heads: the only place that knows their kinds.

Legend: W bridge width, E embedding width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from unimodal.backbones import load_language_model
from unimodal.config import CaptioningConfig, MatchingConfig, ModelConfig
from unimodal.heads.base import CaptioningHead, Embedder, MatchingHead
from unimodal.heads.captioning import BridgeCaptioner, CaptionDecoder, OwnCaptioner
from unimodal.heads.embedding import BridgedEmbedder, EmbeddingHead, OwnEmbedder
from unimodal.heads.language_model import LanguageModelCaptioner
from unimodal.heads.matching import AnswerHead, BridgeMatchingHead, CachedMatchingHead
from unimodal.heads.system import SystemCaptioner, SystemEmbedder, SystemMatchingHead
from unimodal.systems import System, embedding_shape


class Parts(NamedTuple):
    """What heads are built for: a configuration, its backbone, whether weights of sources are loaded, and its system, if any."""

    config: ModelConfig
    backbone: Any
    pretrained: bool
    system: System | None = None

    def bridge_width(self, who: str) -> int:
        """W.

        Raises:
            ValueError: there is no bridge.
        """
        if self.config.bridge is None:
            raise ValueError(
                f"{who} reads what a bridge read, and this model has none; give model.bridge a configuration"
            )
        return self.config.bridge.width

    def require_system(self, who: str) -> System:
        """The system.

        Raises:
            ValueError: there is none.
        """
        if self.system is None:
            raise ValueError(
                f"{who}: kind is 'system', and the model has none; name one in system, or set another kind"
            )
        return self.system

    def require_text_tokens(self, who: str) -> None:
        """Raises:
        ValueError: the backbone reads no texts.
        """
        if "text" not in self.backbone.modalities:
            raise ValueError(
                f"{who} reads text tokens of the backbone, and {self.config.backbone.label} has none: let the bridge read the texts "
                "(embedding.text: words without a gate, matching.kind: bridge), or take a backbone with a text tower"
            )

    def require_offered(self, job: str) -> None:
        """Raises:
        ValueError: the backbone does not do this job by itself.
        """
        if job not in self.backbone.offers:
            offers = ", ".join(self.backbone.offers) or "nothing"
            raise ValueError(
                f"{job}: kind is 'backbone', but {self.config.backbone.label} offers by itself only {offers}; set another kind"
            )


# Embedding: how it is computed, and the modules that hold its weights.


def _bridged_embedding(parts: Parts) -> tuple[Embedder, dict[str, nn.Module]]:
    embedding, backbone = parts.config.embedding, parts.backbone
    assert embedding is not None
    shared: dict[str, Any] = {
        "width": parts.bridge_width("the embedding head"),
        "backbone_width": backbone.width,
        "dim": embedding.dim,
        "gate": embedding.gate,
    }
    image = EmbeddingHead(pool=embedding.pool, **shared)
    words = embedding.text == "words"
    if embedding.gate or not words:
        parts.require_text_tokens("the embedding head (embedding.text: queries, or a gate)")
    pool = "first" if words else "attention" if embedding.pool == "query" else embedding.pool
    text = EmbeddingHead(pool=pool, **shared)
    return BridgedEmbedder(words=words), {"image_embedding": image, "text_embedding": text}


def _own_embedding(parts: Parts) -> tuple[Embedder, dict[str, nn.Module]]:
    embedding, embeds = parts.config.embedding, parts.backbone.embeds
    assert embedding is not None
    if embedding.dim != embeds:
        raise ValueError(
            f"embedding: dim is {embedding.dim}, but the backbone's own embedding has "
            f"{embeds or 'no'} dimensions; set embedding.dim to that, or embedding.kind to 'bridge'"
        )
    return OwnEmbedder(), {}


def _system_embedding(parts: Parts) -> tuple[Embedder, dict[str, nn.Module]]:
    system = parts.require_system("embedding")
    return SystemEmbedder(system.towers, embedding_shape(system)[1]), {}


# Matching.


def _system_matching(settings: MatchingConfig, parts: Parts) -> MatchingHead:
    return SystemMatchingHead(parts.require_system("matching").towers)


def _cached(settings: MatchingConfig, parts: Parts) -> MatchingHead:
    parts.require_text_tokens("the matching head (matching.kind: cached)")
    return CachedMatchingHead(
        width=parts.bridge_width("the matching head"),
        text_width=parts.backbone.width,
        hidden=settings.hidden,
        layers=settings.layers,
        heads=settings.heads,
        dropout=settings.dropout,
    )


def _in_bridge(settings: MatchingConfig, parts: Parts) -> MatchingHead:
    return BridgeMatchingHead(width=parts.bridge_width("the matching head"))


def _answer(settings: MatchingConfig, parts: Parts) -> MatchingHead:
    parts.require_offered("matching")
    return AnswerHead(width=parts.backbone.embeds)


# Captioning.


def _decoder(settings: CaptioningConfig, parts: Parts) -> CaptioningHead:
    _refuse_conversations(parts)
    return CaptionDecoder(
        vocab_size=settings.vocabulary or parts.backbone.vocab_size,
        width=parts.bridge_width("the captioning head"),
        hidden=settings.hidden,
        layers=settings.layers,
        heads=settings.heads,
        max_length=settings.max_length,
        bos_id=settings.bos_id,
        eos_id=settings.eos_id,
        unk_id=settings.unk_id,
        dropout=settings.dropout,
    )


def _speaking_bridge(settings: CaptioningConfig, parts: Parts) -> CaptioningHead:
    _refuse_conversations(parts)
    return BridgeCaptioner(bos_id=settings.bos_id, eos_id=settings.eos_id)


def _language_model(settings: CaptioningConfig, parts: Parts) -> CaptioningHead:
    if settings.language_model is None:
        raise ValueError(
            "captioning.language_model: kind is 'language_model', so one must be named, for example "
            "{name: opt, source: facebook/opt-125m}"
        )
    if settings.vocabulary is not None:
        raise ValueError("captioning.vocabulary: a language model has its own; leave it null")
    language_model, origin = load_language_model(settings.language_model, pretrained=parts.pretrained)
    return LanguageModelCaptioner(language_model, width=parts.bridge_width("the captioning head"), sources=origin)


def _system_captions(settings: CaptioningConfig, parts: Parts) -> CaptioningHead:
    parts.require_system("captioning")
    return SystemCaptioner()


def _own_captions(settings: CaptioningConfig, parts: Parts) -> CaptioningHead:
    parts.require_offered("captioning")
    return OwnCaptioner()


def _refuse_conversations(parts: Parts) -> None:
    if parts.backbone.whole:
        raise ValueError(
            f"captioning: texts are conversations to {parts.config.backbone.label}, which a captioner would learn to repeat; it "
            "writes by itself: set captioning.kind to 'backbone'"
        )


EMBEDDING: dict[str, Callable[[Parts], tuple[Embedder, dict[str, nn.Module]]]] = {
    "bridge": _bridged_embedding,
    "backbone": _own_embedding,
    "system": _system_embedding,
}
MATCHING: dict[str, Callable[[MatchingConfig, Parts], MatchingHead]] = {
    "cached": _cached,
    "bridge": _in_bridge,
    "backbone": _answer,
    "system": _system_matching,
}
CAPTIONING: dict[str, Callable[[CaptioningConfig, Parts], CaptioningHead]] = {
    "decoder": _decoder,
    "bridge": _speaking_bridge,
    "language_model": _language_model,
    "backbone": _own_captions,
    "system": _system_captions,
}
