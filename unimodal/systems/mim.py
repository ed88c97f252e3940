"""Masked image modelling beside contrast: predict hidden image tokens from the others (BEiT, Bao et al. 2021, arXiv 2106.08254; the target
is the encoder's own token, normalised, as MAE does with pixels, He et al. 2021, arXiv 2111.06377).

Legend: B images, T tokens, C width of the encoder's tokens, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import random_rows
from unimodal.losses.numerics import mean_over_real
from unimodal.systems.base import Batch, Encoders, Images
from unimodal.systems.clip import CLIP


def hide_tokens(mask: Tensor, share: float) -> Tensor:
    """Which of the real tokens are hidden, bool [B, T]: the same share of each row, at least one."""
    count = (mask.sum(1, keepdim=True) * share).floor().clamp(min=1)
    draw = random_rows(mask.shape, mask.device).masked_fill(~mask, 2.0)
    return (draw.argsort(1).argsort(1) < count) & mask


def masked_image_loss(predicted: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of the hidden tokens of all ranks, each normalised to mean 0 and variance 1: predicted and tokens [B, T, C],
    hidden [B, T]."""
    target = F.layer_norm(tokens, tokens.shape[-1:])
    total = F.mse_loss(predicted[hidden].float(), target[hidden].float(), reduction="sum") / tokens.shape[-1]
    return mean_over_real(total, hidden)


class Restorer(nn.Module):
    """What stands in for hidden tokens, and what predicts them.

    Args:
        encoders: the shared ones.
        width: W of the states that it predicts from.
        share: of the tokens that are hidden.
    """

    def __init__(self, encoders: Encoders, width: int, share: float) -> None:
        super().__init__()
        self.share = share
        # A hidden token says where it stands, or all of them would be predicted alike.
        self.hole = nn.Parameter(0.02 * torch.randn(encoders.image_tokens, encoders.image_width))
        self.restore = nn.Linear(width, encoders.image_width)

    def forward(self, images: Images, read: Callable[[Images], Tensor]) -> Tensor:
        """The loss of one draw of hidden tokens; `read` makes states [B, T, W] of images."""
        hidden = hide_tokens(images.mask, self.share)
        holes = self.hole[: images.tokens.shape[1]].to(images.tokens.dtype)
        states = read(images._replace(tokens=torch.where(hidden[..., None], holes, images.tokens)))
        return masked_image_loss(self.restore(states), images.tokens, hidden)


class MaskedImages(CLIP):
    """CLIP whose image tower also restores hidden tokens.

    Args:
        encoders: the shared ones.
        share: of the tokens that are hidden.
        weight: of the loss, beside contrast.
        width, layers, heads, dropout, dim: as `DualEncoder`.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.1,
        dim: int = 256,
        share: float = 0.4,
        weight: float = 0.5,
    ) -> None:
        super().__init__(encoders, width, layers, heads, dropout, dim)
        self.weight = weight
        self.restorer = Restorer(encoders, width, share)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        restored = self.restorer(batch.images, lambda images: self.image_tower(*images[:2])[0][:, 1:])
        return {**super().losses(batch, stage, progress), "mim": self.weight * restored}
