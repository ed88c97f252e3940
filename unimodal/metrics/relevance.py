"""Retrieval metrics that count every relevant item, where a query has many: fractional recall, average precision, nDCG.

The hit rate of `retrieval.py` asks whether any right answer is near the top; these ask how many are, and how near. Names
and denominators, with R relevant items of a query, H@K of them among the first K, and rel(r) = 1 where place r holds one:

    recall_K      H@K / R
    map           mean over the R items of (relevant items up to its place) / (its place)
    map_K         sum of the same over the items within K, divided by min(R, K): the best that K places allow
    ndcg_K        sum over r <= K of rel(r) / log2(1 + r), divided by its largest value (Jarvelin & Kekalainen 2002)
    r_precision   H@R / R

Some code divides AP@K by H@K, the items found, under which a query that finds one item at place 1 and no more scores as one
that finds all: such numbers do not compare with `map_K`. All are in percent, means over queries.

Ties count against the model: among equal scores, items that are not relevant stand first.

Legend: Q queries, G gallery items, L labels, E embedding dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unimodal import arguments
from unimodal.retrieval import similarity

from .protocol import Protocol, Result, check_protocol
from .ranking import check_embeddings, first_row

Direction = Literal["t2i", "i2t", "t2t", "i2i"]


@dataclass(frozen=True, kw_only=True)
class RelevanceMetrics(Result):
    """One direction; `values` by name as in the module's docstring, percent."""

    direction: Direction
    values: dict[str, float]

    def scores(self) -> dict[str, float]:
        return {f"{self.direction}_{name}": value for name, value in self.values.items()}


@torch.no_grad()
def relevance_metrics(
    query: Tensor,
    gallery: Tensor,
    query_label: Tensor,
    gallery_label: Tensor,
    *,
    direction: Direction,
    protocol: Protocol,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
) -> RelevanceMetrics:
    """Searches one way on embeddings and counts every relevant item; memory grows with the gallery, never with Q x G.

    Args:
        query, gallery: [Q, E] and [G, E]; either may be [., N, E], scored by the best of its vectors.
        query_label, gallery_label: what is relevant. Ids [Q] and [G]: items of equal id. Multi-hot labels [Q, L] and
            [G, L]: items that share at least one.
        direction: what searches what, t for texts and i for images. Under "t2t" and "i2i" query i is gallery item i, and
            no answer to itself.
        protocol: of the data; how relevance was judged is added to its rule.
        ks: the depths K.
        chunk: queries per block of scores.

    Raises:
        ValueError: for shapes that do not fit, sizes other than the protocol's, non-finite embeddings, no or wrong depths,
            or a query without a relevant item.
    """
    check_protocol(protocol)
    arguments.choice(direction, "direction", get_args(Direction))
    chunk = arguments.integer(chunk, "chunk")
    ks = [arguments.integer(k, f"ks[{i}]") for i, k in enumerate(arguments.listed(ks, "ks", "depths"))]
    if not ks:
        raise ValueError("ks: expected at least one depth, got none")
    query, gallery = check_embeddings(query, gallery, "query", "gallery")
    query_label = _labels(query_label, "query_label").to(query.device)
    gallery_label = _labels(gallery_label, "gallery_label").to(query.device)
    _check_labels(query_label, gallery_label, len(query), len(gallery))
    sizes = {"t": protocol.captions, "i": protocol.images}
    if (len(query), len(gallery)) != (sizes[direction[0]], sizes[direction[2]]):
        raise ValueError(
            f"got {len(query)} queries and {len(gallery)} gallery items for {direction}; the protocol says "
            f"{protocol.images} images and {protocol.captions} captions. Describe the data that was ranked"
        )
    without_self = direction in ("t2t", "i2i")
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for rows in torch.arange(len(query), device=query.device).split(chunk):
            scores = similarity(query[rows], gallery)  # [chunk, G]
            relevant = _relevant(query_label[rows], gallery_label)
            if without_self:  # it comes last, and is not relevant
                scores[torch.arange(len(rows)), rows] = -torch.inf
                relevant[torch.arange(len(rows)), rows] = False
            if not (answered := relevant.any(dim=1)).all():
                raise ValueError(
                    f"query {int(rows[first_row(~answered)])} has no relevant item ({(~answered).sum()} of the {len(rows)} "
                    "queries of its chunk have none); drop such queries, or add their items to the gallery"
                )
            parts.append(values_per_query(scores, relevant, ks))
    values = {name: 100 * torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}
    judged = "every item of the same id" if query_label.ndim == 1 else "every item that shares a label"
    return RelevanceMetrics(protocol=replace(protocol, rule=judged), direction=direction, values=values)


