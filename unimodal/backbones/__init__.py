"""Backbones: an item becomes tokens [B, T, D] and a mask [B, T]."""

from unimodal.backbones.base import Backbone, Pixels, Tokens, move_pixels
from unimodal.backbones.blip2 import Blip2Backbone
from unimodal.backbones.language import load_language_model
from unimodal.backbones.pair import PretrainedPair
from unimodal.backbones.qwen import Prefix, QwenVL
from unimodal.backbones.towers import TwoTowers
from unimodal.config import BackboneConfig

__all__ = [
    "Backbone",
    "Blip2Backbone",
    "Pixels",
    "Prefix",
    "PretrainedPair",
    "QwenVL",
    "Tokens",
    "TwoTowers",
    "build_backbone",
    "load_language_model",
    "move_pixels",
]


def build_backbone(config: BackboneConfig, *, pretrained: bool) -> Backbone:
    """The backbone that a configuration describes; `pretrained` loads the weights of its sources."""
    if config.published is not None and config.published.name == "blip-2":
        return Blip2Backbone(config.published, width=config.width, pretrained=pretrained)
    if config.published is not None:
        if config.published.name == "qwen3_vl":
            return QwenVL(config.published, width=config.width, pretrained=pretrained)
        return PretrainedPair(config.published, width=config.width, pretrained=pretrained)
    if config.width is None:
        raise ValueError(
            "backbone.width: two towers need a common width for their tokens, got None; give one, for example 384"
        )
    return TwoTowers(
        width=config.width,
        vision=config.vision,
        beside=config.beside,
        text=config.text,
        embedding=config.embedding,
        pretrained=pretrained,
    )
