"""The frozen encoders of a survey: the backbone of any checkpoint, read once for every picture and caption."""

import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unimodal.backbones import Pixels
from unimodal.data.tokens import words_of
from unimodal.hub import load_checkpoint
from unimodal.systems import BackboneEncoders, Images, Texts, positions_like


class SharedEncoders(BackboneEncoders):
    """What `unimodal.systems.Encoders` asks for, of a checkpoint's backbone: its raw features, with the positions of image tokens.

    Args:
        checkpoint: folder or Hub id of a checkpoint whose backbone reads images and texts apart.
        grid: side of the grid of image tokens that systems see; by default the encoder's own. A coarser one is its exact average, so that
            the mean of all tokens stays what it was; tokens without a place come before it.

    Attributes:
        sizes: parameters of the towers that read images and texts.

    Raises:
        ValueError: its backbone reads one of them only or both as one sequence; a grid finer than the encoder's, or of an encoder whose
            tokens are no square.
    """

    def __init__(self, checkpoint: str | Path, grid: int | None = None) -> None:
        self.source, self.grid = str(checkpoint), grid
        model, self.processor = load_checkpoint(checkpoint)
        backbone = model.backbone.eval().requires_grad_(False)
        if backbone.whole or not {"image", "text"} <= set(backbone.modalities):
            raise ValueError(
                f"{checkpoint}: the survey needs a backbone that reads images and texts apart, this one reads "
                f"{' and '.join(backbone.modalities)}{' as one sequence' if backbone.whole else ''}; give another checkpoint"
            )
        super().__init__(backbone, words_of(self.processor))
        self.max_length = self.processor.max_length
        with torch.no_grad():
            features = backbone.image_features(backbone.random_pixels(1, torch.Generator().manual_seed(0)))
            self.image_tokens, self.image_width = features.shape[1:]
            self.coarser = None if grid is None else self._averages(grid)
            if self.coarser is not None:
                self.image_tokens = len(self.coarser)
            self.text_width = backbone.text_features(*self.tokenise(["a"])).shape[-1]
        self.sizes = {kind: self._size(backbone.tower(kind)) for kind in ("image", "text")}

    def _size(self, patterns: Sequence[str]) -> int:
        named = self.backbone.named_parameters()
        return sum(p.numel() for name, p in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.processor.texts(texts)

    @torch.no_grad()
    def read_texts(self, ids: Tensor, mask: Tensor) -> Texts:
        tokens = self.backbone.text_features(ids, mask)
        return Texts(ids, mask, tokens * mask[..., None])

    @torch.no_grad()
    def read_images(self, pixels: Pixels) -> Images:
        """What the image encoder makes of pixels as the processor makes them."""
        images = self.as_images(self.backbone.image_features(pixels), self.backbone.image_mask(pixels))
        return images._replace(pixels=pixels if isinstance(pixels, Tensor) else None)

    def as_images(self, tokens: Tensor, mask: Tensor | None) -> Images:
        """The encoder's tokens [B, T, C] and their mask [B, T] as systems see them."""
        if self.coarser is not None:
            if mask is not None and not mask.all():
                raise ValueError("grid: pictures of different sizes have no common grid; leave --grid out")
            tokens, mask = self.coarser @ tokens, None
        tokens = tokens + positions_like(tokens, self.backbone.prefix_tokens)
        return Images(tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask)

    def unplaced(self, tokens: Tensor) -> Tensor:
        """The encoder's tokens [B, T, C] as they came, of those that systems see."""
        return tokens - positions_like(tokens, self.backbone.prefix_tokens)

    def _averages(self, grid: int) -> Tensor:
        """What makes a grid of `grid` x `grid` tokens of the encoder's: [prefix + grid^2, T], each row a weighted mean."""
        prefix = self.backbone.prefix_tokens
        side = math.isqrt(self.image_tokens - prefix)
        if side * side != self.image_tokens - prefix or not 1 <= grid <= side:
            raise ValueError(
                f"grid: got {grid}, but this encoder leaves {self.image_tokens - prefix} image tokens in a grid of {side}; expected a side "
                f"from 1 to {side}, and an encoder of square pictures"
            )
        edges = torch.arange(grid + 1) * side / grid
        first, last = edges[:-1, None], edges[1:, None]
        place = torch.arange(side)
        line = (torch.minimum(last, place + 1) - torch.maximum(first, place)).clamp(min=0) * grid / side  # [grid, side]
        out = torch.eye(prefix + grid * grid, self.image_tokens)
        out[prefix:, prefix:] = torch.kron(line, line)
        out[prefix:, :prefix] = 0
        return out