def values_per_query(scores: Tensor, relevant: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """The metrics of each query between 0 and 1, float64 [Q], from scores and relevance [Q, G]."""
    # A stable sort by score keeps the order it finds among equals, and it finds what is not relevant first.
    worst_first = relevant.to(torch.uint8).argsort(dim=1, stable=True)
    by_score = scores.gather(1, worst_first).argsort(dim=1, descending=True, stable=True)
    hit = relevant.gather(1, worst_first).gather(1, by_score).double()  # [Q, G] at each place, best first
    place = torch.arange(1, hit.shape[1] + 1, device=hit.device, dtype=torch.float64)
    found = hit.cumsum(dim=1)
    total = found[:, -1]
    precision = (found / place * hit).cumsum(dim=1)
    gain = 1 / (1 + place).log2()
    best_gain = gain.cumsum(dim=0)
    out = {}
    for k in ks:
        last = min(k, hit.shape[1]) - 1
        possible = total.clamp(max=last + 1)
        out[f"recall_{k}"] = found[:, last] / total
        out[f"map_{k}"] = precision[:, last] / possible
        out[f"ndcg_{k}"] = (hit[:, : last + 1] @ gain[: last + 1]) / best_gain[possible.long() - 1]
    out["map"] = precision[:, -1] / total
    out["r_precision"] = found.gather(1, total.long()[:, None] - 1).squeeze(1) / total
    return out


def relevance_by_label(query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """Whether a query and an item share a label, the ground truth of category-level retrieval (Rasiwasia et al. 2010).

    Q queries, G items, L labels. For many queries pass them in chunks: the answer has Q x G entries.

    Args:
        query_labels: bool or 0 and 1 [Q, L].
        gallery_labels: bool or 0 and 1 [G, L].

    Returns:
        bool [Q, G].

    Raises:
        ValueError: the two do not have the same labels, or hold something other than 0 and 1, such as class numbers.
    """
    query_labels, gallery_labels = _labels(query_labels, "query_labels"), _labels(gallery_labels, "gallery_labels")
    gallery_labels = gallery_labels.to(query_labels.device)
    if query_labels.ndim != 2 or gallery_labels.ndim != 2 or query_labels.shape[1] != gallery_labels.shape[1]:
        raise ValueError(
            f"got labels {list(query_labels.shape)} and {list(gallery_labels.shape)}; expected [Q, L] and [G, L] with one L"
        )
    for labels in (query_labels, gallery_labels):
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                "labels are 0 or 1 in a column for each label; torch.nn.functional.one_hot makes them of class numbers"
            )
    return torch.mm(query_labels.float(), gallery_labels.float().T) > 0.5


def _labels(value: Any, name: str) -> Tensor:
    found = arguments.tensor(value, name, "ids [N], or 0 and 1 [N, L]")
    if found.is_floating_point() and found.ndim == 1:
        raise TypeError(arguments.refused(name, "ids [N] as whole numbers", value))
    return found


def _relevant(query_label: Tensor, gallery_label: Tensor) -> Tensor:
    if query_label.ndim == 1:
        return query_label[:, None] == gallery_label
    return relevance_by_label(query_label, gallery_label)


def _check_labels(query_label: Tensor, gallery_label: Tensor, queries: int, items: int) -> None:
    shapes = (list(query_label.shape), list(gallery_label.shape))
    if shapes[0][:1] != [queries] or shapes[1][:1] != [items] or shapes[0][1:] != shapes[1][1:] or len(shapes[0]) > 2:
        raise ValueError(
            f"got labels {shapes[0]} and {shapes[1]} for {queries} queries and {items} gallery items; expected ids [Q] and "
            "[G], or multi-hot labels [Q, L] and [G, L]"
        )
