"""Captions of one image are never each other's negatives, in any system's contrast, matching or order."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toysurvey import ToyEncoders, toy_pairs

from unimodal.losses import matching, sample_hard_negatives
from unimodal.retrieval import similarity
from unimodal.systems import (
    BLIP2,
    CDISA,
    CIMN,
    VLGAP,
    Adapted,
    MaskedImages,
    OmniBridge,
    QwenEmbedding,
    QwenReranker,
    System,
    VLMo,
)

SMALL: dict[str, Any] = {"width": 16, "heads": 2, "dropout": 0.0, "dim": 8}


def built(kind: type[System], **settings: Any) -> Any:
    torch.manual_seed(0)
    taken = {key: value for key, value in SMALL.items() if key in kind.__init__.__annotations__}
    return kind(ToyEncoders(), **{**taken, **settings}).eval()


@pytest.mark.parametrize(
    ("kind", "stage", "loss"),
    [
        (VLMo, "joint", "itc"),
        (VLMo, "retrieval", "itc"),
        (BLIP2, "retrieve", "itc"),
        (VLGAP, "clean", "itc"),
        (OmniBridge, "alignment", "itc"),
        (CDISA, "align", "bcm"),
        (MaskedImages, "contrast", "itc"),
        (Adapted, "contrast", "itc"),
    ],
)
def test_captions_of_an_image_may_change_places_in_contrast(kind: type[System], stage: str, loss: str) -> None:
    """Targets are uniform over an image's captions, so that it does not matter which of them stands beside it."""
    system, pairs = built(kind), toy_pairs(4, captions=2)
    if pairs.labels is not None:  # all of one row's own: categories join nothing here
        pairs = pairs._replace(labels=torch.zeros_like(pairs.labels))
    swapped, other = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]), torch.tensor([2, 3, 0, 1, 4, 5, 6, 7])
    with torch.no_grad():
        found = [
            float(system.losses(pairs._replace(texts=pairs.texts.select(rows)), stage, 0.0)[loss])
            for rows in (torch.arange(8), swapped, other)
        ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert abs(found[0] - found[2]) > 1e-3  # captions of two images may not


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        (VLMo, "joint"),
        (BLIP2, "retrieve"),
        (VLGAP, "clean"),
        (QwenReranker, "answer"),
        (QwenEmbedding, "finetune"),
    ],
)
def test_wrong_pairs_are_drawn_by_likeness_and_judged_as_wrong(
    kind: type[System], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, pairs = built(kind), toy_pairs(4, captions=2)
    asked: list[tuple[Tensor, Tensor, Tensor]] = []
    judged: list[Tensor] = []

    def sample(scores: Tensor, image_id: Tensor, text_image_id: Tensor) -> tuple[Tensor, Tensor]:
        asked.append((scores, image_id, text_image_id))
        return sample_hard_negatives(scores, image_id, text_image_id)

    def judge(logits: Tensor, labels: Tensor) -> Tensor:
        judged.append(labels)
        return logits.sum()

    monkeypatch.setattr(matching, "sample_hard_negatives", sample)
    monkeypatch.setattr(matching, "matching_loss", judge)
    system.losses(pairs, stage, 0.0)
    (scores, image_id, text_image_id), (labels,) = asked[0], judged
    assert torch.equal(image_id, pairs.image_id) and torch.equal(text_image_id, pairs.image_id)
    assert labels.tolist() == [True] * 8 + [False] * 16
    assert not scores.requires_grad
    if kind is QwenReranker:
        assert not scores.any()  # alone it draws at random
    else:
        alike = similarity(system.embed_images(pairs.images), system.embed_texts(pairs.texts))
        torch.testing.assert_close(scores, (system.scale() * alike).detach(), atol=1e-5, rtol=1e-4)


def loop_masked(query: Tensor, document: Tensor, ids: Tensor, scale: float) -> float:
    total = 0.0
    for i in range(len(ids)):
        own = float(query[i] @ document[i])
        others = [float(query[i] @ document[j]) for j in range(len(ids)) if ids[j] != ids[i]]
        others += [float(x[i] @ x[j]) for x in (query, document) for j in range(len(ids)) if ids[j] != ids[i]]
        kept = [own, *(s for s in others if s <= own + 0.1)]
        total += math.log(sum(math.exp(scale * s) for s in kept)) - scale * own
    return total / len(ids)


def forms(x: Tensor, dims: list[int], step: float) -> list[Tensor]:
    """Prefixes of unit length, each as it is, in int8 of the step and in one bit; again of unit length."""
    out = []
    for dim in dims:
        cut = F.normalize(x[:, :dim], dim=-1)
        ratio = cut * math.sqrt(dim)
        out += [cut]
        out += [F.normalize(code, dim=-1) for code in ((ratio / step).round().clamp(-127, 127), ratio.sign())]
    return out


@torch.no_grad()
def test_the_contrast_of_qwen_in_every_form_is_that_of_a_loop() -> None:
    system, pairs = built(QwenEmbedding, dims=(3,)), toy_pairs(4, captions=2)
    found = system.losses(pairs, "pretrain", 0.0)
    image, text = (system.embed_images(pairs.images).double(), system.embed_texts(pairs.texts).double())
    images, texts = (forms(x, [3, 8], 0.1) for x in (image, text))
    for name, queries, documents in (("t2i", texts, images), ("i2t", images, texts)):
        losses = [loop_masked(q, d, pairs.image_id, 20.0) for q, d in zip(queries, documents)]
        assert float(found[name]) == pytest.approx(sum(losses) / 6, rel=1e-4)


@torch.no_grad()
def test_the_hinges_of_cimn_spare_other_captions_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops: between the sides, and within each, where a caption's partner is another caption of its image."""
    monkeypatch.setattr("unimodal.systems.cimn.drop_nodes", lambda mask: mask)
    system, pairs = built(CIMN), toy_pairs(4, captions=2)
    image, text = system.embed_images(pairs.images).double(), system.embed_texts(pairs.texts).double()
    items = torch.cat([image, text])
    raw = [1 + sum(sorted((float(items[i] @ x) for j, x in enumerate(items) if j != i))[-5:]) / 5 for i in range(16)]
    mass = [min(2.0, max(0.5, m / (sum(raw) / 16))) for m in raw]
    partner = text[[1, 0, 3, 2, 5, 4, 7, 6]]

    def hinges(a: Tensor, b: Tensor, a_mass: list[float], b_mass: list[float]) -> float:
        total = 0.0
        for x, y, own, other in ((a, b, a_mass, b_mass), (b, a, b_mass, a_mass)):
            for i in range(8):
                wrong = [j for j in range(8) if pairs.image_id[j] != pairs.image_id[i]]
                force = {j: own[i] * other[j] / ((1 - float(x[i] @ y[j])) ** 2 + 0.1) for j in wrong}
                for j in wrong:
                    hinge = max(0.0, 0.2 + float(x[i] @ y[j]) - float(x[i] @ y[i]))
                    total += own[i] * force[j] / max(force.values()) * hinge
        return total

    found = system.losses(pairs, "gravitation", 0.0)
    assert float(found["inter"]) == pytest.approx(hinges(image, text, mass[:8], mass[8:]), rel=1e-4)
    within = hinges(image, image, mass[:8], mass[:8]) + hinges(text, partner, mass[8:], mass[8:])
    assert float(found["intra"]) == pytest.approx(0.2 * within, rel=1e-4)
