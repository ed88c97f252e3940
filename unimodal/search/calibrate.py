"""Match probabilities that mean what they say: a scale and an offset for the logits, fitted on held-out pairs.

A matching head learns from negatives drawn for training, so its sigmoid is a rank, not a probability, among the candidates of a search.
Platt scaling (Platt 1999; with the offset 0 the temperature of Guo et al. 2017, arXiv:1706.04599) maps logit z to sigmoid(a z + b) with the
a, b of the greatest likelihood on pairs that look like those of a search: true pairs and the wrong ones of the first stage's top k.

The threshold of a precision is counted, not derived from the sigmoid, which need not fit where few pairs are: it is the lowest probability
at or above which at least this share of the pairs is right, by the lower end of Wilson's interval (1927), so that a few lucky pairs promise
nothing. It holds for pairs of the same kind: fit again where the data or the first stage's depth
differ. Whether it holds is measured, not believed: `held_out_check` fits on one half of the images and counts on the other.

Legend: P pairs.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from unimodal import arguments
from unimodal.files import require_readable, write_json

STEPS = 100
NEAR = 1e-10  # a Newton step below it ends the fit
CONFIDENT = 1.645  # standard errors: 95 %, on one side


@dataclass(frozen=True)
class Calibration:
    """A fitted calibration, as plain numbers.

    Attributes:
        scale, offset: a and b of sigmoid(a z + b).
        pairs, positives: what it was fitted on.
        error_before, error_after: expected calibration error of the sigmoid and of the calibrated probability on these pairs.
        curve: (probability, share of right pairs at or above it, with 95 % confidence) at up to 200 thresholds, both rising.
        model: fingerprint of the model whose logits they were.
    """

    scale: float
    offset: float
    pairs: int
    positives: int
    error_before: float
    error_after: float
    curve: tuple[tuple[float, float], ...]
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("scale", "offset", "error_before", "error_after"):
            arguments.number(getattr(self, name), name)
        for name in ("pairs", "positives"):
            arguments.integer(getattr(self, name), name, least=0)
        arguments.text(self.model, "model", empty=True)
        curve = arguments.listed(self.curve, "curve", "pairs (probability, share)")
        for i, point in enumerate(curve):
            for value in arguments.listed(point, f"curve[{i}]", "a probability and a share"):
                arguments.number(value, f"curve[{i}]", least=0, most=1)
        if not curve or any(len(point) != 2 for point in curve):
            raise ValueError(arguments.refused("curve", "at least one pair (probability, share)", self.curve))

    def probability(self, logits: Tensor) -> Tensor:
        """Calibrated match probabilities of logits [P], float32."""
        found = arguments.tensor(logits, "logits", "numbers [P]").double()
        if found.ndim != 1 or not bool(found.isfinite().all()):
            raise ValueError(arguments.refused("logits", "finite numbers [P]", logits))
        return (self.scale * found + self.offset).sigmoid().float()

    def threshold_for(self, precision: float) -> float:
        """The lowest probability such that of the pairs at or above it at least this share is right, with 95 % confidence.

        Raises:
            ValueError: a precision outside (0, 1), or one that these pairs do not reach.
        """
        precision = arguments.number(precision, "precision", above=0)
        if precision >= 1:
            raise ValueError(f"precision: expected a share between 0 and 1, got {precision}")
        for probability, share in self.curve:
            if share >= precision:
                return probability
        raise ValueError(
            f"no threshold reaches the precision {precision} for certain, {self.curve[-1][1]:.4f} at most; ask for less, or "
            "calibrate on more pairs"
        )

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Raises:
        ValueError: the file is no calibration, or one whose numbers are none.
        OSError: it cannot be read.
        """
        path = arguments.path(path, "path")
        require_readable(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "curve": tuple((float(p), float(share)) for p, share in values["curve"])})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is no calibration ({error}); write it with Calibration.save, or remove it and its entry in config.json"
            ) from error


def calibrate(logits: Tensor, labels: Tensor, *, model: str = "") -> Calibration:
    """Fit scale and offset by Newton's method in float64.

    Args:
        logits: [P] match logits of held-out pairs.
        labels: [P] bool, which of them are true.
        model: fingerprint of the model, kept with the result.

    Raises:
        ValueError: unlike shapes, logits that are not finite, or pairs of one kind alone; or logits that rank true pairs below wrong ones.
    """
    arguments.text(model, "model", empty=True)
    logits, labels = _pairs(logits, labels)
    z, y = logits.double(), labels.double()
    positives = int(y.sum())
    if not 0 < positives < len(y):
        raise ValueError(f"calibration needs both true and wrong pairs, got {positives} true ones of {len(y)}")
    a, b = _newton(z, y)
    if a <= 0:
        raise ValueError(
            f"the logits rank true pairs below wrong ones (fitted scale {a:.3g}); train the matching head first"
        )
    p = (a * z + b).sigmoid().float()  # as `probability` gives it, so that thresholds meet equal numbers
    return Calibration(
        a,
        b,
        len(y),
        positives,
        expected_calibration_error(z.sigmoid(), labels),
        expected_calibration_error(p, labels),
        _curve(p, labels),
        model,
    )


