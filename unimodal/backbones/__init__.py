"""Backbones: an item becomes tokens [B, T, D] and a mask [B, T]."""

from unimodal.backbones.base import Backbone, Tokens
from unimodal.backbones.towers import TwoTowers

__all__ = ["Backbone", "Tokens", "TwoTowers"]
