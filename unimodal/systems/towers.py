"""Small transformers on top of the shared frozen encoders: what a system trains in place of the towers of its paper.

Legend: B items, T tokens, C width of the encoder's tokens, W width, N tokens put in by hand (prompts), E embedding width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.layers import HIDDEN, MLP, Attention, init_weights, key_mask_to_bias

SCALE = 1 / 0.07  # CLIP's first inverse temperature
LARGEST_SCALE = 100.0


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention where there is a memory, feed-forward."""

    def __init__(self, width: int, heads: int, *, memory: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout=dropout)
        if memory:
            self.cross_attention_norm = nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, bias: Tensor | None, memory: Tensor | None = None, memory_bias: Tensor | None = None
    ) -> Tensor:
        """x [B, L, W], memory [B, T, W], what is added to attention scores [B, 1, 1 or L, L] and [B, 1, 1, T] -> [B, L, W]."""
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, *self.attention.project(y), bias))
        if memory is not None:
            y = self.cross_attention_norm(x)
            x = x + self.dropout(self.cross_attention(y, *self.cross_attention.project(memory), memory_bias))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Tower(nn.Module):
    """A class token and an encoder's tokens through a few layers.

    Args:
        in_width: C.
        width: W.
        layers: number of layers; with 0 tokens are projected only and the class token is their mean.
        heads: attention heads.
        dropout: of attention weights and of what each layer adds.
    """

    def __init__(self, in_width: int, width: int, layers: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(in_width), nn.Linear(in_width, width))
        self.first = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(Layer(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(init_weights)

    def forward(self, tokens: Tensor, mask: Tensor, prompts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, C], mask [B, T], prompts [B, N, W] that stand between class token and tokens -> hidden states
        [B, 1 + N + T, W] and their mask; the first is the class token's."""
        return self.read(self.project(tokens), mask, prompts)

    def read(self, hidden: Tensor, mask: Tensor, prompts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`, from projected tokens [B, T, W]."""
        # The class token starts as the mean, so that a tower of no layers is one, too.
        weight = mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        parts = [(self.first + mean)[:, None], *([] if prompts is None else [prompts]), hidden]
        x = torch.cat(parts, 1)
        mask = F.pad(mask, (x.shape[1] - mask.shape[1], 0), value=True)
        bias = key_mask_to_bias(mask)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x), mask


class Fusion(nn.Module):
    """Layers in which texts attend to images: what ALBEF has on top of its two towers.

    Args:
        width: W of both sides.
        layers: number of layers, each with cross-attention.
        heads: attention heads.
        dropout: as in `Tower`.
    """

    def __init__(self, width: int, layers: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, memory=True, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(init_weights)

    def forward(
        self, text: Tensor, text_mask: Tensor, image: Tensor, image_mask: Tensor, *, causal: bool = False
    ) -> Tensor:
        """Texts [P, L, W] with the images [P, T, W] of their rows -> [P, L, W]; causal: no token looks to its right."""
        bias: Any = key_mask_to_bias(text_mask)
        if causal:
            length = text.shape[1]
            bias = bias + torch.full((length, length), HIDDEN, device=text.device).triu_(1)
        memory_bias = key_mask_to_bias(image_mask)
        for layer in self.layers:
            text = layer(text, bias, image, memory_bias)
        return self.norm(text)


class Scale(nn.Module):
    """A learned inverse temperature, at most 100 (CLIP, arXiv 2103.00020)."""

    def __init__(self, first: float = SCALE) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(first)))

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """To be called after the optimizer's step."""
        self.log.clamp_(max=math.log(LARGEST_SCALE))
