"""The checkpoint that ships: whole, small, computing what it did when it was saved, its card quoting what was measured, and, where
Flickr8k is at hand (`FLICKR8K` names its JSON file in Karpathy's format), measured again on a small part."""

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from unimodal.data import KarpathyJson
from unimodal.hub import load_checkpoint, verify_checkpoint
from unimodal.tasks import Evaluation, EvaluationSettings

REPO = Path(__file__).parent.parent
FOLDER, EXPECTED = REPO / "checkpoints/unimodal-small", json.loads((REPO / "tasks/small/expected.json").read_text())
DATA = Path(os.environ.get("FLICKR8K", REPO / "data/flickr8k/dataset_flickr8k.json"))


def test_it_is_small_and_names_no_place_of_the_machine_that_made_it() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64e6
    sources = json.loads((FOLDER / "config.json").read_text())["backbone"]["sources"]
    assert set(sources) == {"vision", "beside", "text"}
    assert not any(source["source"].startswith("/") for source in sources.values())


def test_it_computes_what_it_did_when_it_was_saved() -> None:
    assert max(verify_checkpoint(FOLDER, tolerance=1e-4).values()) <= 1e-4


def test_the_card_quotes_what_was_measured() -> None:
    _, head, body = (FOLDER / "README.md").read_text().split("---\n", 2)
    quoted = {
        (row["name"].split(":")[0], row["type"]): row["value"]
        for result in yaml.safe_load(head)["model-index"][0]["results"]
        for row in result["metrics"]
    }
    more = EXPECTED["more"]
    for section, name in (
        ("retrieval_first", "first stage"),
        ("retrieval_reranked", "reranked"),
        ("captions", "captions"),
    ):
        for metric, value in more[section].items():
            assert quoted[name, metric] == pytest.approx(value, abs=1e-6), (name, metric)
            assert f"{value:.4g}" in body
    for protocol in EXPECTED["protocol"].values():
        assert protocol.split("; ", 1)[0] and "flickr8k val" in protocol


class Part:
    """The first pictures of a split."""

    def __init__(self, pairs: Any, count: int) -> None:
        self.pairs, self.count = pairs, count

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pairs, name)


@pytest.mark.skipif(not DATA.exists(), reason="needs Flickr8k: FLICKR8K=path/dataset_flickr8k.json")
def test_a_small_part_is_measured_again() -> None:
    part = EXPECTED["part"]
    model, processor = load_checkpoint(FOLDER)
    pairs: Any = Part(KarpathyJson(DATA, split="val"), part["images"])
    settings = EvaluationSettings(rerank_k=32, combine="sum", match_scale=part["match_scale"], captions=20, num_beams=3)
    evaluation = Evaluation(model, processor, pairs, settings)
    for batch in islice(_batches(pairs, processor), part["images"]):
        evaluation.add(batch)
    found = evaluation.numbers(evaluation.results())
    assert found.keys() >= part["metrics"].keys()
    for name, value in part["metrics"].items():
        # one query of a hundred, for another machine's arithmetic
        assert found[name] == pytest.approx(value, abs=0.011), name


def _batches(pairs: Any, processor: Any) -> Any:
    from unimodal.data.module import EvaluationBatches

    rows = [list(range(start, start + 20)) for start in range(0, len(pairs), 20)]
    dataset = EvaluationBatches(pairs, processor, rows, None)
    return (dataset[i] for i in range(len(rows)))
