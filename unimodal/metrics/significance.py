"""Is the difference real? Bootstrap intervals and a paired test over queries.

Both work on one value per query: `100 * (ranks <= 1)` for R@1, the ranks themselves for MedR, `cider_d(...)` for
captions. Five captions of one image are not five independent queries; `groups` draws whole images, which gives wider,
truer intervals.

Bootstrap: percentile interval (Efron & Tibshirani 1993). Test: random sign flips of paired differences (Fisher 1935).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from unimodal import arguments

from .protocol import Protocol, Result, check_protocol, require_alike

MOST_SAMPLES = 10_000_000  # an hour's work
LARGEST = np.finfo(np.float64).max / 4  # room for a difference of two sums


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
    check_protocol(protocol)
    arguments.function(statistic, "statistic")
    seed, confidence, samples = _settings(seed, confidence, samples)
    values, group = _check(_numbers(values, "values"), groups)
    draws = _bootstrap(values, group, statistic, samples, np.random.default_rng(seed))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(
        protocol=protocol,
        value=_statistic(statistic, values),
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
    protocols = tuple(arguments.listed(protocols, "protocols", "two Protocols"))
    if len(protocols) != 2:
        raise ValueError(f"protocols: expected two, one for each run, got {len(protocols)}")
    require_alike(protocols, any_search=True)
    seed, confidence, samples = _settings(seed, confidence, samples)
    a, b = _numbers(a, "a"), _numbers(b, "b")
    if a.shape != b.shape:
        raise ValueError(
            f"got {list(a.shape)} and {list(b.shape)} values; a paired test needs both runs on the same queries"
        )
    difference, group = _check(b - a, groups)
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
            times @ sums / (times @ sizes)
            if statistic is np.mean
            else _statistic(statistic, np.repeat(values, times[group]))
        )
    return draws


def _statistic(statistic: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    try:
        value = float(statistic(values))
    except Exception as error:
        raise ValueError(
            f"statistic: expected a function that makes one number of values [Q]; it raised {type(error).__name__}: {error}"
        ) from error
    if not math.isfinite(value):
        raise ValueError(f"statistic: expected a function that makes a finite number of values [Q]; it made {value}")
    return value


def _settings(seed: Any, confidence: Any, samples: Any) -> tuple[int, float, int]:
    confidence = arguments.number(confidence, "confidence", above=0)
    if confidence >= 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    return (
        arguments.integer(seed, "seed", least=0),
        confidence,
        arguments.integer(samples, "samples", most=MOST_SAMPLES),
    )


def _numbers(values: Any, name: str) -> np.ndarray:
    """[Q] finite numbers, float64."""
    expected = "finite numbers [Q], one for each query, at least one"
    found = arguments.tensor(values, name, expected).cpu()
    array = (found.double() if found.dtype == torch.bfloat16 else found).numpy().astype(np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(arguments.refused(name, expected, values))
    if np.abs(array).max() > LARGEST / array.size:
        raise ValueError(f"{name}: the sum of the values is beyond float64; divide all of them by one number")
    return array


def _check(values: np.ndarray, groups: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Values and the number of each one's group, both [Q]."""
    if groups is None:
        return values, np.arange(len(values))
    names: list[Any] = arguments.listed(groups, "groups", "names, one for each query")
    if isinstance(groups, Tensor | np.ndarray) and groups.ndim == 1:
        names = [name.item() if hasattr(name, "item") else name for name in names]
    alike = any(all(isinstance(name, kind) for name in names) for kind in (Integral, str))
    if len(names) != len(values) or not alike:
        raise ValueError(
            arguments.refused("groups", f"one whole number or text for each query [{len(values)}]", groups)
        )
    return values, np.unique(np.asarray(names), return_inverse=True)[1]
