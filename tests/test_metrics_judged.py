"""COCO under ECCV Caption's and CxC's judgements: perfect, worst and half-right rankings of the package's own ids score as they must."""

import sys

import pytest

from unimodal.metrics import Protocol
from unimodal.metrics.judged import judged_metrics

PROTOCOL = Protocol(dataset="coco", split="test", fingerprint="0" * 16, images=5000, captions=25000)
WRONG = list(range(-100, 0))  # no id of COCO


@pytest.fixture(scope="module")
def judge():
    package = pytest.importorskip("eccv_caption", reason="the extra `eccv` is not installed")
    return package.Metrics()


def perfect(judge, way: str) -> dict[int, list[int]]:
    """What people judged relevant, ECCV's first: some of it only CxC holds relevant, so it stands second."""
    every = {**judge.cxc_gts[way], **judge.eccv_gts[way]}
    return {query: [*items, *WRONG] for query, items in every.items()}


@pytest.mark.filterwarnings("ignore")
def test_numbers_are_those_of_the_judgements(judge) -> None:
    best = {way: perfect(judge, way) for way in ("t2i", "i2t")}
    eccv, cxc = judged_metrics(best["t2i"], best["i2t"], PROTOCOL)
    assert eccv.scores() == pytest.approx(
        {f"{way}_{name}": 100 for way in ("t2i", "i2t") for name in ("map_r", "r_precision", "r1")}
    )
    for way in best:
        plain = [best[way][query][0] in items for query, items in judge.cxc_gts[way].items()]
        assert cxc.scores()[f"{way}_r1"] == pytest.approx(100 * sum(plain) / len(plain))
    assert eccv.protocol.rule == "ECCV Caption judgements" and cxc.protocol.rule == "CxC judgements, hit"

    # A wrong item in front moves the others back by one place: of R items R - 1 are found, at precisions 1/2, 2/3, ...
    behind = {way: {query: [-1, *items] for query, items in found.items()} for way, found in best.items()}
    scores = judged_metrics(behind["t2i"], behind["i2t"], PROTOCOL)[0].scores()
    for way in best:
        sizes = [len(set(items)) for items in judge.eccv_gts[way].values()]
        assert scores[f"{way}_r1"] == 0
        assert scores[f"{way}_r_precision"] == pytest.approx(100 * sum((r - 1) / r for r in sizes) / len(sizes))
        average = sum(sum((place - 1) / place for place in range(2, r + 1)) / r for r in sizes) / len(sizes)
        assert scores[f"{way}_map_r"] == pytest.approx(100 * average)


@pytest.mark.filterwarnings("ignore")
def test_rankings_that_cannot_be_judged_are_refused(judge) -> None:
    t2i, i2t = perfect(judge, "t2i"), perfect(judge, "i2t")
    query = next(iter(judge.eccv_gts["t2i"]))
    with pytest.raises(ValueError, match=f"query {query} has 1 ranked items; expected at least"):
        judged_metrics({**t2i, query: t2i[query][:1]}, i2t, PROTOCOL)
    with pytest.raises(ValueError, match=f"query {query} is judged and not among the"):
        judged_metrics({q: items for q, items in t2i.items() if q != query}, i2t, PROTOCOL)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(ImportError, match=r"pip install 'unimodal\[eccv\]'"):
        judged_metrics({}, {}, PROTOCOL)
