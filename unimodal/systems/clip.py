"""CLIP and SigLIP: two towers, one vector each, told apart by their loss.

CLIP: Radford et al. 2021 (arXiv 2103.00020), softmax over the batch. SigLIP: Zhai et al. 2023 (arXiv 2303.15343), a yes or no for each
pair, with a learned bias. SigLIP's own towers (attention pooling, text read at its last position) are those of its published weights; here
both losses have the same towers, so that they alone differ.
"""

import torch
from torch import Tensor, nn

from unimodal.layers import init_weights, unit
from unimodal.losses import info_nce, sigmoid_loss
from unimodal.systems.base import Batch, Encoders, Images, System, Texts
from unimodal.systems.towers import Scale, Tower


class DualEncoder(System):
    """A tower for each side, each read by its class token and projected to E without a bias.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout: of both towers.
        dim: E.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.1,
        dim: int = 256,
    ) -> None:
        super().__init__(encoders)
        self.image_tower = Tower(encoders.image_width, width, layers, heads, dropout)
        self.text_tower = Tower(encoders.text_width, width, layers, heads, dropout)
        self.image_projection, self.text_projection = (nn.Linear(width, dim, bias=False) for _ in range(2))
        for projection in (self.image_projection, self.text_projection):
            init_weights(projection)  # CLIP's start as well: N(0, 1 / width)
        self.scale = Scale()

    def embed_images(self, images: Images) -> Tensor:
        return unit(self.image_projection(self.image_tower(images.tokens, images.mask)[0][:, 0]))

    def embed_texts(self, texts: Texts) -> Tensor:
        return unit(self.text_projection(self.text_tower(texts.tokens, texts.mask)[0][:, 0]))

    def after_step(self, stage: str) -> None:
        self.scale.clamp()


class CLIP(DualEncoder):
    """Symmetric softmax over the batch; captions of the same image are positives."""

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        image, text = self.embed_images(batch.images), self.embed_texts(batch.texts)
        return {"itc": info_nce(image, text, batch.image_id, scale=self.scale())}


class SigLIP(DualEncoder):
    """Pairwise sigmoid, summed over texts and averaged over images; scale 10 and bias -10 at the start, neither clamped."""

    def __init__(self, encoders: Encoders, **settings: int | float) -> None:
        super().__init__(encoders, **settings)  # type: ignore[arg-type]
        self.scale = Scale(10.0)
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        image, text = self.embed_images(batch.images), self.embed_texts(batch.texts)
        return {"itc": sigmoid_loss(image, text, batch.image_id, scale=self.scale(), bias=self.bias)}

    def after_step(self, stage: str) -> None:
        """The scale of SigLIP is not clamped."""
