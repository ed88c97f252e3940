"""OSCAR's losses and its rule of ranking against plain loops; what tells it apart stands in `test_systems_interaction.py`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toysurvey import ToyEncoders, toy_pairs

from unimodal.survey.score import rank
from unimodal.survey.specs import read_spec
from unimodal.systems import OSCAR

SPEC = read_spec(Path(__file__).parent.parent / "configs/systems/oscar.yaml")


def small(**settings: Any) -> OSCAR:
    torch.manual_seed(0)
    system = OSCAR(ToyEncoders(), **{"width": 48, "heads": 4, "dropout": 0.0, **settings}).eval()
    system.prepare(iter([toy_pairs(64)]))
    return system


def test_matching_by_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong pair for each true one, all alike: a wrong caption, or a wrong image with its own tags."""
    system, pairs = small(), toy_pairs(4)
    wrong_image, wrong_text = (
        [0, 1, 3, 2],
        [2, 3, 2, 3],
    )  # the first two rows keep their image, the others their caption
    monkeypatch.setattr(
        "unimodal.systems.oscar.random_negatives", lambda ids: (torch.tensor(wrong_image), torch.tensor(wrong_text))
    )
    expected = 0.0
    with torch.no_grad():
        found = system.losses(pairs, "retrieval", 0.0)
        for i, j, sign in [(b, b, 1) for b in range(4)] + [(i, j, -1) for i, j in zip(wrong_image, wrong_text)]:
            score = system.score(pairs.images.select(torch.tensor([i])), pairs.texts.select(torch.tensor([j])))
            expected += math.log1p(math.exp(-sign * float(score))) / 8
    assert found.keys() == {"itm"} and float(found["itm"]) == pytest.approx(expected, rel=1e-5)


def test_pretraining_asks_whose_tags_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class token of caption, tags and image says whether the tags are the image's own."""
    system, pairs = small(), toy_pairs(4)
    rows = torch.tensor([0, 3, 2, 1])  # two images have the tags of another
    monkeypatch.setattr("unimodal.systems.oscar.mixed_tags", lambda ids: rows)
    monkeypatch.setattr(
        "unimodal.systems.oscar.hide_words", lambda ids, mask, encoders: (ids, ids.masked_fill(~mask, -100))
    )
    with torch.no_grad():
        found = system.losses(pairs, "pretrain", 0.0)
        image, mask, tags, tag_mask = system.image_state(pairs.images)
        caption, caption_mask = system.text_state(pairs.texts)
        hidden = system._stream(caption, caption_mask, tags[rows], tag_mask[rows], image, mask)
        logits = system.own_tags(hidden[:, 0])[:, 0].tolist()
        words = system.words.logits(hidden).log_softmax(-1)
    expected = sum(math.log1p(math.exp(-sign * x)) for sign, x in zip((1, -1, 1, -1), logits)) / 4
    assert float(found["tags"]) == pytest.approx(expected, rel=1e-5)
    ids = torch.cat([pairs.texts.ids, system.read_tags(pairs.images)[0][rows, 1:]], 1).tolist()
    real = torch.cat([caption_mask, tag_mask[rows]], 1).tolist()
    costs = [-float(words[b, p, ids[b][p]]) for b in range(4) for p in range(len(ids[b])) if real[b][p]]
    assert float(found["mlm"]) == pytest.approx(sum(costs) / len(costs), rel=1e-4)


def test_the_match_logit_replaces_the_shortlists_score() -> None:
    """The shortlist is another system's, whose cosines say nothing beside a match logit."""
    system, pairs = small(width=16, heads=2), toy_pairs(40)
    places = F.normalize(torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = rank(
        system,
        SPEC.scoring,
        pairs.images,
        pairs.texts,
        pairs.image_id,
        pairs.image_id,
        shortlist=(places[0], places[1]),
    )
    with torch.no_grad():
        logit = system.score_matrix(system.image_state(pairs.images), system.text_state(pairs.texts))
    first = places[0] @ places[1].T
    for ranks, again, lines, match in (
        (found.t2i, found.t2i_reranked, first.T, logit.T),
        (found.i2t, found.i2t_reranked, first, logit),
    ):
        assert ranks is not None and again is not None and not torch.equal(again, ranks)
        for q in range(40):
            candidates = lines[q].argsort(descending=True)[: SPEC.scoring.k].tolist()
            expected = 1 + sum(float(match[q, c]) > float(match[q, q]) for c in candidates)
            assert again[q] == (expected if q in candidates else ranks[q])
