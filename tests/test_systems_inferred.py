"""VL-GAP, CDISA and CIMN, whose public text fixes no design: they say so wherever they stand, and their rules are those of plain loops."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from toysurvey import PAD, ToyEncoders, part, toy_pairs

from unimodal.losses import caption_loss, info_nce
from unimodal.survey.page import accuracy, categories
from unimodal.survey.specs import read_spec
from unimodal.systems import CDISA, VLGAP, Batch, cca, cdisa, cimn, elip, omnibridge, qwen, vlgap
from unimodal.systems.vlgap import Trust, _replaced

CONFIGS = Path(__file__).parent.parent / "configs/systems"
SAID = "inferred design, no public reference"
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "dropout": 0.0}


def gap(**settings: Any) -> VLGAP:
    torch.manual_seed(0)
    return VLGAP(ToyEncoders(), **{**SMALL, **settings}).eval()


@pytest.mark.parametrize("module", [vlgap, cdisa, cimn], ids=["vlgap", "cdisa", "cimn"])
def test_configuration_docstring_and_tables_say_inferred_design(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    spec = read_spec(CONFIGS / f"{name}.yaml")
    assert spec.inferred == SAID and not spec.published
    assert module.__doc__ is not None and "inferred design" in module.__doc__
    numbers = {f"{key}{end}": 1.0 for key in ("r1", "r5", "r10", "medr", "mr", "rsum") for end in ("", "_low", "_high")}
    ways: dict[str, Any] = {way: numbers for way in ("t2i", "i2t", "both")}
    result = {
        "title": spec.title,
        "inferred": spec.inferred,
        "published": [],
        "protocol": {"first": "toy"},
        "regime": "tuned",
    }
    recalls = accuracy([result | {"accuracy": {"first": ways}}])
    by_category = categories([result | {"map": {"t2i": 1.0, "i2t": 2.0, "categories": 3, "protocol": "toy"}}])
    for table in (recalls, by_category):
        ((first, *_),) = table["rows"]
        assert first.startswith(spec.title) and "inferred design" in first


OPEN = {  # what no public text fixes, and where the reading of it stands
    "cca": cca,
    "cdisa": cdisa,
    "cimn": cimn,
    "elip_c": elip,
    "omnibridge": omnibridge,
    "qwen_embedding": qwen,
    "qwen_reranker": qwen,
    "vlgap": vlgap,
}


def test_whatever_is_inferred_says_so_and_nothing_else_does() -> None:
    """In the configuration, which the tables quote, and in the module."""
    said = {path.stem: text for path in CONFIGS.glob("*.yaml") if (text := read_spec(path).inferred)}
    assert said.keys() == OPEN.keys()
    for name, module in OPEN.items():
        assert said[name].startswith("inferred design"), name
        assert "nferred design" in " ".join(Path(str(module.__file__)).read_text().split()), name


# VL-GAP.


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trust_is_ranked_in_the_buffer_as_in_a_loop(beta: float) -> None:
    """Ranks of match and words in what was seen, weighed by beta, against the value that a share `keep` of it reaches."""
    system = gap(beta=beta, keep=0.7, buffer=90)
    generator = torch.Generator().manual_seed(1)
    seen = [Trust(*torch.rand(2, 50, generator=generator)) for _ in range(3)]
    for found in seen:
        system._remember(found)
    values = [torch.cat([found[side] for found in seen])[-90:].tolist() for side in (0, 1)]  # the last 90 of 150

    def confidence(match: float, words: float) -> float:
        ranks = [sum(v <= x for v in values[side]) / 90 for side, x in ((0, match), (1, words))]
        return float(ranks[0] ** beta * ranks[1] ** (1 - beta))

    known = sorted(confidence(match, words) for match, words in zip(*values))
    place = 0.3 * 89
    threshold = known[int(place)] + (place - int(place)) * (known[int(place) + 1] - known[int(place)])
    asked = Trust(*torch.rand(2, 40, generator=generator))
    expected = [confidence(*pair) >= threshold - 1e-6 for pair in zip(asked.match.tolist(), asked.words.tolist())]
    assert system._accepts(asked).tolist() == expected and 0 < sum(expected) < 40


def test_before_there_is_enough_to_rank_all_are_trusted() -> None:
    system = gap()
    system._remember(Trust(torch.ones(63), torch.ones(63)))
    nothing = Trust(torch.zeros(4), torch.zeros(4))
    assert system._accepts(nothing).all()
    system._remember(Trust(torch.ones(1), torch.ones(1)))
    assert not system._accepts(nothing).any()


def test_a_doubtful_caption_gives_way_to_the_teachers_own_where_that_is_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four pairs the first is trusted; of the others the teacher's captions of the second and the fourth are, the third is dropped."""
    system, pairs = gap(), toy_pairs(4)
    answers = iter([torch.tensor([True, False, False, False]), torch.tensor([True, False, True])])
    monkeypatch.setattr(VLGAP, "_accepts", lambda self, found: next(answers))
    written = [[20, 21], [22], [23, 24, 25, 26, 27, 28, 29]]
    monkeypatch.setattr(VLGAP, "_write", lambda self, images, draws=None: None if draws is None else written)
    kept, rows = system._trusted(pairs)
    assert rows.tolist() == [0, 1, 3] and kept.image_id.tolist() == [0, 1, 2, 3] and kept.images is pairs.images
    told = [ids[mask].tolist() for ids, mask in zip(kept.texts.ids, kept.texts.mask)]
    first, _, third, _ = [ids[mask].tolist() for ids, mask in zip(pairs.texts.ids, pairs.texts.mask)]
    assert told == [first, [1, 20, 21, 2], third, [1, *written[2], 2]]
    read = system.encoders.read_texts(kept.texts.ids, kept.texts.mask)
    torch.testing.assert_close(kept.texts.tokens, read.tokens)
    assert (int(system.seen), int(system.kept), int(system.rewritten)) == (4, 3, 2) and system.acceptance == 0.75


