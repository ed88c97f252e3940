"""The backbone contract: items in, tokens and a mask out.

Legend: B images, M texts, L text length, T tokens, C width of a tower, D width of the tokens, E width of an embedding.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

# Pictures as a backbone's processor makes them: [B, 3, S, S], or named tensors where sizes differ from picture to picture.
Pixels = Tensor | dict[str, Tensor]


def move_pixels(pixels: Pixels, device: torch.device, dtype: torch.dtype | None = None) -> Pixels:
    """Pixels on a device; floating point ones in a precision, masks and shapes as they are."""
    if isinstance(pixels, dict):
        return {name: cast(Tensor, move_pixels(part, device, dtype)) for name, part in pixels.items()}
    return pixels.to(device, dtype if pixels.is_floating_point() else None)


class Tokens(NamedTuple):
    """What a backbone read from a batch of items.

    `hidden` [B, T, D] are the tokens, `mask` [B, T] is True on real ones.
    """

    hidden: Tensor
    mask: Tensor


class Backbone(nn.Module):
    """A module that turns images and texts into tokens of one width D.

    It reads in two steps: a tower's raw features, which a feature cache can keep, then tokens for the bridge.

    Attributes:
        modalities: the kinds of item it reads.
        width: D.
        parts: name of each part that has a source, and the prefix of its parameters.
        sources: for each part the Hub id or path its weights came from, the revision and the sha256 of the weights; empty where it
            started from random numbers.
        vocab_size: number of text tokens.
        max_length: longest text in tokens.
        prefix_tokens: how many image tokens (class, registers) come before those of the image grid.
        most_image_tokens: T of an image; the most where pictures differ.
        placed: whether image tokens hold where they stand, by positions that `image_tokens` adds.
        text_width: width of text tokens; D unless they are left as wide as their tower makes them.
        embeds: E of its own embedding; None where it has none.
        whole: whether it reads all parts of an item as one sequence; otherwise images and texts are read apart.
        offers: the heads that it is by itself (`kind: backbone`).
        log_scale, bias: logarithm of the inverse temperature, and the bias, that its own embedding was trained with; None without.
        sees, reads, own: patterns over its parameter names: what image tokens, text tokens and only its own embedding depend on.
    """

    modalities: tuple[str, ...] = ()
    width: int
    parts: dict[str, str]
    sources: dict[str, dict[str, str | None]]
    vocab_size: int
    max_length: int
    prefix_tokens: int = 0
    most_image_tokens: int
    placed: bool = False
    embeds: int | None = None
    whole: bool = False
    offers: tuple[str, ...] = ()
    log_scale: float | None = None
    bias: float | None = None
    sees: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def text_width(self) -> int:
        return self.width

    def tower(self, kind: str) -> tuple[str, ...]:
        """Patterns over its parameter names: what the raw features of `kind` (image, text) depend on. All parts with a source, unless it
        knows better."""
        return tuple(f"{prefix}*" for prefix in self.parts.values())

    def random_pixels(self, count: int, generator: torch.Generator) -> Pixels:
        """Noise in the shape of `count` pictures, for a fixed input that shows whether outputs stayed the same."""
        raise NotImplementedError(f"{type(self).__name__} is a backbone that reads no images; implement random_pixels")

    def image_features(self, pixels: Pixels) -> Tensor:
        """Raw features [B, T, C] of images."""
        raise NotImplementedError(f"{type(self).__name__} is a backbone that reads no images; implement image_features")

    def image_mask(self, pixels: Pixels) -> Tensor | None:
        """Which raw features are real [B, T]; None where all are."""
        return None

    def image_tokens(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Raw features [B, T, C] and their mask [B, T] -> tokens [B, T, D]."""
        raise NotImplementedError(f"{type(self).__name__} is a backbone that reads no images; implement image_tokens")

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw features [M, L, C] of token ids [M, L] with their mask [M, L]."""
        raise NotImplementedError(f"{type(self).__name__} is a backbone that reads no texts; implement text_features")

    def text_tokens(self, features: Tensor, mask: Tensor) -> Tokens:
        """Raw features [M, L, C] and their mask [M, L] -> tokens [M, L, D]."""
        raise NotImplementedError(f"{type(self).__name__} is a backbone that reads no texts; implement text_tokens")

    def image_embedding(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """The backbone's own unit vectors [B, E] of images, from raw features and their mask."""
        raise NotImplementedError(f"{type(self).__name__} has no embedding of its own; set embedding.kind to 'bridge'")

    def text_embedding(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The backbone's own unit vectors [M, E] of texts, from raw features, token ids and their mask."""
        raise NotImplementedError(f"{type(self).__name__} has no embedding of its own; set embedding.kind to 'bridge'")

    def embed_images(self, pixels: Pixels) -> Tensor:
        """Its own unit vectors [B, E] of images of which nothing else is wanted, without adapters in use."""
        return self.image_embedding(self.image_features(pixels), self.image_mask(pixels))

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Its own unit vectors [M, E] of texts of which nothing else is wanted, without adapters in use."""
        return self.text_embedding(self.text_features(ids, mask), ids, mask)

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tokens]:
        """Tokens per modality present in `batch` (keys as in `unimodal.data.batch`)."""
        out = {}
        if "image_features" in batch:
            out["image"] = self.image_tokens(batch["image_features"], batch.get("image_features_mask"))
        elif "image" in batch:
            pixels = batch["image"]
            out["image"] = self.image_tokens(self.image_features(pixels), self.image_mask(pixels))
        if "text" in batch:
            features = batch.get("text_features")
            if features is None:
                features = self.text_features(batch["text"], batch["text_mask"])
            out["text"] = self.text_tokens(features, batch["text_mask"])
        return out
