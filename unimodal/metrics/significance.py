"""Is the difference real? Bootstrap intervals and a paired test over queries.

Both work on one value per query: `100 * (ranks <= 1)` for R@1, the ranks themselves for MedR, `cider_d(...)` for
captions. Five captions of one image are not five independent queries; `groups` draws whole images, which gives wider,
truer intervals.

Bootstrap: percentile interval (Efron & Tibshirani 1993). Test: random sign flips of paired differences (Fisher 1935).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .protocol import Protocol, Result, require_alike


@dataclass(frozen=True, kw_only=True)
class Interval(Result):
    """A statistic and its percentile interval; in the unit of the values."""

    value: float
    low: float
    high: float
    confidence: float
    samples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class PairedTest(Result):
    """Mean of b - a over the same queries, its interval, and how often chance alone gives a difference as large."""

    difference: float
    low: float
    high: float
    confidence: float
    p_value: float
    samples: int
    seed: int


def bootstrap_interval(
    values: ArrayLike,
    protocol: Protocol,
    *,
    seed: int,
    statistic: Callable[[np.ndarray], float] = np.mean,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    samples: int = 1000,
) -> Interval:
    """Interval of a statistic over queries, by drawing queries with replacement.

    Args:
        values: [Q], one number per query.
        statistic: of the drawn values; np.median of the ranks gives MedR.
        groups: [Q], equal for queries that are drawn together (their image ids); None draws single queries.

    Raises:
        ValueError: for empty, unlike or non-finite values, or a confidence outside (0, 1).
    """
    values, group = _check(values, groups, confidence, samples)
    draws = _bootstrap(values, group, statistic, samples, np.random.default_rng(seed))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(
        protocol=protocol,
        value=float(statistic(values)),
        low=float(low),
        high=float(high),
        confidence=confidence,
        samples=samples,
        seed=seed,
    )


def paired_test(
    a: ArrayLike,
    b: ArrayLike,
    protocols: tuple[Protocol, Protocol],
    *,
    seed: int,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
) -> PairedTest:
    """Compares two runs on the same queries in the same order: mean difference b - a, two-sided p-value, interval.

    If the runs were equally good, either could have produced either value of a query, so the sign of each difference
    (of each group's, with `groups`) is flipped at random. p counts the observed arrangement too and is never zero
    (Phipson & Smyth 2010).

    Args:
        a, b: [Q], one number per query and run.
        protocols: of the two runs; only how the gallery was searched may differ.

    Raises:
        ValueError: as `bootstrap_interval`, for runs of different lengths, or for unlike protocols.
    """
    require_alike(protocols, any_search=True)
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"got {list(a.shape)} and {list(b.shape)} values; a paired test needs both runs on the same queries"
        )
    difference, group = _check(b - a, groups, confidence, samples)
    rng = np.random.default_rng(seed)
    sums = np.bincount(group, weights=difference)  # [groups]
    flipped = np.array([sums @ (2 * rng.integers(2, size=len(sums), dtype=np.int8) - 1.0) for _ in range(samples)])
    as_large = np.abs(flipped) >= abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # sums in another order round differently
    low, high = np.quantile(
        _bootstrap(difference, group, np.mean, samples, rng), [(1 - confidence) / 2, (1 + confidence) / 2]
    )
    return PairedTest(
        protocol=protocols[1],
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        confidence=confidence,
        p_value=float((1 + as_large.sum()) / (1 + samples)),
        samples=samples,
        seed=seed,
    )


def _bootstrap(
    values: np.ndarray,
    group: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    samples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    count = group.max() + 1
    draws = np.empty(samples)
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    for i in range(samples):
        times = np.bincount(rng.integers(count, size=count), minlength=count)  # how often each group is drawn
        # a mean needs the sums of its groups alone, which spares 25,000 captions the copying
        draws[i] = (
            times @ sums / (times @ sizes) if statistic is np.mean else statistic(np.repeat(values, times[group]))
        )
    return draws


def _check(
    values: ArrayLike, groups: ArrayLike | None, confidence: float, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"got values of shape {list(values.shape)}; expected [Q] finite numbers, one per query, at least one"
        )
    if not 0 < confidence < 1 or samples < 1:
        raise ValueError(
            f"got confidence={confidence}, samples={samples}; expected 0 < confidence < 1 and samples >= 1"
        )
    group = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if group.shape != values.shape:
        raise ValueError(
            f"got {list(group.shape)} groups for {list(values.shape)} values; expected one group per query"
        )
    return values, group
