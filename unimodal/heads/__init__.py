"""The heads: what a bridge's output is turned into. One file per job; the generation head is loaded when first asked
for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unimodal.heads.base import CaptioningHead, Embedder, MatchingHead, Reads
from unimodal.heads.building import CAPTIONING, EMBEDDING, MATCHING, Parts
from unimodal.heads.captioning import BridgeCaptioner, CaptionDecoder, OwnCaptioner
from unimodal.heads.decoding import Decoding
from unimodal.heads.embedding import BridgedEmbedder, EmbeddingHead, OwnEmbedder
from unimodal.heads.language_model import LanguageModelCaptioner
from unimodal.heads.matching import AnswerHead, BridgeMatchingHead, CachedMatchingHead

if TYPE_CHECKING:
    from unimodal.heads.generation import GenerationHead

__all__ = [
    "AnswerHead",
    "BridgeCaptioner",
    "BridgeMatchingHead",
    "BridgedEmbedder",
    "CAPTIONING",
    "CachedMatchingHead",
    "CaptionDecoder",
    "CaptioningHead",
    "Decoding",
    "EMBEDDING",
    "Embedder",
    "EmbeddingHead",
    "GenerationHead",
    "LanguageModelCaptioner",
    "MATCHING",
    "MatchingHead",
    "OwnCaptioner",
    "OwnEmbedder",
    "Parts",
    "Reads",
]


def __getattr__(name: str) -> Any:
    if name == "GenerationHead":  # it needs diffusers, which takes seconds to import
        return import_module("unimodal.heads.generation").GenerationHead
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
