"""COCO 5K under later, fuller judgements: ECCV Caption (Chun et al. 2022, arXiv:2204.03359) and CxC (Parekh et al. 2021, arXiv:2004.15020).

COCO's labels know five captions of an image and miss many more that fit; here people judged them again. The judgements and
the arithmetic are those of the package `eccv-caption`; we check the ids, and put the protocol on the numbers.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .protocol import Protocol, Result

Ranked = Mapping[int, Sequence[int]]
DEPTH = 64  # finds per query that suffice: no query has more relevant items than 48


@dataclass(frozen=True, kw_only=True)
class JudgedMetrics(Result):
    """Numbers by name, percent."""

    values: dict[str, float]

    def scores(self) -> dict[str, float]:
        return self.values


def judged_metrics(
    text_to_image: Ranked, image_to_text: Ranked, protocol: Protocol
) -> tuple[JudgedMetrics, JudgedMetrics]:
    """ECCV Caption's mAP@R, R-precision and R@1, and CxC's R@1, both ways.

    Args:
        text_to_image: COCO caption id -> COCO image ids, best first. Every judged caption, and as many images as it has
            relevant ones; more do no harm.
        image_to_text: the same the other way round.
        protocol: of the search; its rule is replaced by the name of the judgements.

    Returns:
        (ECCV Caption, CxC): two results, since their rules differ and they do not share a table.

    Raises:
        ImportError: eccv-caption is not installed.
        ValueError: a judged query is missing, or found too few items.
    """
    judge = _judge()
    found = {"t2i": dict(text_to_image), "i2t": dict(image_to_text)}
    for name, judged in (("ECCV Caption", judge.eccv_gts), ("CxC", judge.cxc_gts)):
        for direction, relevant in judged.items():
            _check(f"{name} {direction}", found[direction], relevant, whole=name != "CxC")
    eccv, cxc = judge.eccv_metrics(found, "all"), judge.cxc_recalls(found, "all", K=1)
    names = {"map_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}
    values = {f"{way}_{ours}": 100 * float(eccv[theirs][way]) for way in found for ours, theirs in names.items()}
    return (
        JudgedMetrics(protocol=replace(protocol, rule="ECCV Caption judgements"), values=values),
        JudgedMetrics(
            protocol=replace(protocol, rule="CxC judgements, hit"),
            values={f"{way}_r1": 100 * float(cxc[way]) for way in found},
        ),
    )


def require_judged(captions: Collection[int], images: Collection[int]) -> None:
    """Refuses data that lack a judged query, before they are searched.

    Args:
        captions, images: COCO's ids of what will be ranked.

    Raises:
        ImportError, ValueError: as `judged_metrics`.
    """
    judge = _judge()
    queries = {"t2i": captions, "i2t": images}
    for name, judged in (("ECCV Caption", judge.eccv_gts), ("CxC", judge.cxc_gts)):
        for direction, relevant in judged.items():
            _check_queries(f"{name} {direction}", queries[direction], relevant)


def _judge() -> Any:
    """The package's judgements and metrics."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it advertises faster readers of its files
            from eccv_caption import Metrics
    except ImportError as error:
        raise ImportError("eccv-caption is not installed; pip install 'unimodal[eccv]'") from error
    return Metrics()


def _check_queries(name: str, queries: Collection[int], relevant: Ranked) -> None:
    if missing := [query for query in relevant if query not in queries]:
        raise ValueError(
            f"{name}: query {missing[0]} is judged and not among the {len(queries)} ranked ({len(missing)} of {len(relevant)} "
            "are missing); rank COCO's whole 5K test split, by COCO's ids"
        )


def _check(name: str, found: Ranked, relevant: Ranked, *, whole: bool) -> None:
    """Every judged query has found as many items as it has relevant ones, or one where only the first counts."""
    _check_queries(name, found, relevant)
    for query, items in relevant.items():
        needed = len(set(items)) if whole else 1
        if len(found[query]) < needed:
            raise ValueError(f"{name}: query {query} has {len(found[query])} ranked items; expected at least {needed}")
