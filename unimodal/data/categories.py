"""Categories of images: a reader's labels, or else the objects that captions name.

Legend: I images, K categories.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimodal.data.nouns import objects_of
from unimodal.data.pairs import Pairs


def categories_of(pairs: Pairs) -> list[frozenset[str]]:
    """The categories of each image: the reader's labels, or else the objects that its captions name."""
    labels = [pairs.labels(i) for i in range(len(pairs))]
    return labels if any(labels) else [objects_of(pairs.captions(i)) for i in range(len(pairs))]


def one_hot(things: Sequence[frozenset[str]], categories: Sequence[str]) -> Tensor:
    """Which of the categories each image has, float [I, K]; a category that is not among them has no column."""
    place = {name: k for k, name in enumerate(categories)}
    out = torch.zeros(len(things), len(categories))
    for i, names in enumerate(things):
        for name in names & place.keys():
            out[i, place[name]] = 1
    return out
