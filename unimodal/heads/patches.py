"""An autoencoder with nothing to train: small patches in whitened principal components, in closed form.

Pixels of flat pictures are a poor space to learn in: most of their variance is the mean colour of a patch, while the
edges that tell a ring from a circle are a thousandth of it and are learned last. Here every direction that is kept has
variance one, so that shape weighs as much as background. Good for small, drawn pictures; photographs want a trained
autoencoder.

Principal components as a whitening transform: Hyvärinen and Oja 2000 (Neural Networks 13), section 5.2.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchAutoencoder(nn.Module):
    """Linear encoder and decoder of P x P patches that do not overlap. `fit` computes them; no gradient ever does.

    Args:
        latent_channels: number C of components kept, the strongest of 3 P^2.
        patch_size: side P of a patch in pixels.
    """

    mean: Tensor
    components: Tensor
    deviation: Tensor

    def __init__(self, *, latent_channels: int = 24, patch_size: int = 4):
        super().__init__()
        if not 1 <= latent_channels <= 3 * patch_size**2:
            raise ValueError(
                f"PatchAutoencoder: a patch of {patch_size} x {patch_size} pixels has 1 to {3 * patch_size**2} "
                f"components, got latent_channels={latent_channels}"
            )
        self.patch_size = patch_size
        self.register_buffer("mean", torch.zeros(3, patch_size, patch_size))
        self.register_buffer("components", torch.zeros(latent_channels, 3, patch_size, patch_size))  # orthonormal
        self.register_buffer("deviation", torch.zeros(latent_channels))  # 0 until fitted

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """[C, H, W] of the latents of a picture of `size` pixels."""
        if size % self.patch_size:
            raise ValueError(
                f"PatchAutoencoder: patch_size {self.patch_size} does not divide pictures of {size} pixels"
            )
        return len(self.deviation), size // self.patch_size, size // self.patch_size

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute the components from pictures [M, 3, S, S] in [-1, 1]; a thousand are plenty."""
        size = self.patch_size
        patches = F.unfold(images.double(), size, stride=size).transpose(1, 2).flatten(0, 1)  # [M S^2 / P^2, 3 P^2]
        mean = patches.mean(0)
        variance, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))  # rising
        kept = len(self.deviation)
        variance, components = variance.flip(0)[:kept], components.flip(1).T[:kept]
        if variance[-1] < 1e-9 * variance[0]:
            raise ValueError(
                f"PatchAutoencoder: these {len(images)} pictures vary in {int((variance >= 1e-9 * variance[0]).sum())} "
                f"components only, and {kept} are to be kept; lower latent_channels or fit on more pictures"
            )
        # A component has no sign of its own: the largest entry is made positive, so that every machine agrees.
        sign = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        self.mean.copy_(mean.view_as(self.mean))
        self.components.copy_((components * sign).view_as(self.components))
        self.deviation.copy_(variance.sqrt())

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] -> latents [B, C, S / P, S / P], each channel of mean 0 and variance 1."""
        self._require_fitted()
        filters = self.components / self.deviation.view(-1, 1, 1, 1)
        return F.conv2d(images - self._tiled(images.shape), filters, stride=self.patch_size)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> pictures [B, 3, P H, P W], without what the dropped components held."""
        self._require_fitted()
        filters = self.components * self.deviation.view(-1, 1, 1, 1)
        pictures = F.conv_transpose2d(latents, filters, stride=self.patch_size)
        return pictures + self._tiled(pictures.shape)

    def _tiled(self, shape: torch.Size) -> Tensor:
        return self.mean.repeat(1, shape[-2] // self.patch_size, shape[-1] // self.patch_size)

    def _require_fitted(self) -> None:
        if not cast(bool, self.deviation.all().item()):
            raise ValueError("PatchAutoencoder: no components yet; call fit(images) or load a checkpoint first")
