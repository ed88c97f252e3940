"""The backbone contract: items in, tokens and a mask out."""

from typing import NamedTuple

from torch import Tensor, nn


class Tokens(NamedTuple):
    """What a backbone read from a batch of items.

    `hidden` [B, T, D] are the tokens, `mask` [B, T] is True on real ones, `spans` names the slice of each part of an item.
    """

    hidden: Tensor
    mask: Tensor
    spans: dict[str, slice]


class Backbone(nn.Module):
    """A module that turns images and texts into tokens of one width D.

    `modalities` are the kinds of item it reads; `width` is D; `sources` says where its weights came from: for each tower the Hub id or
    path, the revision and the sha256 of the weights file, empty where it started from random numbers.
    """

    modalities: tuple[str, ...] = ()
    width: int
    sources: dict[str, dict[str, str | None]]

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tokens]:
        """Tokens per modality present in `batch` (keys as in `unimodal.data.batch`)."""
        raise NotImplementedError(f"{type(self).__name__} is a backbone without encode(); implement it")
