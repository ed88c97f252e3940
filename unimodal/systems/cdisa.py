"""CDISA: deep interaction of both sides teaches embeddings that are sorted by category.

An inferred design: of the paper (IEICE Trans. Inf. & Syst., 2024EDP7279) the abstract alone is public. It names a module of deep
interaction, bidirectional cosine matching, and categories as the truth. Our module is decomposable attention (Parikh et al. 2016, arXiv
1606.01933). A gallery is embedded before its queries are known, so the retrieval vector must not need the other side: it comes from a
perceptron that both sides share, and the interaction is its teacher in training.

Legend: B pairs, N image tokens, L words, W width, H heads, K categories, E embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.layers import init_weights, key_mask_to_bias, masked_mean, unit
from unimodal.losses import category_loss
from unimodal.systems.base import Batch, Encoders, Images, System, Texts
from unimodal.systems.towers import SCALE, Tower

INVARIANCE = 0.1  # weight of the distance of true pairs


class Interaction(nn.Module):
    """One layer of decomposable attention: attend to the other side, compare with what was found there. Both sides share its weights.

    Args:
        width: W.
        heads: H.
        dropout: of what the layer adds.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"interaction: a width of {width} does not divide into {heads} heads; change one of them")
        self.heads = heads
        self.attend = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.compare = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, x_mask: Tensor, y: Tensor, y_mask: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, W] and y [B, L, W] -> the same, each having read the other."""
        keys_x, keys_y = self._split(self.attend(x)), self._split(self.attend(y))
        affinity = keys_x @ keys_y.transpose(-1, -2) * keys_x.shape[-1] ** -0.5  # [B, H, N, L]
        found_in_y = (affinity + key_mask_to_bias(y_mask)).softmax(-1) @ self._split(y)
        found_in_x = (affinity.transpose(-1, -2) + key_mask_to_bias(x_mask)).softmax(-1) @ self._split(x)
        return self._compare(x, found_in_y), self._compare(y, found_in_x)

    def _compare(self, x: Tensor, found: Tensor) -> Tensor:
        found = found.transpose(1, 2).flatten(2)  # [B, N, W]
        return self.norm(x + self.dropout(self.compare(torch.cat([x, found, x - found, x * found], -1))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, W] -> [B, H, N, W / H]


class CDISA(System):
    """Category-level retrieval: items that share a category match.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout: of both towers.
        dim: E.
        interactions: layers of the interaction.
        categories: K, of `Batch.labels`.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.1,
        dim: int = 256,
        interactions: int = 2,
        categories: int = 4,
    ) -> None:
        super().__init__(encoders)
        self.image_tower = Tower(encoders.image_width, width, layers, heads, dropout)
        self.text_tower = Tower(encoders.text_width, width, layers, heads, dropout)
        self.interactions = nn.ModuleList(Interaction(width, heads, dropout) for _ in range(interactions))
        self.shared = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, dim))
        self.classifier = nn.Linear(dim, categories)
        for module in (self.interactions, self.shared, self.classifier):
            module.apply(init_weights)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        labels = batch.labels
        if labels is None or labels.shape[1] != self.classifier.out_features:
            given = "none" if labels is None else f"{labels.shape[1]} categories"
            raise ValueError(
                f"CDISA learns categories: it was built for {self.classifier.out_features}, the data has {given}; set categories"
            )
        x, x_mask = self.image_tower(*batch.images[:2])
        y, y_mask = self.text_tower(batch.texts.tokens, batch.texts.mask)
        image, text = self._vector(x[:, 0]), self._vector(y[:, 0])
        x, x_mask, y, y_mask = x[:, 1:], x_mask[:, 1:], y[:, 1:], y_mask[:, 1:]
        for layer in self.interactions:
            x, y = layer(x, x_mask, y, y_mask)
        teachers = self._vector(masked_mean(x, x_mask)), self._vector(masked_mean(y, y_mask))
        return {
            "cls": torch.stack([self._classify(z, labels) for z in (image, text, *teachers)]).mean(),
            "bcm": category_loss(image, text, labels, batch.image_id, scale=SCALE),
            "inv": INVARIANCE * _distance(image, text),
            "teach": (_distance(image, teachers[0].detach()) + _distance(text, teachers[1].detach())) / 2,
        }

    def embed_images(self, images: Images) -> Tensor:
        return self._vector(self.image_tower(images.tokens, images.mask)[0][:, 0])

    def embed_texts(self, texts: Texts) -> Tensor:
        return self._vector(self.text_tower(texts.tokens, texts.mask)[0][:, 0])

    def _vector(self, pooled: Tensor) -> Tensor:
        """[B, W] -> unit vectors [B, E]."""
        return unit(self.shared(pooled))

    def _classify(self, vector: Tensor, labels: Tensor) -> Tensor:
        """A yes or no for each category, for an item may have several; summed over them. Cosines need a scale to be sure of anything."""
        logits = (SCALE * self.classifier(vector)).float()
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(1).mean()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (1 - (a * b).sum(-1)).mean()
