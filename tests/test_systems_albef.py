"""ALBEF's three losses against a second, slow implementation with a model of its own for the teacher; its ramp, queue and ranking."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toysurvey import ToyEncoders, toy_pairs

from unimodal.losses import matching
from unimodal.stages import rates
from unimodal.survey.score import rank
from unimodal.survey.specs import read_spec
from unimodal.systems import ALBEF, Batch
from unimodal.systems import albef as albef_module
from unimodal.systems.momentum import Queue
from unimodal.systems.words import NOT_ASKED, hide_words

SMALL: dict[str, Any] = {"width": 16, "heads": 2, "dropout": 0.0, "dim": 12}
SPEC = read_spec(Path(__file__).parent.parent / "configs/systems/albef.yaml")


def student_and_teacher(queue: int = 5) -> tuple[ALBEF, ALBEF]:
    """An ALBEF whose parameters have left its teacher's, and a model that is the teacher."""
    torch.manual_seed(0)
    system = ALBEF(ToyEncoders(), queue=queue, **SMALL).eval()
    system.start_stage("joint")
    teacher = copy.deepcopy(system)
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.1 * torch.randn_like(p))
        system.temperature.fill_(0.2)
    return system, teacher


def losses(
    system: ALBEF, pairs: Batch, progress: float, monkeypatch: pytest.MonkeyPatch, stage: str = "joint"
) -> tuple[Any, Any]:
    """The losses, and what was drawn: hidden words, wrong pairs and the similarity that these were drawn by."""
    seen: dict[str, Any] = {}
    torch.manual_seed(1)
    seen["words"] = hide_words(pairs.texts.ids, pairs.texts.mask, system.encoders)

    def draw(similarity: Tensor, image_id: Tensor, text_image_id: Tensor) -> tuple[Tensor, Tensor]:
        seen["similarity"] = similarity
        assert torch.equal(image_id, pairs.image_id) and torch.equal(text_image_id, pairs.image_id)
        return torch.tensor([2, 3, 0, 1]), torch.tensor([3, 2, 1, 0])

    monkeypatch.setattr(albef_module, "hide_words", lambda *_: seen["words"])
    monkeypatch.setattr(matching, "sample_hard_negatives", draw)
    with torch.no_grad():
        return {name: float(loss) for name, loss in system.losses(pairs, stage, progress).items()}, seen


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


