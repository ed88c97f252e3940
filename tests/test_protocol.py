"""A number never travels without its protocol: contradictions are refused, tables hold like results only, and intervals
and paired tests are exact where theory is, repeatable by seed, and aware of captions that share an image.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from unimodal.metrics import Protocol, RetrievalMetrics, bootstrap_interval, paired_test, results_table, summarise

TOY = Protocol(
    dataset="flickr8k", split="test", fingerprint="ab12", images=2, captions=10, captions_per_image=5, stage="first"
)


def result(protocol: Protocol) -> RetrievalMetrics:
    return summarise(torch.arange(1, 11), torch.tensor([1, 3]), protocol)


def test_label_says_everything_in_one_line() -> None:
    assert TOY.label() == "flickr8k test [ab12]; 2 images, 10 captions (5 per image); rule: hit; first stage"
    assert TOY.reranked(128, "sum").label().endswith("rule: hit; reranked top 128 (sum)")
    assert TOY.reranked(128, "sum", 0.02).label().endswith("reranked top 128 (sum, match x 0.02)")
    assert replace(TOY, stage=None, rule="words", decoding="3 beams").label().endswith("rule: words; 3 beams")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(captions=9), "got 2 images x 5 captions per image, which is not 9 captions"),
        (dict(images=0), "got 0 images and 10 captions"),
        (dict(stage="second"), "stage: expected one of first, reranked, got 'second'"),
        (dict(stage="reranked"), "got k=None, combine=None; a reranked result needs k >= 1"),
        (dict(stage="reranked", k=5, combine="mean"), "combine: expected one of replace, sum, got 'mean'"),
        (dict(k=5), "got k=5, combine=None at stage 'first'; only stage 'reranked' has them"),
        (dict(match_scale=0.5), "got match_scale=0.5 with combine=None; only 'sum' has a scale"),
    ],
)
def test_contradictions_are_refused(change, says) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TOY, **change)


def test_table_prints_the_shared_protocol_once() -> None:
    lines = results_table([("clip", result(TOY)), ("a|b", result(TOY))], digits=1).splitlines()
    assert lines[0] == f"Protocol: {TOY.label()}"
    assert lines[2].startswith("|  | t2i_r1 | t2i_r5 | t2i_r10 | t2i_medr |") and lines[2].endswith("| mr_six | rsum |")
    assert lines[4].startswith("| clip | 10.0 | 50.0 | 100.0 | 5.5 |")
    assert lines[5].startswith(r"| a\|b | 10.0")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(split="val"), "split: 'test' / 'val'"),
        (dict(fingerprint="cd34"), "fingerprint: 'ab12' / 'cd34'"),
        (dict(captions_per_image=None), "captions_per_image: 5 / None"),
        (dict(folds=5), "folds: 1 / 5"),
        (dict(decoding="3 beams"), "decoding: None / '3 beams'"),
        (dict(stage="reranked", k=8, combine="sum"), "stage: 'first' / 'reranked'; k: None / 8; combine: None / 'sum'"),
    ],
)
def test_table_refuses_unlike_protocols_and_names_the_difference(change, says) -> None:
    with pytest.raises(ValueError, match=f"unlike protocols do not compare: {says}"):
        results_table([("a", result(TOY)), ("b", result(replace(TOY, **change)))])


def test_table_shows_how_the_gallery_was_searched_where_that_is_the_question() -> None:
    rows = [("clip", result(TOY)), ("albef", result(TOY.reranked(128, "replace")))]
    lines = results_table(rows, any_search=True)
    heading, _, names, _, clip, albef = lines.splitlines()
    assert "first" not in heading and names.startswith("|  | stage | k | combine | match_scale | t2i_r1 |")
    assert clip.startswith("| clip | first | - | - | - |") and albef.startswith(
        "| albef | reranked | 128 | replace | - |"
    )
    with pytest.raises(ValueError, match="split: 'test' / 'val'"):
        results_table([*rows, ("other", result(replace(TOY, split="val")))], any_search=True)


def test_table_refuses_nothing_and_unlike_numbers() -> None:
    with pytest.raises(ValueError, match="got no results"):
        results_table([])
    interval = bootstrap_interval([1.0, 2.0], TOY, seed=0, samples=5)
    with pytest.raises(ValueError, match="expected the columns of the first row"):
        results_table([("a", result(TOY)), ("b", interval)])


def test_results_are_saved_as_json_with_their_protocol() -> None:
    saved = json.loads(json.dumps(bootstrap_interval([1.0, 2.0, 4.0], TOY, seed=3, samples=50).to_dict()))
    assert saved["seed"] == 3 and Protocol(**saved["protocol"]) == TOY


def test_bootstrap_interval_of_a_mean_has_the_width_of_theory() -> None:
    values = np.random.default_rng(0).normal(50, 10, size=400)
    interval = bootstrap_interval(values, TOY, seed=0, samples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1)


def test_intervals_repeat_by_seed_and_take_any_statistic() -> None:
    ranks = np.arange(1, 102)
    a, b, c = (bootstrap_interval(ranks, TOY, seed=seed, statistic=np.median, samples=200) for seed in (1, 1, 2))
    assert a == b and (a.low, a.high) != (c.low, c.high)
    assert a.low < a.value == 51 < a.high


def test_captions_of_one_image_are_drawn_together() -> None:
    """Five copies of each value tell nothing new: with groups the interval is as wide as that of the single values."""
    values = np.random.default_rng(0).normal(size=200)
    image_id = np.random.default_rng(1).permutation(10_000)[:200].repeat(5)

    def width(values: np.ndarray, groups: np.ndarray | None = None) -> float:
        interval = bootstrap_interval(values, TOY, seed=0, groups=groups, samples=2000)
        return interval.high - interval.low

    assert width(values.repeat(5), image_id) == pytest.approx(width(values), rel=0.1)
    assert width(values.repeat(5)) == pytest.approx(width(values) / np.sqrt(5), rel=0.1)


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 2, 2, 3, 4, 5, 6, 7]])
def test_paired_test_equals_all_sign_flips(groups) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=10)
    b = a + rng.normal(0.5, 1, size=10)
    sums = np.bincount(range(10) if groups is None else groups, weights=b - a)
    exact = np.mean(
        [abs(np.dot(s, sums)) >= abs(sums.sum()) - 1e-12 for s in itertools.product((1, -1), repeat=len(sums))]
    )
    test = paired_test(a, b, (TOY, TOY.reranked(8, "sum")), seed=0, groups=groups)
    assert test.difference == pytest.approx((b - a).mean()) and test.low < test.difference < test.high
    assert test.p_value == pytest.approx(exact, abs=0.015)
    assert test.protocol.stage == "reranked"


def test_paired_test_of_a_run_with_itself_finds_nothing_and_p_is_never_zero() -> None:
    a = np.arange(40.0)
    assert paired_test(a, a, (TOY, TOY), seed=0, samples=99).p_value == 1
    assert paired_test(a, a + 1, (TOY, TOY), seed=0, samples=99).p_value == pytest.approx(0.01)


def test_significance_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="split: 'test' / 'val'"):
        paired_test([1.0], [1.0], (TOY, replace(TOY, split="val")), seed=0)
    with pytest.raises(
        ValueError, match=r"got \[1\] and \[2\] values; a paired test needs both runs on the same queries"
    ):
        paired_test([1.0], [1.0, 2.0], (TOY, TOY), seed=0)
    for values in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="values: expected finite numbers .*, one for each query, at least one"):
            bootstrap_interval(values, TOY, seed=0)
    with pytest.raises(ValueError, match="confidence: expected a share between 0 and 1, got 95"):
        bootstrap_interval([1.0], TOY, seed=0, confidence=95)
    with pytest.raises(ValueError, match=r"groups: expected one whole number or text for each query \[2\], got list"):
        bootstrap_interval([1.0, 2.0], TOY, seed=0, groups=[1, 2, 3])
