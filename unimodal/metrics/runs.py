"""The ranks of a run, kept query by query with their protocol, so that two runs can be compared long after both ended.

Every number here is a mean over images of something that each image has: of its own rank, and of those of its captions.
Images are what is drawn for an interval and flipped for a test, since the captions of one image are not independent.

Legend: I images, C captions.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unimodal import arguments
from unimodal.files import replacing

from .protocol import Protocol, check_protocol
from .significance import Interval, PairedTest, bootstrap_interval, paired_test

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """One search, both ways.

    Attributes:
        protocol: how it was made; with folds, of one fold, while the ranks are of all folds in order.
        text_to_image: [C] ranks.
        image_to_text: [I] ranks.
        text_image: [C] row of the image that each caption belongs to.
    """

    protocol: Protocol
    text_to_image: Tensor
    image_to_text: Tensor
    text_image: Tensor

    def __post_init__(self) -> None:
        check_protocol(self.protocol)
        for name in ("text_to_image", "image_to_text", "text_image"):
            object.__setattr__(self, name, arguments.integers(getattr(self, name), name).cpu())
        images, captions = len(self.image_to_text), len(self.text_to_image)
        if not images or not captions or len(self.text_image) != captions:
            raise ValueError(
                f"got ranks of {images} images and {captions} captions, and an image for {len(self.text_image)} captions; expected "
                "at least one of each, and an image for each caption"
            )
        if min(self.text_to_image.min(), self.image_to_text.min()) < 1:
            raise ValueError("ranks: expected whole numbers from 1 on; 1 is the best")
        lowest, highest = int(self.text_image.min()), int(self.text_image.max())
        if lowest < 0 or highest >= images:
            raise ValueError(f"text_image: expected rows 0 to {images - 1} of the images, got {lowest} to {highest}")

    def values(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By the name of a metric: one value per query, whose mean is the metric, and the query's image.

        rSum has one value per image: of the image, and of its captions, weighed so that the mean is rSum.
        """
        captions, images = self.text_image.numpy(), np.arange(len(self.image_to_text))
        out, total = {}, np.zeros(len(images))
        for direction, rank, group in (
            ("t2i", self.text_to_image, captions),
            ("i2t", self.image_to_text, images),
        ):
            for k in DEPTHS:
                hit = 100.0 * (rank <= k).numpy()
                out[f"{direction}_r{k}"] = (hit, group)
                total += np.bincount(group, weights=hit, minlength=len(images)) * len(images) / len(hit)
            out[f"{direction}_meanr"] = (rank.double().numpy(), group)
        return out | {"rsum": (total, images)}

    def intervals(self, *, seed: int = 0, samples: int = 1000) -> dict[str, Interval]:
        """Bootstrap interval of every metric."""
        return {
            name: bootstrap_interval(values, self.protocol, seed=seed, groups=groups, samples=samples)
            for name, (values, groups) in self.values().items()
        }


def compare(a: Ranks, b: Ranks, *, seed: int = 0, samples: int = 10_000) -> dict[str, PairedTest]:
    """Paired test b - a of every metric; p values are of one question each, not corrected for asking several.

    Raises:
        ValueError: for unlike protocols; only how the gallery was searched may differ.
    """
    for name, ranks in (("a", a), ("b", b)):
        _check_ranks(name, ranks)
    ours, theirs = a.values(), b.values()
    return {
        name: paired_test(
            ours[name][0],
            theirs[name][0],
            (a.protocol, b.protocol),
            seed=seed,
            groups=ours[name][1],
            samples=samples,
        )
        for name in ours
    }


def save_ranks(path: str | Path, stages: Mapping[str, Ranks]) -> None:
    """Write the ranks of a run, by stage ("first", "reranked"), into one safetensors file."""
    tensors, protocols = {}, {}
    path = arguments.path(path, "path")
    for stage, ranks in arguments.mapping(stages, "stages").items():
        _check_ranks(f"stages[{stage!r}]", ranks)
        protocols[stage] = json.dumps(asdict(ranks.protocol))
        for name in ("text_to_image", "image_to_text", "text_image"):
            tensors[f"{stage}.{name}"] = getattr(ranks, name).to("cpu", torch.int64).clone()
    with replacing(path) as unfinished:
        save_file(tensors, str(unfinished), metadata=protocols)


def load_ranks(path: str | Path) -> dict[str, Ranks]:
    """Read what `save_ranks` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no ranks.
    """
    path = arguments.path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give the ranks.safetensors that `unimodal evaluate --out` wrote"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return {
                stage: Ranks(
                    Protocol(**json.loads(protocol)),
                    *(file.get_tensor(f"{stage}.{name}") for name in ("text_to_image", "image_to_text", "text_image")),
                )
                for stage, protocol in (file.metadata() or {}).items()
            }
    except Exception as error:  # the library has an error type of its own for each way a file can be wrong
        raise ValueError(f"{path} holds no ranks that can be read: {error}") from error


def _check_ranks(name: str, ranks: Ranks) -> None:
    if not isinstance(ranks, Ranks):
        raise TypeError(arguments.refused(name, "Ranks", ranks, "load_ranks reads them from a file"))
