"""The checkpoint that ships: whole, small, computing what it did when it was saved, its card quoting what was measured, and, where
Flickr8k is at hand (`FLICKR8K` names its JSON file in Karpathy's format), measured again on a small part."""

import json
import os
from pathlib import Path

import pytest
import yaml

from unimodal.cli.evaluate import read
from unimodal.data import KarpathyJson
from unimodal.hub import load_checkpoint, verify_checkpoint
from unimodal.survey.data import First
from unimodal.tasks import Evaluation, EvaluationSettings

REPO = Path(__file__).parent.parent
FOLDER, EXPECTED = REPO / "checkpoints/unimodal-small", json.loads((REPO / "tasks/small/expected.json").read_text())
DATA = Path(os.environ.get("FLICKR8K", REPO / "data/flickr8k/dataset_flickr8k.json"))
# What the card calls a table: where expected.json has the same numbers, and the headline numbers (a hundredth of them) among these.
TABLES = {
    "first stage": ("retrieval_first", {"t2i_r1_first": "t2i_r1", "i2t_r1_first": "i2t_r1"}),
    "reranked": ("retrieval_reranked", {"t2i_r1_reranked": "t2i_r1", "i2t_r1_reranked": "i2t_r1"}),
    "captions": ("captions", {"cider_d": "cider_d", "bleu_4": "bleu_4"}),
}


def test_it_is_small_and_names_no_place_of_the_machine_that_made_it() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64e6
    sources = json.loads((FOLDER / "config.json").read_text())["backbone"]["sources"]
    assert set(sources) == {"vision", "beside", "text"}
    assert not any(source["source"].startswith("/") for source in sources.values())


def test_it_computes_what_it_did_when_it_was_saved() -> None:
    assert max(verify_checkpoint(FOLDER, tolerance=1e-4).values()) <= 1e-4


@pytest.mark.parametrize("table", TABLES)
def test_the_card_quotes_what_was_measured(table: str) -> None:
    _, head, body = (FOLDER / "README.md").read_text().split("---\n", 2)
    section, headlines = TABLES[table]
    measured = EXPECTED["more"][section]
    rows = [row for result in yaml.safe_load(head)["model-index"][0]["results"] for row in result["metrics"]]
    quoted = {row["type"]: row["value"] for row in rows if row["name"].startswith(f"{table}: ")}
    assert quoted == pytest.approx(measured, abs=1e-6)
    assert all(f"{value:.4g}" in body for value in measured.values())
    (protocol,) = [line for line in body.splitlines() if line.startswith(f"**{table}**. Protocol: ")]
    for headline, metric in headlines.items():
        assert EXPECTED["metrics"][headline] == pytest.approx(measured[metric] / 100), headline
        assert protocol.split(". Protocol: ")[1] in EXPECTED["protocol"][headline], headline


def test_every_number_that_is_expected_is_compared() -> None:
    compared = [headline for _, headlines in TABLES.values() for headline in headlines]
    assert EXPECTED["metrics"].keys() == EXPECTED["protocol"].keys() == set(compared)


@pytest.mark.skipif(not DATA.exists(), reason="needs Flickr8k: FLICKR8K=path/dataset_flickr8k.json")
def test_a_small_part_is_measured_again() -> None:
    part = EXPECTED["part"]
    model, processor = load_checkpoint(FOLDER)
    pairs = First(KarpathyJson(DATA, split="val"), part["images"])
    settings = EvaluationSettings(rerank_k=32, combine="sum", match_scale=part["match_scale"], captions=0)
    evaluation = Evaluation(model, processor, pairs, settings)
    read(evaluation, batch_size=20)
    found = evaluation.numbers(evaluation.results())
    assert found.keys() >= part["metrics"].keys()
    for name, value in part["metrics"].items():
        # one query of a hundred, for another machine's arithmetic
        assert found[name] == pytest.approx(value, abs=0.011), name
