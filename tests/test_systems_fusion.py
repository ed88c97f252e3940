"""ALBEF, VLMo, BLIP-2 and VL-GAP: momentum, queue, experts, masks and trust, against loops and by hand."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toysurvey import END, PAD, START, ToyEncoders, part, toy_pairs

from unimodal.layers import KeyValues
from unimodal.losses import info_nce, momentum_contrast
from unimodal.retrieval import similarity
from unimodal.survey.specs import read_spec
from unimodal.systems import ALBEF, BLIP2, VLGAP, Texts, VLMo
from unimodal.systems.momentum import Queue, Teacher
from unimodal.systems.words import NOT_ASKED, hide_words, write_words

SMALL = {"width": 16, "heads": 2, "dropout": 0.0}
CONFIGS = Path(__file__).parent.parent / "configs/systems"


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# Momentum and queue.


def test_a_teacher_moves_by_its_share_and_gets_no_gradient() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    teacher = Teacher(student, rate=0.9)
    first = {name: p.detach().clone() for name, p in student.named_parameters()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    teacher.follow(student)
    x = torch.randn(4, 3)
    with teacher.acting(student):
        for name, p in student.named_parameters():
            torch.testing.assert_close(p.data, first[name] + 0.1)
        slow = student(x)
    assert not slow.requires_grad and not list(teacher.parameters())
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.data, first[name] + 1.0)
    teacher.start(student)
    with teacher.acting(student):
        torch.testing.assert_close(student(x), student(x))
    assert all(torch.equal(b, p) for b, p in zip(teacher.buffers(), student.parameters()))


def test_a_queue_wraps() -> None:
    queue = Queue(5, 2)
    assert torch.allclose(queue.image.norm(dim=-1), torch.ones(5)) and (queue.ids == -1).all()
    for start in (0, 3, 6):
        ids = torch.arange(start, start + 3)
        queue.push(ids[:, None].float().expand(3, 2), -ids[:, None].float().expand(3, 2), ids)
    assert int(queue.place) == 4 and sorted(queue.ids.tolist()) == [4, 5, 6, 7, 8]
    assert torch.equal(queue.image[:, 0], queue.ids.float()) and torch.equal(queue.text[:, 0], -queue.ids.float())


def slow_contrast(
    image: Tensor,
    text: Tensor,
    ti: Tensor,
    tt: Tensor,
    qi: Tensor,
    qt: Tensor,
    ids: Tensor,
    qids: Tensor,
    t: float,
    a: float,
) -> float:
    total = 0.0
    all_ids = [*ids.tolist(), *qids.tolist()]
    for student, teacher, others in ((image, ti, [*tt, *qt]), (text, tt, [*ti, *qi])):
        for i in range(len(ids)):
            own = [math.exp(float(student[i] @ o) / t) for o in others]
            soft = [math.exp(float(teacher[i] @ o) / t) for o in others]
            same = [float(j == ids[i]) for j in all_ids]
            for o, s, p in zip(own, soft, same):
                target = a * s / sum(soft) + (1 - a) * p / sum(same)
                total -= target * math.log(o / sum(own)) / len(ids) / 2
    return total


def test_momentum_contrast_is_that_of_a_loop() -> None:
    parts = [unit(4, 3) for _ in range(4)] + [unit(3, 3) for _ in range(2)]
    ids, queued = torch.tensor([5, 6, 5, 7]), torch.tensor([6, -1, 9])
    for alpha in (0.0, 0.4):
        found = momentum_contrast(*parts, ids, queued, temperature=0.2, alpha=alpha)
        assert float(found) == pytest.approx(slow_contrast(*parts, ids, queued, 0.2, alpha), rel=1e-6)


def test_without_queue_and_softness_it_is_info_nce() -> None:
    image, text, none = unit(5, 4), unit(5, 4), torch.zeros(0, 4, dtype=torch.float64)
    ids, nobody = torch.tensor([0, 1, 2, 1, 4]), torch.zeros(0, dtype=torch.long)
    found = momentum_contrast(image, text, image, text, none, none, ids, nobody, temperature=0.1, alpha=0.0)
    torch.testing.assert_close(found, info_nce(image, text, ids, scale=10.0))
    with pytest.raises(ValueError, match="expected one of each for every pair"):
        momentum_contrast(image, text[:4], image, text, none, none, ids, nobody, temperature=0.1, alpha=0.0)
    with pytest.raises(ValueError, match="expected equal lengths"):
        momentum_contrast(image, text, image, text, none, image, ids, nobody, temperature=0.1, alpha=0.0)


# Masked words.


def test_hidden_words_are_words() -> None:
    encoders, pairs = ToyEncoders(), toy_pairs(400)
    torch.manual_seed(0)
    holes, asked = hide_words(pairs.texts.ids, pairs.texts.mask, encoders)
    ids = pairs.texts.ids
    chosen = asked != NOT_ASKED
    assert torch.equal(asked[chosen], ids[chosen]) and torch.equal(holes[~chosen], ids[~chosen])
    assert not torch.isin(ids[chosen], torch.tensor([START, END, PAD])).any()
    assert chosen.any(1).all()  # every text is asked for a word
    masked = (holes[chosen] == encoders.mask_id).float().mean()
    assert 0.75 < masked < 0.85
    assert 0.05 < (holes[chosen] == ids[chosen]).float().mean() < 0.17


def test_words_are_written_until_the_end() -> None:
    told = [[7, 9, END, 5], [8, END, 5, 5]]

    def next_word(ids: Tensor) -> Tensor:
        return F.one_hot(torch.tensor([row[ids.shape[1] - 1] for row in told]), 60).float() * 50

    assert write_words(next_word, 2, ToyEncoders()) == [[7, 9], [8]]
    assert write_words(next_word, 2, ToyEncoders(), draws=torch.rand(2, 12), top_p=0.5) == [[7, 9], [8]]
    endless = write_words(lambda ids: F.one_hot(torch.tensor([6]), 60).float(), 1, ToyEncoders())
    assert endless == [[6] * (ToyEncoders.max_length - 1)]


# ALBEF.


def test_albef_holds_its_temperature_and_ramps_its_teacher_in() -> None:
    torch.manual_seed(0)
    system, pairs = ALBEF(ToyEncoders(), **SMALL), toy_pairs(6)
    assert float(system.temperature) == pytest.approx(0.07)
    for value, expected in ((0.0, 0.001), (2.0, 0.5)):
        system.temperature.data.fill_(value)
        system.after_step("joint")
        assert float(system.temperature) == pytest.approx(expected)
    system.temperature.data.fill_(0.07)
    system.start_stage("joint")
    found = system.losses(pairs, "joint", 0.0)["ita"]  # alpha is 0 at the start: only the ids say what fits
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    fresh = ALBEF(ToyEncoders(), **SMALL)
    assert found > 0 and torch.equal(system.queue.ids[:6], pairs.image_id)
    torch.testing.assert_close(system.queue.image[:6], image.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(system.queue.text[:6], text.detach(), atol=1e-5, rtol=1e-4)
    assert (fresh.queue.ids == -1).all()


def test_albef_replaces_and_blip2_adds() -> None:
    assert read_spec(CONFIGS / "albef.yaml").scoring.combine == "replace"
    assert read_spec(CONFIGS / "blip2.yaml").scoring.combine == "sum"
    assert not VLMo(ToyEncoders(), **SMALL).scores_pairs  # its match logit never ranks


def test_wrong_pairs_of_the_same_image_are_never_judged() -> None:
    system, pairs = ALBEF(ToyEncoders(), **SMALL), toy_pairs(3, captions=2)
    asked: list[tuple[Tensor, Tensor]] = []

    def score_pairs(images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> Tensor:
        asked.append((images[0][:, 0, 0], texts[0][:, 0, 0]))
        return images[0][:, 0, 0]

    system.score_pairs = score_pairs  # type: ignore[method-assign]
    names = pairs.image_id.float()[:, None, None].expand(6, 1, 1)
    for _ in range(20):
        system.matching((names,), (names,), torch.zeros(6, 6), pairs.image_id)
    for image, text in asked:
        assert torch.equal(image[:6], text[:6]) and (image[6:] != text[6:]).all()


# VLMo.


def test_a_text_alone_meets_no_image_expert() -> None:
    torch.manual_seed(0)
    system, pairs = VLMo(ToyEncoders(), **SMALL).eval(), toy_pairs(4)
    with torch.no_grad():
        text, image = system.embed_texts(pairs.texts), system.embed_images(pairs.images)
        for name, p in system.named_parameters():
            if ".image." in name or ".both." in name or name == "first.image":
                p.add_(torch.randn_like(p))
        assert torch.equal(system.embed_texts(pairs.texts), text)
        assert not torch.allclose(system.embed_images(pairs.images), image)


def test_a_joint_sequence_is_routed_by_modality_below_and_to_one_expert_on_top() -> None:
    torch.manual_seed(0)
    system = VLMo(ToyEncoders(), layers=2, **SMALL).eval()
    below, top = system.layers
    x = torch.randn(3, 7, 16)
    for layer in (below, top):
        y = layer.attention_norm(x)
        attended = x + layer.attention_scale * layer.attention(y, *layer.attention.project(y))
        found = layer(x, None, "both", 4)
        if layer is below:
            expected = torch.cat([layer.text(attended[:, :4]), layer.image(attended[:, 4:])], 1)
        else:
            expected = layer.both(attended)
        torch.testing.assert_close(found, expected)


def test_the_text_stage_leaves_attention_and_image_expert_alone() -> None:
    from unimodal.stages import rates

    system = VLMo(ToyEncoders(), **SMALL)
    factors = rates(system, read_spec(CONFIGS / "vlmo.yaml").stages["text"].trainable)
    trained = {name for name, factor in factors.items() if factor}
    assert trained and not any("attention" in name or "image" in name or "both" in name for name in trained)


# BLIP-2.


def test_captions_do_not_see_what_comes() -> None:
    torch.manual_seed(0)
    system, pairs = BLIP2(ToyEncoders(), **SMALL).eval(), toy_pairs(3)
    memory = system.image_state(pairs.images)[0]
    ids = torch.tensor([[START, 7, 8, 9, END]] * 3)
    other = ids.clone()
    other[:, 3:] = 11
    with torch.no_grad():
        first, second = (system.bridge.caption("image", row, memory) for row in (ids, other))
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3:], second[:, 3:])


def test_captions_from_the_cache_of_the_contrast_pass_are_the_same() -> None:
    torch.manual_seed(0)
    system, pairs = BLIP2(ToyEncoders(), **SMALL).eval(), toy_pairs(3)
    memory, cache = system.image_state(pairs.images)[0], KeyValues()
    with torch.no_grad():
        system.bridge.read("image", memory, cache=cache)
        torch.testing.assert_close(
            system.bridge.caption("image", pairs.texts.ids, cache=cache),
            system.bridge.caption("image", pairs.texts.ids, memory),
        )


def test_contrast_takes_the_best_query_and_matching_the_mean() -> None:
    torch.manual_seed(0)
    system, pairs = BLIP2(ToyEncoders(), queries=3, **SMALL).eval(), toy_pairs(4)
    with torch.no_grad():
        image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
        assert image.shape == (4, 3, 256)
        for i in range(4):
            for j in range(4):
                best = max(float(image[i, q] @ text[j]) for q in range(3))
                assert float(similarity(image, text)[i, j]) == pytest.approx(best, abs=1e-5)
        state = system.image_state(pairs.images), system.text_state(pairs.texts)
        found = system.bridge.match("image", *state[1], *state[0])
        by_query = torch.stack([system.itm_head(found[:, q])[:, 0] for q in range(3)])
        torch.testing.assert_close(system.score_pairs(*state), by_query.mean(0))
        one = BLIP2(ToyEncoders(), queries=1, **SMALL).eval()
        alone = one.embed_images(pairs.images)
        torch.testing.assert_close(
            info_nce(alone, text, pairs.image_id, scale=5.0), info_nce(alone[:, 0], text, pairs.image_id, scale=5.0)
        )


# VL-GAP.


def gap(**settings: float) -> VLGAP:
    torch.manual_seed(0)
    return VLGAP(ToyEncoders(), **SMALL, **settings)  # type: ignore[arg-type]


def test_trusting_all_and_without_softness_the_second_stage_is_the_first() -> None:
    system, pairs = gap(keep=1.0, alpha=0.0), toy_pairs(8)
    losses = []
    for stage in ("clean", "noisy"):
        torch.manual_seed(3)
        losses.append(system.losses(pairs, stage, 0.7))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value)
    assert system.acceptance == 1


def test_trust_is_the_match_and_the_mean_word() -> None:
    system, pairs = gap().eval(), toy_pairs(3)
    with torch.no_grad():
        found = system.trust(pairs.images, pairs.texts)
        image = system.image_state(pairs.images)
        logits = system._word_logits(image, pairs.texts.ids, pairs.texts.mask)
        for i in range(3):
            words = pairs.texts.ids[i][pairs.texts.mask[i]].tolist()
            logs = [float(logits[i, p].log_softmax(-1)[word]) for p, word in enumerate(words[1:])]
            assert float(found.words[i]) == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)
    torch.testing.assert_close(found.match, system.score(pairs.images, pairs.texts).sigmoid())


def test_what_is_always_wrong_is_left_out_or_written_anew() -> None:
    from toysurvey import endless

    from unimodal.survey.train import Budget, train
    from unimodal.systems import Stage

    system, pairs = gap(keep=0.5), toy_pairs(64)
    train(system, {"clean": Stage(batch_size=64, lr=3e-3)}, lambda *_: endless(pairs, 64), Budget(steps=150))
    wrong = pairs.texts.select(torch.arange(64).roll(1))
    half = torch.arange(64) < 32
    mixed = Texts(*(torch.where(half.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(pairs.texts, wrong)))
    system.start_stage("noisy")
    batch = pairs._replace(texts=mixed)
    system._trusted(batch)  # fills the buffer
    with system.teacher.acting(system):
        accepted = system._accepts(system.trust(batch.images, batch.texts))
    assert accepted[:32].float().mean() > 0.8 and accepted[32:].float().mean() < 0.2
    kept = part(*system._trusted(batch))
    rewritten = [
        (int(i), row[m].tolist()) for i, row, m in zip(kept.image_id, kept.texts.ids, kept.texts.mask) if int(i) >= 32
    ]
    false = {i: wrong.ids[i][wrong.mask[i]].tolist() for i in range(64)}
    learned = sum(words == false[i] for i, words in rewritten)
    assert learned / 32 < 0.2  # hardly a wrong caption is learned from
    assert int(system.rewritten) > 0 and 0.4 < system.acceptance <= 1
    assert system.findings() == {"acceptance": system.acceptance}


def test_the_noisy_stage_sends_the_teacher_no_gradient() -> None:
    system, pairs = gap(), toy_pairs(8)
    before = copy.deepcopy(dict(system.teacher.named_buffers()))
    loss: Tensor = sum(system.losses(pairs, "noisy", 1.0).values())  # type: ignore[assignment]
    loss.backward()
    assert all(torch.equal(b, before[name]) for name, b in system.teacher.named_buffers())
    assert all(b.grad is None for b in system.teacher.buffers())
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.1)
    system.after_step("clean")
    assert all(torch.equal(b, before[name]) for name, b in system.teacher.named_buffers())
    system.after_step("noisy")
    assert not any(torch.equal(b, before[name]) for name, b in system.teacher.named_buffers())


def test_what_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="keep: expected a share of the pairs above 0"):
        gap(keep=0.0)
    assert "inferred design, no public reference" in read_spec(CONFIGS / "vlgap.yaml").inferred
