"""A checkpoint's scoring rule is obeyed by everything that ranks, has one default, and is refused where the model cannot follow it."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_model, toy_processor
from toyqwen import toy_qwen

from unimodal import Unimodal, cli
from unimodal.config import ModelConfig, ScoringRule
from unimodal.data import Scenes, write_karpathy
from unimodal.hub import load_checkpoint, save_checkpoint
from unimodal.retrieval import rule_for
from unimodal.search import Encoder, Index
from unimodal.search.tune import Pairing, cost_curve, held_out_pairs
from unimodal.tasks import Evaluation, EvaluationSettings

COUNT = 8
RULE = ScoringRule(k=3, combine="sum", scale=0.5)
ONLY = {"matching": None, "captioning": None, "generation": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a rule of its own, and beside it pictures and pairs."""
    place = tmp_path_factory.mktemp("rule")
    rule = {"k": RULE.k, "combine": RULE.combine, "scale": RULE.scale}
    save_checkpoint(toy_model(scoring=rule, captioning=None, generation=None), toy_processor(), place / "model")
    write_karpathy({"test": Scenes("test", count=COUNT)}, place / "data")
    return place


def shell(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def searched(folder: Path, capsys: Any) -> ScoringRule:
    model = Unimodal.from_pretrained(folder / "model")
    pictures = [Scenes("test", count=COUNT).image(i) for i in range(COUNT)]
    hits = model.build_index(pictures).search("a red circle", top_k=COUNT)
    judged = [hit for hit in hits if hit["rerank_score"] is not None]
    logits = torch.logit(torch.tensor([hit["rerank_score"] for hit in judged], dtype=torch.float64)).tolist()
    for hit, logit in zip(judged, logits):
        assert hit["score"] == pytest.approx(hit["first_score"] + RULE.scale * logit, abs=1e-4)
    return ScoringRule(k=len(judged), combine="sum", scale=RULE.scale)


def photos_searched(folder: Path, capsys: Any) -> ScoringRule:
    ask = ("search", folder / "data/images", "a red circle", "--model", folder / "model", "--json")
    found = shell(capsys, *ask, "--index", folder / "index", "--out", folder / "page.html", "--overwrite")
    assert "the cosine plus 0.5 times the match logit" in found["order"]
    return ScoringRule(k=found["judged"], combine="sum", scale=RULE.scale)


def evaluated(folder: Path, capsys: Any) -> ScoringRule:
    data = ("--data", next((folder / "data").glob("*.json")), "--split", "test")
    ask = ("evaluate", "--model", folder / "model", *data, "--out", folder / "out", "--overwrite", "--json")
    protocol = shell(capsys, *ask)["reranked"]["protocol"]
    return ScoringRule(k=protocol["k"], combine=protocol["combine"], scale=protocol["match_scale"])


def validated(folder: Path, capsys: Any) -> ScoringRule:
    """As stages of a training and the end of a schedule do."""
    return Evaluation(*load_checkpoint(folder / "model"), Scenes("test", count=COUNT), EvaluationSettings()).rule


def tuned(folder: Path, capsys: Any) -> ScoringRule:
    data = ("--data", next((folder / "data").glob("*.json")), "--split", "test", "--recall", 0.1, "--queries", 2)
    found = shell(capsys, "search", "tune", "--model", folder / "model", *data, "--json")
    return ScoringRule(k=RULE.k, combine=found["combine"], scale=found["match_scale"])


def calibrated(folder: Path, capsys: Any) -> ScoringRule:
    pairing = Pairing(Encoder(*load_checkpoint(folder / "model")), Scenes("test", count=COUNT), queries=2)
    logits, _, _ = held_out_pairs(pairing)
    return ScoringRule(k=len(logits) // 2, combine=RULE.combine, scale=RULE.scale)


@pytest.mark.parametrize("verb", [searched, photos_searched, evaluated, validated, tuned, calibrated])
def test_every_verb_obeys_the_rule_of_a_checkpoint(verb: Callable[..., ScoringRule], folder: Path, capsys: Any) -> None:
    assert verb(folder, capsys) == RULE


@pytest.mark.parametrize("door", [Index.search, Unimodal.search, EvaluationSettings, cost_curve, held_out_pairs])
def test_no_door_has_a_default_of_its_own(door: Callable[..., Any]) -> None:
    names = {"rerank_top_k", "rerank_k", "k", "combine", "match_scale"}
    defaults = {name: one.default for name, one in inspect.signature(door).parameters.items() if name in names}
    assert defaults and set(defaults.values()) == {None}


def test_a_checkpoint_without_a_rule_has_the_default(tmp_path: Path) -> None:
    save_checkpoint(toy_model(), toy_processor(), tmp_path / "model")
    path = tmp_path / "model/config.json"
    content = json.loads(path.read_text())
    assert content["model"].pop("scoring") == {
        "first": "embed",
        "k": 32,
        "combine": "replace",
        "scale": 1.0,
        "directions": "both",
    }
    path.write_text(json.dumps(content | {"format": 2}))
    assert load_checkpoint(tmp_path / "model")[0].config.scoring == ScoringRule()


def test_a_checkpoint_whose_matching_head_said_how_its_score_counts_opens_with_that_rule(folder: Path) -> None:
    path = folder / "model/config.json"
    new = path.read_text()
    content = json.loads(new)
    before = load_checkpoint(folder / "model")
    del content["model"]["scoring"]
    content["model"]["matching"] |= {"combine": "sum", "scale": 0.5}
    path.write_text(json.dumps(content | {"format": 2}))
    old = load_checkpoint(folder / "model")
    path.write_text(new)
    assert old[0].config.scoring == ScoringRule(combine="sum", scale=0.5)
    assert Encoder(*old).fingerprint() == Encoder(*before).fingerprint()  # its indexes open


def test_under_pair_every_item_is_scored_by_the_matching_head() -> None:
    model = Unimodal(toy_model(scoring={"first": "pair"}), toy_processor())
    pictures = [Scenes("test", count=COUNT).image(i) for i in range(COUNT)]
    hits = model.build_index(pictures).search("a red circle", top_k=2)
    (best, _) = model.rank("a red circle", pictures, top_k=2)
    assert hits[0]["id"] == best["corpus_id"] and hits[0]["score"] == pytest.approx(best["score"], abs=1e-3)


@pytest.mark.parametrize(
    ("parts", "asked", "message"),
    [
        (
            ONLY | {"scoring": {"first": "pair"}},
            {},
            "first is 'pair', .* by the matching head, and this model has none",
        ),
        (ONLY, {"k": 5}, "5 candidates are to be scored again, but this model has no matching head .* leave the depth"),
        ({"scoring": {"directions": "text_to_image"}}, {}, "directions is 'text_to_image', but .* set .* to 'both'"),
        ({"scoring": {"first": "pair"}}, {"combine": "sum"}, "first is 'pair' and scoring.combine is 'sum'"),
    ],
)
def test_a_rule_that_the_model_cannot_follow_is_refused(parts: Any, asked: Any, message: str) -> None:
    model = toy_model(**parts)
    with pytest.raises(ValueError, match=message):
        rule_for(model.config, **asked)
    if not asked:
        with pytest.raises(ValueError, match=message):
            Evaluation(model, toy_processor(), Scenes("test", count=2), EvaluationSettings())
        index = Unimodal(model, toy_processor()).build_index(["a red circle", "a square"])
        with pytest.raises(ValueError, match=message):
            index.search("a red circle")


def test_an_index_refuses_to_score_every_pair_as_a_conversation(tmp_path: Path) -> None:
    toy_qwen(tmp_path)
    model = Unimodal.from_pretrained(tmp_path, heads=["embedding", "matching"])
    index = model.build_index(["a red circle", "a square"])
    assert len(index.search("a circle")) == 2
    model.model.config = replace(model.model.config, scoring=ScoringRule(first="pair"))
    with pytest.raises(ValueError, match="first is 'pair', .* one conversation, which no index can keep; use rank"):
        index.search("a circle")


def test_a_model_without_a_matching_head_ranks_by_its_embedding() -> None:
    assert rule_for(ModelConfig()).k == 0
