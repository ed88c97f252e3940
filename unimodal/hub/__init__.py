"""Checkpoints: a folder that is saved whole or not at all, loads strictly and offline, and goes to the Hub as it is."""

from unimodal.hub.card import Card
from unimodal.hub.checkpoint import (
    find_calibration,
    find_checkpoint,
    find_config,
    find_prompts,
    keep_calibration,
    load_adapter,
    load_checkpoint,
    push_to_hub,
    round_weights,
    save_adapter,
    save_checkpoint,
    verify_checkpoint,
)
from unimodal.hub.weights import CheckpointError, CheckpointMismatch

__all__ = [
    "Card",
    "CheckpointError",
    "CheckpointMismatch",
    "find_calibration",
    "find_checkpoint",
    "find_config",
    "find_prompts",
    "keep_calibration",
    "load_adapter",
    "load_checkpoint",
    "push_to_hub",
    "round_weights",
    "save_adapter",
    "save_checkpoint",
    "verify_checkpoint",
]
