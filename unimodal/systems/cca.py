"""Canonical correlation analysis: the classical starting point of image-text retrieval, in closed form.

Two linear maps, one per side, under which paired image and text features correlate as much as linear maps allow
(Hotelling 1936, "Relations between two sets of variates"). The power weighting of the correlations and its use for
retrieval follow Gong et al. 2014 (arXiv 1212.4522). Any fixed features will do, for example those of a frozen encoder.

Shapes: n pairs, p width of image features, q width of text features, d canonical directions kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from unimodal.layers import masked_mean, unit
from unimodal.systems.base import Batch, Encoders, Images, System, Texts

FITTED = ("image_mean", "text_mean", "image_map", "text_map", "correlations")


@dataclass(frozen=True, kw_only=True)
class CCA:
    """Fitted maps, all in float64.

    Attributes:
        image_mean: [p].
        text_mean: [q].
        image_map: [p, d], whitens the (regularised) image covariance: A^T Cxx A = I.
        text_map: [q, d], the same for the texts.
        correlations: [d] canonical correlations of the fit, largest first.
        power: directions are weighted by correlation ** power; 0 weights all alike, Gong et al. use 4.
    """

    image_mean: Tensor
    text_mean: Tensor
    image_map: Tensor
    text_map: Tensor
    correlations: Tensor
    power: float

    @classmethod
    def fit(
        cls, image: Tensor, text: Tensor, *, dim: int = 128, regularisation: float = 1e-3, power: float = 4.0
    ) -> "CCA":
        """Fit on paired features; repeat an image's row for each of its captions.

        Args:
            image: [n, p], row i belongs to row i of the texts.
            text: [n, q].
            dim: d; at most p and q.
            regularisation: added to both covariances' diagonals, relative to their mean diagonal.
            power: see the class.

        Raises:
            ValueError: for unpaired or too few rows, non-finite features, a dim beyond p or q, or covariances that stay
                singular.
        """
        if image.ndim != 2 or text.ndim != 2 or len(image) != len(text) or len(image) < 2:
            raise ValueError(
                f"CCA: got image features {list(image.shape)}, text features {list(text.shape)}; expected [n, p] and "
                "[n, q] with at least two pairs. Repeat an image's row for each of its captions"
            )
        if not 1 <= dim <= (widest := min(image.shape[1], text.shape[1])):
            raise ValueError(f"CCA: dim must be between 1 and the narrower feature width {widest}, got {dim}")
        if not (image.isfinite().all() and text.isfinite().all()):
            raise ValueError("CCA: the features hold NaN or infinite values; look at the encoder's output")
        image, text = image.double(), text.double()
        image_mean, text_mean = image.mean(0), text.mean(0)
        x, y = image - image_mean, text - text_mean
        x_whitener = _whitener(x.T @ x / (len(x) - 1), regularisation, "image")  # [p, p]
        y_whitener = _whitener(y.T @ y / (len(y) - 1), regularisation, "text")  # [q, q]
        u, correlations, v = torch.linalg.svd(x_whitener @ (x.T @ y / (len(x) - 1)) @ y_whitener, full_matrices=False)
        return cls(
            image_mean=image_mean,
            text_mean=text_mean,
            image_map=x_whitener @ u[:, :dim],
            text_map=y_whitener @ v[:dim].T,
            correlations=correlations[:dim],
            power=power,
        )

    def embed_image(self, image: Tensor) -> Tensor:
        """Image features [n, p] -> unit vectors [n, d], float32."""
        return self._embed(image, self.image_mean, self.image_map, "image")

    def embed_text(self, text: Tensor) -> Tensor:
        """Text features [n, q] -> unit vectors [n, d], float32."""
        return self._embed(text, self.text_mean, self.text_map, "text")

    def _embed(self, features: Tensor, mean: Tensor, projection: Tensor, side: str) -> Tensor:
        if features.ndim != 2 or features.shape[1] != len(mean):
            raise ValueError(
                f"CCA: expected {side} features [n, {len(mean)}] as in the fit, got {list(features.shape)}"
            )
        projected = (features.double() - mean) @ projection * self.correlations**self.power
        return unit(projected).float()


def _whitener(covariance: Tensor, regularisation: float, side: str) -> Tensor:
    """Inverse square root of the regularised covariance [w, w], symmetric."""
    ridge = regularisation * covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(
        covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    )
    # Below float64's resolution of the largest value a direction is noise, and its inverse root would amplify it.
    if values[0] <= len(values) * torch.finfo(values.dtype).eps * values[-1]:
        raise ValueError(
            f"CCA: the {side} features span fewer than their {len(values)} dimensions; raise regularisation (got "
            f"{regularisation}), or give more pairs"
        )
    return vectors @ (values.rsqrt()[:, None] * vectors.T)


class CanonicalCorrelation(System):
    """CCA between the mean tokens of both encoders, fitted on the training split. An inferred design: no public code is tied to the
    method, so that number of directions, ridge and power are ours.

    Args:
        encoders: the shared ones.
        dim: d; fewer where an encoder is narrower.
        regularisation, power: see `CCA`.
    """

    def __init__(self, encoders: Encoders, dim: int = 256, regularisation: float = 1e-2, power: float = 2.0) -> None:
        super().__init__(encoders)
        self.regularisation, self.power = regularisation, power
        self.dim = min(dim, encoders.image_width, encoders.text_width)
        for side, width in (("image", encoders.image_width), ("text", encoders.text_width)):
            self.register_buffer(f"{side}_mean", torch.zeros(width, dtype=torch.float64))
            self.register_buffer(f"{side}_map", torch.zeros(width, self.dim, dtype=torch.float64))
        self.register_buffer("correlations", torch.zeros(self.dim, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moved as torch does it, and always in float64, in which the maps were fitted."""
        held = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in held.items():
            if (now := self.get_buffer(name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def prepare(self, batches: Iterator[Batch]) -> None:
        rows = [(masked_mean(*b.images[:2]), masked_mean(b.texts.tokens, b.texts.mask)) for b in batches]
        images, texts = map(torch.cat, zip(*rows))
        fitted = CCA.fit(images, texts, dim=self.dim, regularisation=self.regularisation, power=self.power)
        for name in FITTED:
            getattr(self, name).copy_(getattr(fitted, name))

    def untrained(self) -> Iterator[Tensor]:
        return self.buffers()

    @property
    def fitted(self) -> CCA:
        """The maps, as they were fitted or loaded."""
        return CCA(**{name: self.get_buffer(name) for name in FITTED}, power=self.power)

    def embed_images(self, images: Images) -> Tensor:
        return self.fitted.embed_image(masked_mean(images.tokens, images.mask))

    def embed_texts(self, texts: Texts) -> Tensor:
        return self.fitted.embed_text(masked_mean(texts.tokens, texts.mask))
