"""Evaluation of published models: whatever a model can do is scored by the same verb, and what it cannot is told in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unimodal
from tests.test_published import naflex
from tests.toyqwen import toy_qwen
from unimodal import Unimodal, cli
from unimodal.cli.evaluate import read
from unimodal.data import Scenes, write_karpathy
from unimodal.data.guess import open_split
from unimodal.data.pairs import Pairs
from unimodal.tasks import Evaluation, EvaluationSettings

COUNT = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_karpathy({"test": Scenes("test", count=COUNT)}, tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each model, as its authors publish it."""
    place = tmp_path_factory.mktemp("published")
    for kind in ("embedder", "reranker", None):
        toy_qwen(place / str(kind), kind)
    torch.manual_seed(0)
    for part in naflex():
        part.save_pretrained(place / "naflex")
    return {name: place / name for name in ("embedder", "reranker", "None", "naflex")}


def evaluate(capsys: Any, model: Path, data: Path, out: Path, *more: object) -> tuple[int, Any, str]:
    ask = ("evaluate", "--model", model, "--data", data, "--out", out, "--json", "--captions_per_image", 2, *more)
    status = cli.main([str(word) for word in ask])
    printed = capsys.readouterr()
    return status, json.loads(printed.out) if printed.out else None, printed.err


def first_of(scores: np.ndarray, owner: list[int]) -> float:
    """R@1, text to image, of scores [C, I]."""
    return float(np.mean([100.0 * (row.argmax() == image) for row, image in zip(scores, owner)]))


@pytest.mark.parametrize("name", ["embedder", "naflex"])
def test_an_embedding_of_a_published_model_is_scored(
    name: str, folders: Any, data: Path, tmp_path: Path, capsys: Any
) -> None:
    status, found, error = evaluate(capsys, folders[name], data, tmp_path / "out")
    assert status == 0, error
    assert "reranked" not in found and found["first"]["protocol"]["images"] == COUNT
    model, pairs = unimodal.from_pretrained(folders[name]), opened(data)
    texts, owner = captions(pairs)
    scores = model.encode(texts) @ model.encode([pairs.image(i) for i in range(COUNT)]).T
    assert found["first"]["t2i_r1"] == pytest.approx(first_of(scores, owner))


def test_a_reranker_alone_scores_every_pair(folders: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    status, found, error = evaluate(capsys, folders["reranker"], data, tmp_path / "out")
    assert status == 0, error
    assert "reranked" not in found
    model, pairs = unimodal.from_pretrained(folders["reranker"]), opened(data)
    texts, owner = captions(pairs)
    images = [pairs.image(i) for i in range(COUNT)]
    scores = model.predict([(text, image) for text in texts for image in images], activation_fn=torch.nn.Identity())
    assert found["first"]["t2i_r1"] == pytest.approx(first_of(scores.reshape(-1, COUNT), owner))
    for asked in ("--text_to_text", "--every_relevant"):
        status, _, error = evaluate(capsys, folders["reranker"], data, tmp_path / "more", asked)
        assert status == 1 and "compare embeddings, and this model has none; leave them out" in error


def test_a_model_that_only_writes_has_nothing_to_rank_by(folders: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    status, _, error = evaluate(capsys, folders["None"], data, tmp_path / "out")
    assert status == 1
    assert "scoring.first is 'embed', and this model has no embedding; it has: captioning" in error


def test_embedding_reranking_and_captions_of_one_vision_language_model(folders: Any) -> None:
    model = Unimodal.from_pretrained(folders["None"], heads=["embedding", "matching", "captioning"])
    pairs = Scenes("test", count=2)
    settings = EvaluationSettings(rerank_k=2, captions=2)
    evaluation = Evaluation(model.model, model.processor, pairs, settings)
    read(evaluation, 2)
    results = evaluation.results()
    assert evaluation.numbers(results).keys() == {
        *("t2i_r1_first", "t2i_r1_reranked", "i2t_r1_first", "i2t_r1_reranked"),
        *("cider_d", "bleu_4", "swap_accuracy_embed", "swap_accuracy_match", "caption_exact_attributes"),
    }
    images = [pairs.image(i) for i in range(2)]
    assert results["written"] == model.caption(images, max_new_tokens=40)
    # The query comes first: a caption asks for an image, an image for a caption.
    first = results["candidates"]
    caption, image = pairs.captions(0)[0], images[int(first["t2i"].index[0, 0])]
    logit = model.predict([(caption, image)], activation_fn=torch.nn.Identity())
    assert first["t2i_match"][0, 0] == pytest.approx(float(logit[0]), abs=1e-4)
    texts, _ = captions(pairs)
    logit = model.predict([(images[0], texts[int(first["i2t"].index[0, 0])])], activation_fn=torch.nn.Identity())
    assert first["i2t_match"][0, 0] == pytest.approx(float(logit[0]), abs=1e-4)


def opened(data: Path) -> Pairs:
    return open_split(str(data), "test", captions_per_image=2)


def captions(pairs: Pairs) -> tuple[list[str], list[int]]:
    """All captions of a split, and the row of the image of each."""
    both = [(caption, i) for i in range(len(pairs)) for caption in pairs.captions(i)]
    return [caption for caption, _ in both], [i for _, i in both]