def softmax(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


@pytest.mark.parametrize("stage", ["joint", "retrieval"])
@pytest.mark.parametrize(("progress", "alpha"), [(0.0, 0.0), (0.1, 0.2), (0.2, 0.4), (1.0, 0.4)])
def test_alignment_by_plain_loops(stage: str, progress: float, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are the teacher's batch and the queue as it was before the step; equal image ids share a target; the cosine is divided by
    the temperature; the mean of both directions."""
    system, teacher = student_and_teacher()
    pairs = toy_pairs(2, captions=2)
    earlier = F.normalize(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3)), dim=-1)
    queue_ids = torch.tensor([1, 9, -1, 8, -1])  # one more of image 1
    system.queue.push(*earlier, queue_ids)
    found, _ = losses(system, pairs, progress, monkeypatch, stage)
    with torch.no_grad():
        own = [system.embed_images(pairs.images).tolist(), system.embed_texts(pairs.texts).tolist()]
        slow = [teacher.embed_images(pairs.images).tolist(), teacher.embed_texts(pairs.texts).tolist()]
    ids = [*pairs.image_id.tolist(), *queue_ids.tolist()]
    expected = 0.0
    for side in range(2):
        others = [*slow[1 - side], *earlier[1 - side].tolist()]
        for i in range(4):
            log = [math.log(p) for p in softmax([dot(own[side][i], o) / 0.2 for o in others])]
            soft = softmax([dot(slow[side][i], o) / 0.2 for o in others])
            same = [float(other == ids[i]) for other in ids]
            target = [alpha * p + (1 - alpha) * q / sum(same) for p, q in zip(soft, same)]
            expected -= dot(target, log) / 4 / 2
    assert found["ita"] == pytest.approx(expected, rel=1e-4)
    # Training adds them, each with weight 1.
    assert found.keys() == ({"ita", "itm"} if stage == "retrieval" else {"ita", "itm", "mlm"})
    # What the teacher saw stands in the queue afterwards, five places for nine.
    torch.testing.assert_close(system.queue.image[:4], torch.tensor(slow[0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(system.queue.text[:4], torch.tensor(slow[1]), atol=1e-5, rtol=1e-4)
    assert system.queue.ids.tolist() == [*pairs.image_id.tolist(), -1] and int(system.queue.place) == 4


def test_matching_by_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A true pair, a wrong text for each image, a wrong image for each text, drawn by the student's cosines over the temperature."""
    system, _ = student_and_teacher()
    pairs = toy_pairs(2, captions=2)
    found, seen = losses(system, pairs, 1.0, monkeypatch)
    rows = [(i, i, 1) for i in range(4)] + [(i, [2, 3, 0, 1][i], -1) for i in range(4)]
    rows += [([3, 2, 1, 0][j], j, -1) for j in range(4)]
    expected = 0.0
    with torch.no_grad():
        for i, j, sign in rows:
            score = system.score(pairs.images.select(torch.tensor([i])), pairs.texts.select(torch.tensor([j])))
            expected += math.log1p(math.exp(-sign * float(score))) / 12
        cosine = system.embed_images(pairs.images) @ system.embed_texts(pairs.texts).T
    assert found["itm"] == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(seen["similarity"], cosine / 0.2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("progress", "alpha"), [(0.0, 0.0), (1.0, 0.4)])
def test_hidden_words_by_plain_loops(progress: float, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - alpha) of the word that was there and alpha of what the teacher makes of the same holes and its own image, over hidden words."""
    system, teacher = student_and_teacher()
    pairs = toy_pairs(2, captions=2)
    found, seen = losses(system, pairs, progress, monkeypatch)
    holes, asked = seen["words"]
    with torch.no_grad():
        logits = []
        for model in (system, teacher):
            text = model.text_state(model.encoders.read_texts(holes, pairs.texts.mask))
            hidden = model.fusion(*text, *model.image_state(pairs.images))
            logits.append(model.words.logits(hidden))  # [4, 1 + L, V], the class token first
    expected, count = 0.0, 0
    for i, row in enumerate(asked.tolist()):
        for place, word in enumerate(row):
            if word == NOT_ASKED:
                continue
            own, soft = (softmax(x[i, 1 + place].tolist()) for x in logits)
            expected -= (1 - alpha) * math.log(own[word]) + alpha * sum(p * math.log(q) for p, q in zip(soft, own))
            count += 1
    assert count >= 4 and found["mlm"] == pytest.approx(expected / count, rel=1e-4)


def test_the_teacher_is_all_of_the_student_and_gets_no_gradient() -> None:
    system, pairs = ALBEF(ToyEncoders(), **SMALL), toy_pairs(6)
    assert system.teacher.rate == 0.995
    named = {name.replace(".", "/") for name, _ in system.named_parameters()}
    assert {name for name, _ in system.teacher.named_buffers()} == named
    system.start_stage("joint")
    before = {name: b.clone() for name, b in system.teacher.named_buffers()}
    torch.stack(list(system.losses(pairs, "joint", 1.0).values())).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in system.teacher.named_buffers())
    with torch.no_grad():
        for p in system.parameters():
            p.add_(1.0)
    system.after_step("joint")
    for name, b in system.teacher.named_buffers():
        torch.testing.assert_close(b, before[name] + 0.005)


def test_the_queue_is_large_enough_to_be_a_queue() -> None:
    """A batch divides it, as the authors demand, so that no step overwrites what it has just put in."""
    system: Any = SPEC.system(ToyEncoders())
    for stage in SPEC.stages.values():
        places, batch = len(system.queue.ids), stage.batch_size
        assert places > batch and places % batch == 0


def test_retrieval_is_learned_last_at_a_lower_rate_and_without_hidden_words() -> None:
    assert list(SPEC.stages) == ["joint", "retrieval"]
    joint, retrieval = SPEC.stages.values()
    assert retrieval.lr < joint.lr
    factors = rates(SPEC.system(ToyEncoders()), retrieval.trainable)
    assert {name.split(".")[0] for name, factor in factors.items() if not factor} == {"words"}


def test_a_batch_larger_than_the_queue_leaves_its_last_rows() -> None:
    queue, ids = Queue(3, 2), torch.arange(5)
    queue.push(ids[:, None].float().expand(5, 2), ids[:, None].float().expand(5, 2), ids)
    assert sorted(queue.ids.tolist()) == [2, 3, 4]
    nothing = Queue(0, 2)
    nothing.push(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([3]))
    assert len(nothing.ids) == 0


def test_the_temperature_is_no_scale() -> None:
    """It divides: at a higher one the same cosines say less. CLIP's scale multiplies, and no parameter is both."""
    system, pairs = ALBEF(ToyEncoders(), **SMALL).eval(), toy_pairs(6)
    assert not hasattr(system, "scale") and float(system.temperature.detach()) == pytest.approx(0.07)
    system.start_stage("joint")
    system.queue = Queue(0, 12)
    with torch.no_grad():
        system.temperature.fill_(0.001)
        sharp = float(system.losses(pairs, "joint", 0.0)["ita"])
        system.temperature.fill_(1e3)
        flat = float(system.losses(pairs, "joint", 0.0)["ita"])
    assert flat == pytest.approx(math.log(6), abs=1e-3) and sharp != pytest.approx(flat, abs=0.1)


def test_the_match_logit_alone_ranks_the_candidates() -> None:
    system, pairs = ALBEF(ToyEncoders(), **SMALL).eval(), toy_pairs(48)
    found = rank(system, SPEC.scoring, pairs.images, pairs.texts, pairs.image_id, pairs.image_id)
    with torch.no_grad():
        cosine = system.embed_images(pairs.images) @ system.embed_texts(pairs.texts).T
        state = system.image_state(pairs.images), system.text_state(pairs.texts)
        logit = system.score_matrix(*state)
    for ranks, again, first, match in (
        (found.t2i, found.t2i_reranked, cosine.T, logit.T),
        (found.i2t, found.i2t_reranked, cosine, logit),
    ):
        assert ranks is not None and again is not None
        for q in range(48):
            candidates = first[q].argsort(descending=True)[: SPEC.scoring.k].tolist()
            if q in candidates:
                assert int(again[q]) == 1 + sum(float(match[q, c]) > float(match[q, q]) for c in candidates)
            else:
                assert again[q] == ranks[q]
        assert not torch.equal(again, ranks)


def test_a_stage_starts_teacher_and_queue_together() -> None:
    """Features of another teacher, whose images a later stage would count as right, do not stay."""
    torch.manual_seed(0)
    system, pairs = ALBEF(ToyEncoders(), 16, 1, 2, 0.0, dim=8, queue=16), toy_pairs(6)
    for _ in range(2):
        system.losses(pairs, "joint", 0.5)
    assert (system.queue.ids >= 0).sum() == 12 and int(system.queue.place) == 12
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.1)
    system.start_stage("retrieval")
    assert (system.queue.ids == -1).all() and int(system.queue.place) == 0
    torch.testing.assert_close(system.queue.image.norm(dim=-1), torch.ones(16))
    for name, parameter in system.named_parameters():
        assert torch.equal(system.teacher.get_buffer(name.replace(".", "/")), parameter)
