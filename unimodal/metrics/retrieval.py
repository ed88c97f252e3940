"""Image-text retrieval metrics in both directions, from ranks.

R@K is the share of queries whose best relevant item has rank <= K, a hit rate (Karpathy & Fei-Fei 2015,
arXiv:1412.2306), and not the fractional recall, under which image-to-text R@1 cannot pass 20 % at five captions per
image.

    first = first_stage(image, text, text_image_id, k=128)             # ranks and candidates, both ways
    t2i, i2t = (rerank(c, pair_scores(c), "sum") for c in first)       # pair_scores: your matching head on c.index
    summarise(t2i, i2t, protocol.reranked(128, "sum"))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from unimodal import arguments

from .protocol import Protocol, Result, check_protocol, require_alike
from .ranking import first_stage


@dataclass(frozen=True, kw_only=True)
class DirectionMetrics:
    """One direction: recalls in percent, median and mean of the 1-based ranks."""

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float

    @property
    def mr(self) -> float:
        """Mean of the three recalls."""
        return (self.r1 + self.r5 + self.r10) / 3

    @classmethod
    def from_ranks(cls, rank: Tensor) -> "DirectionMetrics":
        rank = arguments.integers(rank, "ranks").double()
        if not len(rank) or rank.min() < 1:
            raise ValueError("ranks: expected at least one, and whole numbers from 1 on; 1 is the best")
        r1, r5, r10 = (100 * (rank <= k).double().mean().item() for k in (1, 5, 10))
        # quantile, because Tensor.median returns the lower of the two middle ranks
        return cls(r1=r1, r5=r5, r10=r10, medr=rank.quantile(0.5).item(), meanr=rank.mean().item())


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics(Result):
    """Both directions. Two quantities of the literature are called mR, and here they have two names:
    `t2i_mr` and `i2t_mr` average the three recalls of a direction, `mr_six` all six recalls (remote sensing).
    """

    text_to_image: DirectionMetrics
    image_to_text: DirectionMetrics

    @property
    def mr_six(self) -> float:
        return (self.text_to_image.mr + self.image_to_text.mr) / 2

    @property
    def rsum(self) -> float:
        """Sum of the six recalls, 0 to 600."""
        return 6 * self.mr_six

    def scores(self) -> dict[str, float]:
        names = ("r1", "r5", "r10", "medr", "meanr", "mr")
        return {
            **{f"t2i_{name}": getattr(self.text_to_image, name) for name in names},
            **{f"i2t_{name}": getattr(self.image_to_text, name) for name in names},
            "mr_six": self.mr_six,
            "rsum": self.rsum,
        }


@dataclass(frozen=True, kw_only=True)
class TextToTextMetrics(Result):
    """Captions that look for the other captions of their image."""

    text_to_text: DirectionMetrics

    def scores(self) -> dict[str, float]:
        return {f"t2t_{name}": getattr(self.text_to_text, name) for name in ("r1", "r5", "r10", "medr", "meanr", "mr")}


def summarise(text_to_image: Tensor, image_to_text: Tensor, protocol: Protocol) -> RetrievalMetrics:
    """Metrics of both directions.

    Args:
        text_to_image: [C] rank of each caption's image.
        image_to_text: [I] rank of each image's best caption.

    Raises:
        ValueError: for counts other than the protocol's, or a protocol that does not speak of hits.
    """
    check_protocol(protocol)
    text_to_image = arguments.integers(text_to_image, "text_to_image")
    image_to_text = arguments.integers(image_to_text, "image_to_text")
    if protocol.rule != "hit" or protocol.stage is None:
        raise ValueError(
            f"got a protocol with rule {protocol.rule!r} and stage {protocol.stage!r}; "
            "retrieval is measured under rule 'hit' at stage 'first' or 'reranked'"
        )
    if (len(image_to_text), len(text_to_image)) != (protocol.images, protocol.captions):
        raise ValueError(
            f"got ranks of {len(image_to_text)} images and {len(text_to_image)} captions; the protocol says "
            f"{protocol.images} images and {protocol.captions} captions. Describe the data that was ranked"
        )
    return RetrievalMetrics(
        protocol=protocol,
        text_to_image=DirectionMetrics.from_ranks(text_to_image),
        image_to_text=DirectionMetrics.from_ranks(image_to_text),
    )


def retrieval_metrics(
    image: Tensor,
    text: Tensor,
    text_image_id: Tensor,
    *,
    protocol: Protocol,
    image_id: Tensor | None = None,
    chunk: int = 1024,
) -> RetrievalMetrics:
    """First-stage metrics from embeddings, which come as tensors, arrays or lists. Arguments and errors are those of `first_stage` and
    `summarise`."""
    check_protocol(protocol)
    text_to_image, image_to_text = first_stage(image, text, text_image_id, image_id=image_id, chunk=chunk)
    return summarise(text_to_image.rank, image_to_text.rank, protocol)


def mean_of_folds(folds: Sequence[RetrievalMetrics]) -> RetrievalMetrics:
    """Every number averaged over blocks of one test list, each searched alone.

    "COCO 1K" is the mean of five such blocks in file order, and 15 to 25 points of R@1 easier than the full 5K. The
    protocol of the mean says how many folds it has; where each fold has a fingerprint of its own, that of the mean is the
    hash of theirs.

    Raises:
        ValueError: for fewer than two folds, or folds under unlike protocols.
    """
    folds = arguments.listed(folds, "folds", "RetrievalMetrics")
    for i, fold in enumerate(folds):
        if not isinstance(fold, RetrievalMetrics):
            raise TypeError(arguments.refused(f"folds[{i}]", "RetrievalMetrics", fold, "retrieval_metrics gives them"))
    if len(folds) < 2:
        raise ValueError(f"got {len(folds)} folds; a mean of folds needs at least two")
    fingerprints = [fold.protocol.fingerprint for fold in folds]
    require_alike([replace(fold.protocol, fingerprint="") for fold in folds])
    fingerprint = fingerprints[0]
    if len(set(fingerprints)) > 1:
        if len(set(fingerprints)) < len(fingerprints):
            raise ValueError(
                f"the folds have the fingerprints {fingerprints}; a fold that is counted twice is no mean of folds"
            )
        fingerprint = sha256(" ".join(fingerprints).encode()).hexdigest()[:16]

    def mean(directions: list[DirectionMetrics]) -> DirectionMetrics:
        values = torch.tensor([[d.r1, d.r5, d.r10, d.medr, d.meanr] for d in directions], dtype=torch.float64)
        r1, r5, r10, medr, meanr = values.mean(dim=0).tolist()
        return DirectionMetrics(r1=r1, r5=r5, r10=r10, medr=medr, meanr=meanr)

    return RetrievalMetrics(
        protocol=replace(folds[0].protocol, folds=len(folds), fingerprint=fingerprint),
        text_to_image=mean([fold.text_to_image for fold in folds]),
        image_to_text=mean([fold.image_to_text for fold in folds]),
    )
