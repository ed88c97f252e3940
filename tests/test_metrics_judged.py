"""COCO under ECCV Caption's and CxC's judgements: perfect, worst and half-right rankings of the package's own ids score as they must, and
an evaluation from the shell ranks by these ids.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from toy import toy_model, toy_processor

from unimodal import cli
from unimodal.cli.evaluate import read
from unimodal.data import KarpathyJson, Scenes, write_karpathy
from unimodal.hub import save_checkpoint
from unimodal.metrics import Protocol
from unimodal.metrics.judged import DEPTH, judged_metrics
from unimodal.tasks import Evaluation, EvaluationSettings

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


def test_the_depth_holds_all_that_is_relevant(judge) -> None:
    sets = (judge.eccv_gts, judge.cxc_gts)
    assert max(len(set(items)) for one in sets for relevant in one.values() for items in relevant.values()) <= DEPTH


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


# The shell.


IMAGES, EACH = 8, 5
COCO_IMAGES = [900 - 7 * i for i in range(IMAGES)]
COCO_CAPTIONS = [5000 + 3 * c for c in range(IMAGES * EACH)]
# Images 2 i and 2 i + 1 fit each other's captions; CxC knows of the labels alone.
TWINS = {COCO_IMAGES[i]: COCO_CAPTIONS[i // 2 * 10 : i // 2 * 10 + 10] for i in range(0, IMAGES, 3)}
LABELS = {COCO_IMAGES[i]: COCO_CAPTIONS[i * EACH : i * EACH + EACH] for i in range(IMAGES)}


def turned(relevant: dict[int, list[int]]) -> dict[int, list[int]]:
    return {c: [i for i in relevant if c in relevant[i]] for c in {c for some in relevant.values() for c in some}}


@pytest.fixture
def small(judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judgements of eight pictures in place of the package's."""
    import eccv_caption

    class Small(eccv_caption.Metrics):
        def __init__(self) -> None:
            super().__init__()
            self.eccv_gts = {"i2t": TWINS, "t2i": turned(TWINS)}
            self.cxc_gts = {"i2t": LABELS, "t2i": turned(LABELS)}

    monkeypatch.setattr(eccv_caption, "Metrics", Small)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, drawn pictures in COCO's form, and the same without COCO's ids."""
    folder = tmp_path_factory.mktemp("coco")
    save_checkpoint(toy_model(), toy_processor(), folder / "model")
    path = write_karpathy({"test": Scenes("test", count=IMAGES)}, folder / "data")
    data = json.loads(path.read_text())
    (folder / "data" / "plain.json").write_text(json.dumps(data))
    ids = iter(COCO_CAPTIONS)
    for image, number in zip(data["images"], COCO_IMAGES):
        image["cocoid"] = number
        image["sentences"] = [{**sentence, "sentid": next(ids)} for sentence in image["sentences"]]
    path.write_text(json.dumps(data))
    return folder


def evaluated(work: Path, data: str, *more: str) -> int:
    model, path, out = work / "model", work / "data" / data, work / "out"
    ask = ["evaluate", "--model", model, "--data", path, "--rerank_top_k", 3, "--combine", "replace", "--out", out]
    return cli.main([str(one) for one in (*ask, "--judgements", *more)])


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_is_judged_by_ids_of_coco(small, work: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert evaluated(work, "dataset.json") == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "rule: ECCV Caption judgements; reranked top 3 (replace)" in output and "rule: CxC judgements, hit" in output
    written = json.loads((work / "out" / "results.json").read_text())

    # Every pair scored here, in one dense table, and sorted by plain Python.
    evaluation = Evaluation(
        toy_model(), toy_processor(), KarpathyJson(work / "data/dataset.json", split="test"), EvaluationSettings()
    )
    read(evaluation, IMAGES)
    cosine = torch.cat(evaluation.image_embeddings) @ torch.cat(evaluation.text_embeddings).T
    rows = torch.cartesian_prod(torch.arange(IMAGES), torch.arange(IMAGES * EACH))
    assert evaluation.pairwise is not None
    match = evaluation.pairwise.match(*rows.T, image_asks=False).view_as(cosine)

    def ranked(near: list[float], fits: list[float], depth: int, ids: list[int]) -> list[int]:
        order = sorted(range(len(ids)), key=lambda row: -near[row])
        return [ids[row] for row in [*sorted(order[:depth], key=lambda row: -fits[row]), *order[depth:]]]

    for stage, depth in (("first", 0), ("reranked", 3)):
        i2t = {n: ranked(*x, depth, COCO_CAPTIONS) for n, *x in zip(COCO_IMAGES, cosine.tolist(), match.tolist())}
        t2i = {n: ranked(*x, depth, COCO_IMAGES) for n, *x in zip(COCO_CAPTIONS, cosine.T.tolist(), match.T.tolist())}
        for rule, plain in zip(("eccv_caption", "cxc"), judged_metrics(t2i, i2t, PROTOCOL)):
            ours = written[f"{rule}_{stage}"]
            assert {name: ours[name] for name in plain.scores()} == pytest.approx(plain.scores())
            assert ours["protocol"]["rule"] == plain.protocol.rule and ours["protocol"]["stage"] == stage
        assert written[f"cxc_{stage}"]["i2t_r1"] == pytest.approx(written[stage]["i2t_r1"])  # the same labels
    assert 0 < written["eccv_caption_first"]["i2t_map_r"] < 100
    assert written["eccv_caption_first"]["i2t_map_r"] != written["eccv_caption_reranked"]["i2t_map_r"]


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_data_that_cannot_be_judged_are_refused_before_they_are_read(small, work: Path, capsys) -> None:
    for data, more, message in (
        ("plain.json", (), "test-000000.png of scenes test lacks COCO's ids, a `cocoid` and a `sentid` per sentence"),
        ("dataset.json", ("--folds", "2"), "got folds=2; the judgements are of COCO's 5K test split as a whole"),
        ("dataset.json", ("--captions_per_image", "4"), "ECCV Caption t2i: query 5012 is judged and not among the 32"),
    ):
        assert evaluated(work, data, "--model", "none", *more) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["evaluate", "--data", "scenes", "--out", str(work / "out"), "--judgements"]) == 1
    assert (
        "scenes test has no COCO ids; Karpathy's file of COCO, dataset_coco.json, and COCO's own, captions_val2017.json, have them"
        in capsys.readouterr().err
    )


def test_the_shell_names_the_missing_package(work: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    assert evaluated(work, "dataset.json") == 1
    assert "pip install 'unimodal[eccv]'" in capsys.readouterr().err
