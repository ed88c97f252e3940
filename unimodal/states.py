"""States: what a model read from images and from texts, once for all heads.

Legend: B images, M texts, P pairs, T tokens, L text length, N queries, D backbone width, W bridge width, E embedding width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimodal.layers import KeyValues


class ImageState(NamedTuple):
    """What the model read from B images: backbone tokens [B, T, D], their mask, bridged tokens [B, N, W] ([B, 0] without a bridge), where
    the bridge writes the captions the keys and values that its text looks back at, where it judges the keys and values of the tokens, and,
    where the model uses it, the backbone's own embedding [B, E]."""

    tokens: Tensor
    mask: Tensor
    bridged: Tensor
    cache: KeyValues | None = None
    memory: KeyValues | None = None
    own: Tensor | None = None

    def select(self, index: Tensor) -> "ImageState":
        """Rows `index` [P], without keys and values."""
        own = None if self.own is None else self.own[index]
        return ImageState(self.tokens[index], self.mask[index], self.bridged[index], own=own)

    def append(self, other: "ImageState") -> "ImageState":
        """These images, then `other`'s, without keys and values; pictures of any size are padded to one number of tokens."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        tokens, mask = (
            torch.cat([_padded(part, length) for part in parts]) for parts in zip(self[:2], other[:2], strict=True)
        )
        bridged = torch.cat([self.bridged, other.bridged])
        return ImageState(tokens, mask, bridged, own=_joined(self.own, other.own))


class TextState(NamedTuple):
    """What the model read from M texts: ids and mask [M, L], backbone tokens [M, L, D] ([M, 0] where it reads no texts), bridged tokens
    [M, N, W] ([M, 0] without text queries) and, where the model uses it, the backbone's own embedding [M, E]."""

    ids: Tensor
    mask: Tensor
    tokens: Tensor
    bridged: Tensor
    own: Tensor | None = None

    def select(self, index: Tensor) -> "TextState":
        """Rows `index` [P]."""
        parts: list[Any] = [None if part is None else part[index] for part in self]
        return TextState(*parts)

    def trim(self) -> "TextState":
        """Without the padding at the end that no row needs."""
        length = int(self.mask.any(0).nonzero().max()) + 1
        tokens = self.tokens[:, :length] if self.tokens.ndim == 3 else self.tokens
        return self._replace(ids=self.ids[:, :length], mask=self.mask[:, :length], tokens=tokens)

    def append(self, other: "TextState") -> "TextState":
        """These texts, then `other`'s; both padded to the same length."""
        return TextState(*(_joined(*parts) for parts in zip(self, other, strict=True)))


def _padded(rows: Tensor, length: int) -> Tensor:
    """Rows [B, T, ...] with zeros behind them, False in a mask, to this length."""
    missing = length - rows.shape[1]
    return torch.cat([rows, rows.new_zeros(len(rows), missing, *rows.shape[2:])], 1) if missing else rows


def _joined(a: Tensor | None, b: Tensor | None) -> Any:
    return None if a is None or b is None else torch.cat([a, b])