def test_replaced_texts_are_padded_to_the_longer() -> None:
    encoders = ToyEncoders()
    long, short = (
        encoders.read_texts(ids, ids != PAD)
        for ids in (torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]]), torch.tensor([[1, 9, 2]]))
    )
    one, none = torch.tensor([0]), torch.tensor([0])
    assert _replaced(long, short, one, none, PAD).ids.tolist() == [[1, 9, 2, 0, 0], [1, 8, 2, 0, 0]]
    grown = _replaced(short, long, one, one, PAD)
    assert grown.ids.tolist() == [[1, 5, 6, 7, 2]] and grown.mask.all() and torch.equal(grown.tokens, long.tokens[:1])


@torch.no_grad()
def test_soft_targets_are_those_of_a_loop() -> None:
    """(1 - a) of the pair's own target and a of the teacher's distribution, in contrast both ways and for every word."""
    system, pairs = gap(keep=1.0, alpha=0.4), toy_pairs(4)
    for p in system.parameters():
        p.add_(0.05 * torch.randn_like(p))  # away from the teacher, which stays
    found = system.losses(pairs, "noisy", 0.1)  # half of the ramp: a is 0.2

    def matrix() -> Tensor:
        return (system.scale() * system.embed_images(pairs.images) @ system.embed_texts(pairs.texts).T).double()

    def words() -> Tensor:
        return system._word_logits(system.image_state(pairs.images), pairs.texts.ids, pairs.texts.mask).double()

    ours, our_words = matrix(), words()
    with system.teacher.acting(system):
        theirs, their_words = matrix(), words()
    assert not torch.allclose(ours, theirs, atol=1e-2)
    soft = 0.0
    for student, teacher in ((ours, theirs), (ours.T, theirs.T)):
        for i in range(4):
            norms = [math.log(sum(map(math.exp, x[i].tolist()))) for x in (student, teacher)]
            for j in range(4):
                soft -= math.exp(float(teacher[i, j]) - norms[1]) * (float(student[i, j]) - norms[0]) / 8
    hard = info_nce(
        system.embed_images(pairs.images), system.embed_texts(pairs.texts), pairs.image_id, scale=system.scale()
    )
    assert float(found["itc"]) == pytest.approx(0.8 * float(hard) + 0.2 * soft, rel=1e-4)
    terms = []
    for i in range(4):
        for place in range(int(pairs.texts.mask[i].sum()) - 1):
            student, teacher = our_words[i, place].log_softmax(-1), their_words[i, place].softmax(-1)
            terms.append(-sum(float(t) * float(s) for s, t in zip(student, teacher)))
    hard = caption_loss(our_words.float(), pairs.texts.ids, pairs.texts.mask, label_smoothing=0.1)
    assert float(found["lm"]) == pytest.approx(0.8 * float(hard) + 0.2 * sum(terms) / len(terms), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_what_is_not_trusted_is_left_out_of_matching_and_captions_alone(
    alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, pairs, rows = gap(alpha=alpha), toy_pairs(6), torch.tensor([0, 2, 5])
    for p in system.parameters():
        p.data.add_(0.05 * torch.randn_like(p))

    def losses(batch: Batch, trusted: Tensor) -> dict[str, float]:
        monkeypatch.setattr(VLGAP, "_trusted", lambda self, batch: (batch, trusted))
        torch.manual_seed(3)  # of the wrong pairs
        return {name: float(loss) for name, loss in system.losses(batch, "noisy", 1.0).items()}

    with torch.no_grad():
        found = losses(pairs, rows)
        every, alone = losses(pairs, torch.arange(6)), losses(part(pairs, rows), torch.arange(3))
    assert found["itc"] == pytest.approx(every["itc"], rel=1e-5) and abs(found["itc"] - alone["itc"]) > 1e-3
    for name in ("itm", "lm"):
        assert found[name] == pytest.approx(alone[name], rel=1e-5) and abs(found[name] - every[name]) > 1e-6


def test_a_batch_of_which_nothing_is_trusted_is_contrasted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names of every other batch, so that a stage can average its losses."""
    system, pairs = gap(), toy_pairs(4)
    usual = system.losses(pairs, "clean", 0.0)
    monkeypatch.setattr(VLGAP, "_accepts", lambda self, found: torch.zeros(len(found.match), dtype=torch.bool))
    found = system.losses(pairs, "noisy", 0.0)
    assert found.keys() == usual.keys() and found["itm"].item() == found["lm"].item() == 0
    torch.testing.assert_close(found["itc"], usual["itc"])


def test_the_teacher_begins_the_noisy_stage_as_the_student() -> None:
    system = gap()
    for p in system.parameters():
        p.data.add_(0.1)
    assert not any(torch.equal(b, p) for b, p in zip(system.teacher.buffers(), system.parameters()))
    system.start_stage("noisy")
    assert all(torch.equal(b, p) for b, p in zip(system.teacher.buffers(), system.parameters()))
    assert system.teacher.rate == 0.995 and list(read_spec(CONFIGS / "vlgap.yaml").stages) == ["clean", "noisy"]


# CDISA.


@torch.no_grad()
def test_the_losses_of_cdisa_by_plain_loops() -> None:
    torch.manual_seed(0)
    system, pairs = CDISA(ToyEncoders(), dim=8, **SMALL).eval(), toy_pairs(6)
    found, labels = system.losses(pairs, "align", 0.0), pairs.labels
    assert labels is not None
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    apart = sum(1 - float(a @ b) for a, b in zip(image, text)) / 6
    assert float(found["inv"]) == pytest.approx(0.1 * apart, rel=1e-4)
    x, y = (
        system.image_tower(*pairs.images[:2])[0][:, 1:],
        system.text_tower(pairs.texts.tokens, pairs.texts.mask)[0][:, 1:],
    )
    for layer in system.interactions:
        x, y = layer(x, pairs.images.mask, y, pairs.texts.mask)
    pooled = [
        torch.stack([s[m].mean(0) for s, m in zip(*part)]) for part in ((x, pairs.images.mask), (y, pairs.texts.mask))
    ]
    teachers = [system._vector(part) for part in pooled]
    taught = sum(1 - float(a @ b) for own, teacher in zip((image, text), teachers) for a, b in zip(own, teacher)) / 12
    assert float(found["teach"]) == pytest.approx(taught, rel=1e-4)
    cost = 0.0  # the same classifier for both sides and for what teaches them
    for vectors in (image, text, *teachers):
        for vector, wanted in zip(vectors, labels):
            for logit, yes in zip((system.classifier(vector) / 0.07).tolist(), wanted.tolist()):
                cost += math.log1p(math.exp(-logit if yes else logit)) / 24
    assert float(found["cls"]) == pytest.approx(cost, rel=1e-4)
    assert found.keys() == {"cls", "bcm", "inv", "teach"}


def test_the_retrieval_vector_of_cdisa_does_not_need_the_other_side() -> None:
    """It comes from the side's own tower and a perceptron that both sides share; the interaction is no part of it."""
    torch.manual_seed(0)
    system, pairs = CDISA(ToyEncoders(), dim=8, **SMALL).eval(), toy_pairs(3)
    with torch.no_grad():
        image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
        for p in (*system.interactions.parameters(), *system.classifier.parameters()):
            p.add_(torch.randn_like(p))
        assert torch.equal(system.embed_images(pairs.images), image) and torch.equal(
            system.embed_texts(pairs.texts), text
        )
        system.shared[3].bias.add_(1.0)
        assert not torch.allclose(system.embed_images(pairs.images), image)
        assert not torch.allclose(system.embed_texts(pairs.texts), text)
