"""A convolutional denoiser: diffusers' conditional U-Net on pixels or latents whose small squares are folded into channels.

Convolutions learn what the same shape looks like at every place, which attention over a few patches has to learn place by place.
Sources: U-Net for diffusion, Ho et al. 2020 (arXiv 2006.11239); cross-attention to a condition, Rombach et al. 2022 (arXiv 2112.10752).
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn


class UNet(nn.Module):
    """The U-Net with the inputs and outputs of the transformers that it stands beside.

    Args:
        channels: C of what it denoises.
        sample_size: side S of what it denoises.
        condition_width: W of the condition tokens.
        patch_size: squares of this side are folded into channels, so that the finest level has the side S / patch_size.
        block_out_channels: channels of each level, from the finest on; each level has half the side of the one before.
        layers_per_block: residual blocks of a level on the way down; one more on the way up.
        cross_attention: for each level, whether it attends to itself and to the condition. By default the coarsest alone does:
            attention at the finest level costs more than all convolutions. The middle always does.
        num_attention_heads: number of attention heads. diffusers' own class takes this number under the name `attention_head_dim`.
        norm_num_groups: groups of the group normalisations; divides every number of channels.
        dropout: of the residual blocks.

    Raises:
        ValueError: the sizes do not fit one another.
    """

    def __init__(
        self,
        *,
        channels: int,
        sample_size: int,
        condition_width: int,
        patch_size: int = 2,
        block_out_channels: Sequence[int] = (64, 128),
        layers_per_block: int = 1,
        cross_attention: Sequence[bool] | None = None,
        num_attention_heads: int = 4,
        norm_num_groups: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        smallest = patch_size * 2 ** (levels - 1)
        if sample_size % smallest:
            raise ValueError(
                f"UNet: a side of {sample_size} cannot be halved {levels - 1} times after patches of {patch_size}; "
                f"give a multiple of {smallest}, or fewer block_out_channels"
            )
        if any(width % norm_num_groups or width % num_attention_heads for width in block_out_channels):
            raise ValueError(
                f"UNet: norm_num_groups {norm_num_groups} and num_attention_heads {num_attention_heads} must divide each of "
                f"block_out_channels {list(block_out_channels)}"
            )
        attends = [False] * (levels - 1) + [True] if cross_attention is None else list(cross_attention)
        if len(attends) != levels:
            raise ValueError(f"UNet: cross_attention needs one value for each of {levels} levels, got {attends}")
        self.patch_size = patch_size
        self.condition_norm = nn.LayerNorm(condition_width)
        self.network: Any = UNet2DConditionModel(
            sample_size=sample_size // patch_size,
            in_channels=channels * patch_size**2,
            out_channels=channels * patch_size**2,
            down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
            mid_block_type="UNetMidBlock2DCrossAttn",
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            cross_attention_dim=condition_width,
            attention_head_dim=num_attention_heads,  # diffusers keeps this name for the number of heads
            norm_num_groups=norm_num_groups,
            dropout=dropout,
        )

    @property
    def proj_out(self) -> nn.Conv2d:
        """The last layer, under the name that it has in the transformers."""
        layer: nn.Conv2d = self.network.conv_out
        return layer

    def forward(
        self, x: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> UNet2DConditionOutput:
        """What is noisy [B, C, S, S], condition [B, N, W] with its mask bool [B, N] and times [B] -> prediction [B, C, S, S]."""
        folded = F.pixel_unshuffle(x, self.patch_size)  # [B, C p p, S / p, S / p]
        condition = self.condition_norm(encoder_hidden_states)
        output = self.network(folded, timestep, condition, encoder_attention_mask=encoder_attention_mask).sample
        return UNet2DConditionOutput(sample=F.pixel_shuffle(output, self.patch_size))
