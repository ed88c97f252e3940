"""Evaluation from the shell: files, folds, intervals and errors agree with one another and with a plain count; runs compare only where
their protocols are alike.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import toy_model, toy_processor

from unimodal import cli
from unimodal.cli.evaluate import read
from unimodal.data import Scenes, write_karpathy
from unimodal.hub import save_checkpoint
from unimodal.metrics import Protocol, Ranks, compare, first_stage, load_ranks, save_ranks, summarise
from unimodal.tasks import Evaluation, EvaluationSettings
from unimodal.tasks.errors import retrieval_errors

IMAGES, EACH = 12, 5
PROTOCOL = Protocol(dataset="toy", split="test", fingerprint="0" * 16, images=40, captions=200, captions_per_image=EACH)


def ranks(seed: int, protocol: Protocol = PROTOCOL) -> Ranks:
    generator = torch.Generator().manual_seed(seed)
    t2i, i2t = (torch.randint(1, 30, (n,), generator=generator) for n in (200, 40))
    return Ranks(protocol, t2i, i2t, torch.arange(40).repeat_interleave(EACH))


def evaluated(**settings) -> tuple[Evaluation, dict]:
    pairs = Scenes("test", count=IMAGES)
    evaluation = Evaluation(toy_model(), toy_processor(), pairs, EvaluationSettings(rerank_k=4, **settings))
    read(evaluation, 5)
    return evaluation, evaluation.retrieval()


# Ranks of a run, and two runs.


def test_ranks_survive_their_file(tmp_path: Path) -> None:
    stages = {"first": ranks(0), "reranked": ranks(1, PROTOCOL.reranked(4, "sum", 0.02))}
    save_ranks(tmp_path / "ranks", stages)
    for stage, back in load_ranks(tmp_path / "ranks").items():
        assert back.protocol == stages[stage].protocol
        for name in ("text_to_image", "image_to_text", "text_image"):
            assert torch.equal(getattr(back, name), getattr(stages[stage], name))
    with pytest.raises(FileNotFoundError, match="give the ranks.safetensors that `unimodal evaluate"):
        load_ranks(tmp_path / "none")
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(ValueError, match="bad holds no ranks that can be read"):
        load_ranks(tmp_path / "bad")


def test_means_of_the_values_are_the_metrics() -> None:
    run = ranks(0)
    scores = summarise(run.text_to_image, run.image_to_text, PROTOCOL).scores()
    for name, (values, groups) in run.values().items():
        assert values.mean() == pytest.approx(scores[name]), name
        assert len(values) == len(groups) and set(groups) == set(range(40))


def test_captions_of_one_image_are_drawn_together() -> None:
    """Five captions of one rank each say no more than one of them."""
    rank = torch.randint(1, 3, (40,)).repeat_interleave(EACH)
    run = replace(ranks(0), text_to_image=rank)
    grouped = run.intervals(samples=2000)["t2i_r1"]
    hits = 100.0 * (rank[::EACH] == 1).double().numpy()
    draws = np.random.default_rng(1).choice(hits, (2000, 40)).mean(axis=1)
    assert grouped.high - grouped.low == pytest.approx(np.quantile(draws, 0.975) - np.quantile(draws, 0.025), rel=0.15)


def test_two_runs_compare_where_protocols_are_alike() -> None:
    a, b = ranks(0), ranks(1, PROTOCOL.reranked(4, "sum"))
    tests = compare(a, b, samples=200)
    assert tests["t2i_r5"].difference == pytest.approx(
        100 * ((b.text_to_image <= 5).double().mean() - (a.text_to_image <= 5).double().mean()).item()
    )
    assert compare(a, a, samples=50)["rsum"].p_value == 1
    with pytest.raises(ValueError, match="unlike protocols do not compare: fingerprint"):
        compare(a, ranks(1, replace(PROTOCOL, fingerprint="1" * 16)))


# Evaluation.


def test_folds_are_searched_alone_and_averaged() -> None:
    evaluation, results = evaluated(folds=3)
    image, text = torch.cat(evaluation.image_embeddings), torch.cat(evaluation.text_embeddings)
    owner = torch.arange(IMAGES).repeat_interleave(EACH)
    recalls = []
    for fold in range(3):
        rows, captions = slice(4 * fold, 4 * fold + 4), slice(20 * fold, 20 * fold + 20)
        t2i, _ = first_stage(image[rows], text[captions], owner[captions] - 4 * fold)
        recalls.append(100 * (t2i.rank == 1).double().mean().item())
        assert torch.equal(results["ranks"]["first"].text_to_image[captions], t2i.rank)
        assert set(results["candidates"]["t2i"].index[captions].flatten().tolist()) <= set(
            range(4 * fold, 4 * fold + 4)
        )
    found = results["retrieval_first"]
    assert found.text_to_image.r1 == pytest.approx(np.mean(recalls))
    assert (found.protocol.folds, found.protocol.images, found.protocol.captions) == (3, 4, 20)
    with pytest.raises(ValueError, match="got folds=5 for 12 images"):
        evaluated(folds=5)


def test_text_to_text_has_a_protocol_of_its_own() -> None:
    _, results = evaluated(text_to_text=True)
    found = results["text_to_text"]
    assert "t2t_r1" in found.scores() and found.protocol.rule == "hit among the captions, the query left out"


@pytest.mark.parametrize("combine", ["sum", "replace"])
def test_every_failed_query_has_its_row(combine: str) -> None:
    evaluation, results = evaluated(combine=combine, match_scale=0.5)
    text = torch.cat(evaluation.text_embeddings)
    rows = list(retrieval_errors(evaluation.pairs, results, text, shown=3))
    last = results["ranks"]["reranked"]
    assert len(rows) == int((last.text_to_image > 1).sum() + (last.image_to_text > 1).sum())
    assert results["retrieval_reranked"].protocol.match_scale == (0.5 if combine == "sum" else None)
    for row in rows:
        order = [0.5 * x["match"] + x["score"] if combine == "sum" else x["match"] for x in row["found"]]
        assert order == sorted(order, reverse=True) and len(order) == 3
        assert row["rank_reranked"] > 1 and not row["found"][0]["right"]
        assert row["likely_false_negative"] == row["found"][0]["likely_right"]
        assert all(("caption" in find) == (row["direction"] == "image_to_text") for find in row["found"])


def test_a_find_is_likely_right_if_the_texts_cannot_tell() -> None:
    """Image 1 has the very captions of image 0, image 2 quite others."""
    evaluation, results = evaluated()
    text = torch.nn.functional.one_hot(torch.arange(IMAGES).repeat_interleave(EACH), IMAGES).float()
    text[5:10] = text[:5]
    rows = list(retrieval_errors(evaluation.pairs, results, text, shown=4))
    keys = [evaluation.pairs.key(i) for i in range(IMAGES)]
    marks = {
        (keys.index(row["image"]), keys.index(find["image"])): find["likely_right"]
        for row in rows
        for find in row["found"]
    }
    twins = {(0, 1), (1, 0)}
    assert twins & set(marks)
    assert all(marked == (a == b or (a, b) in twins) for (a, b), marked in marks.items())


# The shell.


def shell(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_evaluate_writes_and_compare_reads(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    save_checkpoint(toy_model(scoring={"combine": "sum", "scale": 0.5}), toy_processor(), tmp_path / "model")
    data = write_karpathy({"test": Scenes("test", count=IMAGES)}, tmp_path / "data")
    ask = ("evaluate", "--model", tmp_path / "model", "--data", data, "--rerank_top_k", 4, "--captions_per_image", 3)
    status, output, error = shell(
        capsys, *ask, "--out", tmp_path / "a", "--text_to_text", "--every_relevant", "--folds", 2
    )
    assert status == 0, error
    assert (
        "mean of 2 folds; reranked top 4 (sum, match x 0.5)" in output and "t2t_r1" in output and "i2t_map_10" in output
    )
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["first"]["protocol"]["captions"] == 18 and results["reranked"]["protocol"]["folds"] == 2
    low, high = results["intervals"]["reranked"]["rsum"]
    assert low <= results["reranked"]["rsum"] <= high
    rows = [json.loads(line) for line in (tmp_path / "a" / "errors.jsonl").read_text().splitlines()]
    assert len(rows) == sum(count["failed"] for count in results["errors"].values())
    page = (tmp_path / "a" / "errors.html").read_text()
    assert page.count('class="search"') == sum(min(5, count["failed"]) for count in results["errors"].values())
    assert "mean of 2 folds" in page and "the best labelled answer: place" in page

    assert shell(capsys, *ask, "--out", tmp_path / "b", "--folds", 2, "--combine", "replace")[0] == 0
    status, output, error = shell(capsys, "compare", tmp_path / "a", tmp_path / "b", "--samples", 50)
    assert status == 0 and "B - A" in output and "rsum" in output, error
    assert shell(capsys, *ask, "--out", tmp_path / "c")[0] == 0
    status, _, error = shell(capsys, "compare", tmp_path / "a", tmp_path / "c")
    assert status == 1 and "unlike protocols do not compare: images: 6 / 12" in error
    status, _, error = shell(capsys, "evaluate", "--model", "x", "--data", "x.csv", "--out", tmp_path / "d")
    assert status == 1 and "there is nothing at 'x.csv'" in error


def test_labels_decide_what_is_relevant_where_there_are_some(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    save_checkpoint(toy_model(), toy_processor(), tmp_path / "model")
    scenes = Scenes("test", count=6)
    rows = ["image,caption,labels"]
    for i in range(6):
        scenes.image(i).save(tmp_path / f"{i}.png")
        rows.append(f'{i}.png,"{scenes.captions(i)[0]}",{"dark" if i < 4 else "light"}')
    (tmp_path / "data.csv").write_text("\n".join(rows))
    ask = (
        "evaluate",
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "data.csv",
        "--split",
        "all",
        "--labels",
        "labels",
        "--every_relevant",
    )
    status, _, error = shell(capsys, *ask, "--rerank_top_k", 0, "--out", tmp_path / "out")
    assert status == 0, error
    result = json.loads((tmp_path / "out" / "results.json").read_text())["every_relevant_t2i"]
    assert result["protocol"]["rule"] == "every item that shares a label"
    assert result["t2i_recall_5"] >= 100 * 3 / 4  # five of six pictures leave out one of four at most