@dataclass(frozen=True)
class HeldOut:
    """What calibrated probabilities are worth on pairs of images that the fit did not see.

    Attributes:
        error: expected calibration error over all pairs.
        passed: for each precision asked for, (pairs at or above its threshold, how many of them are right); (0, 0) where it was
            not reached.
    """

    error: float
    passed: dict[float, tuple[int, int]]


def held_out_check(
    logits: Tensor, labels: Tensor, image_id: Tensor, precisions: Sequence[float], *, seed: int = 0
) -> HeldOut:
    """Fit on the pairs of one half of the images, count on those of the other, then the other way round; both counts are added.

    Args:
        logits: [P] match logits.
        labels: [P] bool, which pairs are true.
        image_id: [P] image that the query of each pair belongs to: all its captions are of one half.
        precisions: thresholds are taken from the half that was fitted, for each of these.
        seed: of the halves.

    Raises:
        ValueError: a half that cannot be fitted, see `calibrate`.
    """
    seed = arguments.integer(seed, "seed", least=0)
    logits, labels = _pairs(logits, labels)
    precisions = [
        arguments.number(one, f"precisions[{i}]", above=0, most=1)
        for i, one in enumerate(arguments.listed(precisions, "precisions", "shares"))
    ]
    image_id = arguments.integers(image_id, "image_id", len(labels)).cpu()
    ids, place = image_id.unique(return_inverse=True)
    half = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[place] % 2 == 0  # [P]
    probability = torch.empty(len(labels))
    passed = dict.fromkeys(precisions, (0, 0))
    for seen in (half, ~half):
        found = calibrate(logits[seen], labels[seen])
        probability[~seen] = found.probability(logits[~seen])
        for precision in precisions:
            if precision > found.curve[-1][1]:
                continue
            right = labels[~seen][probability[~seen] >= found.threshold_for(precision)]
            before = passed[precision]
            passed[precision] = before[0] + len(right), before[1] + int(right.sum())
    return HeldOut(expected_calibration_error(probability, labels), passed)


def expected_calibration_error(probability: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and share of true pairs over bins of equal width, weighted by their pairs (Naeini et al., AAAI 2015)."""
    place = (probability * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, probability.double() - labels.double())
    return float(gap.abs().sum() / len(labels))


def _pairs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Finite logits [P] and bool labels [P]."""
    found = arguments.tensor(labels, "labels", "True and False [P]")
    if found.dtype != torch.bool:
        raise TypeError(arguments.refused("labels", "True and False [P]", labels))
    scores = arguments.vectors(logits, "logits", dimensions=(1,))
    if scores.shape != found.shape:
        raise ValueError(f"expected logits and labels [P], got {list(scores.shape)} and {list(found.shape)}")
    return scores.cpu(), found.cpu()


def _newton(z: Tensor, y: Tensor) -> tuple[float, float]:
    """The a, b that minimise the log loss of sigmoid(a z + b).

    Labels are pulled in as by one more pair of either kind (Platt 1999), without which separable pairs have no finite answer.
    """
    true, wrong = float(y.sum()), float(len(y) - y.sum())
    target = torch.where(y > 0, (true + 1) / (true + 2), 1 / (wrong + 2))
    spread = float(z.std()) or 1.0
    x = torch.stack(
        [(z - z.mean()) / spread, torch.ones_like(z)], 1
    )  # [P, 2], standardised: the Hessian stays well conditioned
    w = torch.tensor([0.0, math.log(true / wrong)], dtype=torch.float64)

    def loss(at: Tensor) -> float:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(x @ at, target))

    for _ in range(STEPS):
        p = (x @ w).sigmoid()
        gradient = x.T @ (p - target) / len(y)
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(y) + 1e-12 * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) + 1e-12 and size > 1e-6:
            size /= 2
        w = w - size * step
        if step.abs().max() < NEAR:
            break
    a = float(w[0]) / spread
    return a, float(w[1]) - a * float(z.mean())


def _curve(probability: Tensor, labels: Tensor, points: int = 200) -> tuple[tuple[float, float], ...]:
    """(threshold, best lower bound of the share of right pairs at or above a threshold up to this one), both rising, the shares evenly."""
    ordered, order = probability.sort()
    right = labels[order].double().flip(0).cumsum(0).flip(0)  # [P], at or above each pair
    count = torch.arange(len(ordered), 0, -1)
    share = right / count
    spread = (share * (1 - share) / count + (CONFIDENT / count) ** 2 / 4).sqrt()
    low = (share + CONFIDENT**2 / count / 2 - CONFIDENT * spread) / (1 + CONFIDENT**2 / count)
    first = torch.cat([torch.tensor([True]), ordered.diff() > 0])  # equal pairs pass together
    ordered, best = ordered[first], low[first].cummax(0).values
    steps = torch.linspace(float(best[0]), float(best[-1]), points, dtype=torch.float64)
    places = torch.searchsorted(best, steps).clamp(max=len(best) - 1).unique()
    return tuple(zip(ordered[places].tolist(), best[places].tolist()))
