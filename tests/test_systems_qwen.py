"""OmniBridge and the two of Qwen3-VL: pools, gates, padding, instructions, stages, and two losses against loops."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toysurvey import ToyEncoders, endless, toy_pairs

from unimodal.losses import cosent_loss, masked_info_nce, matryoshka, text_to_text_loss
from unimodal.survey.specs import read_spec
from unimodal.survey.train import Budget, train
from unimodal.systems import OmniBridge, QwenEmbedding, QwenReranker, Stage
from unimodal.systems.qwen import Reader

SMALL = {"width": 16, "heads": 2, "dropout": 0.0}
CONFIGS = Path(__file__).parent.parent / "configs/systems"


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# Losses.


def test_cosent_is_that_of_a_loop_over_pairs_of_pairs() -> None:
    cosine, rating = torch.randn(7, dtype=torch.float64).tanh(), torch.tensor([2.0, 0, 1, 1, 2, 0, 3])
    total = 0.0
    for a in range(7):
        for b in range(7):
            if rating[a] > rating[b]:
                total += math.exp(5 * float(cosine[b] - cosine[a]))
    assert float(cosent_loss(cosine, rating, scale=5.0)) == pytest.approx(math.log(1 + total), abs=1e-10)


def test_cosent_of_two_pairs_is_known_by_hand() -> None:
    assert float(cosent_loss(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), scale=20.0)) == pytest.approx(
        math.log(2)
    )
    assert float(cosent_loss(torch.tensor([0.9, 0.1]), torch.tensor([1.0, 1.0]), scale=20.0)) == 0
    right, wrong = (
        cosent_loss(torch.tensor(c), torch.tensor([1.0, 0.0]), scale=20.0) for c in ([0.9, 0.1], [0.1, 0.9])
    )
    assert float(right) < 1e-6 and float(wrong) == pytest.approx(16, abs=1e-5)
    with pytest.raises(ValueError, match=r"cosines \(2,\) and ratings \(3,\); expected \[P\] for both"):
        cosent_loss(torch.zeros(2), torch.zeros(3), scale=1.0)


@pytest.mark.parametrize("itself", [False, True])
def test_captions_of_an_image_find_each_other_as_in_a_loop(itself: bool) -> None:
    text, ids = unit(6, 4), torch.tensor([0, 1, 0, 2, 1, 0])
    terms = []
    for i in range(6):
        others = [j for j in range(6) if j != i and ids[j] == ids[i]]
        columns = [j for j in range(6) if itself or j != i]
        if others:
            log_sum = math.log(sum(math.exp(9 * float(text[i] @ text[j])) for j in columns))
            terms.append(log_sum - sum(9 * float(text[i] @ text[j]) for j in others) / len(others))
    found = text_to_text_loss(text, ids, scale=9.0, self_in_denominator=itself)
    assert float(found) == pytest.approx(sum(terms) / len(terms), abs=1e-9)


def test_one_caption_an_image_adds_nothing() -> None:
    assert float(text_to_text_loss(unit(4, 3), torch.arange(4), scale=9.0)) == 0
    with pytest.raises(ValueError, match=r"expected \[M, E\] and \[M\]"):
        text_to_text_loss(unit(4, 3), torch.arange(3), scale=9.0)


# OmniBridge.


def test_both_directions_are_summed_and_captions_counted_little() -> None:
    from unimodal.losses import info_nce

    torch.manual_seed(0)
    system, pairs = OmniBridge(ToyEncoders(), **SMALL).eval(), toy_pairs(4, captions=2)
    found = system.losses(pairs, "alignment", 0.0)
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    torch.testing.assert_close(found["itc"], 2 * info_nce(image, text, pairs.image_id, scale=system.scale()))
    torch.testing.assert_close(found["t2t"], 0.05 * text_to_text_loss(text, pairs.image_id, scale=system.scale()))


def test_the_gate_starts_at_a_half_and_at_its_ends_is_one_of_both() -> None:
    torch.manual_seed(0)
    system, pairs = OmniBridge(ToyEncoders(), **SMALL).eval(), toy_pairs(3)
    reading = system.image
    assert float(reading.gate.sigmoid()) == 0.5
    with torch.no_grad():
        states = reading.states(pairs.images.tokens, pairs.images.mask)
        bridge = system.bridge.read("image", states, pairs.images.mask)
        for gate, pool, tokens in ((50.0, reading.bridge_pool, bridge), (-50.0, reading.backbone_pool, states)):
            reading.gate.fill_(gate)
            torch.testing.assert_close(system.embed_images(pairs.images), F.normalize(pool(tokens, None), dim=-1))


def test_padding_counts_only_where_the_authors_code_is_followed() -> None:
    pairs, pad = toy_pairs(3), F.pad
    longer = ToyEncoders().read_texts(pad(pairs.texts.ids, (0, 4)), pad(pairs.texts.mask, (0, 4)))
    for masked in (True, False):
        torch.manual_seed(0)
        system = OmniBridge(ToyEncoders(), mask_pooling=masked, **SMALL).eval()
        with torch.no_grad():
            alike = torch.allclose(system.embed_texts(pairs.texts), system.embed_texts(longer), atol=1e-5)
        assert alike == masked


# Qwen3-VL-Embedding and -Reranker.


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reader_does_not_see_padding(side: str) -> None:
    torch.manual_seed(0)
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    reader = Reader(encoders, 16, 2, 2, 0.0, "find it").eval()
    extra = (3, 0) if side == "left" else (0, 3)
    tokens, mask = F.pad(pairs.texts.tokens, (0, 0, *extra), value=7.0), F.pad(pairs.texts.mask, extra)
    with torch.no_grad():
        plain = reader(reader.item("text", pairs.texts.tokens, pairs.texts.mask))
        torch.testing.assert_close(reader(reader.item("text", tokens, mask)), plain, atol=1e-5, rtol=1e-4)


def test_a_reader_sees_the_instruction_and_its_last_position_everything() -> None:
    torch.manual_seed(0)
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    reader = Reader(encoders, 16, 2, 2, 0.0, "find it").eval()
    with torch.no_grad():
        item = reader.item("text", pairs.texts.tokens, pairs.texts.mask)
        plain = reader(item)
        reader.get_buffer("instruction").mul_(-1)
        assert not torch.allclose(reader(item), plain)
        reader.get_buffer("instruction").mul_(-1)
        for place in range(3):
            other = pairs.texts.tokens.clone()
            other[:, place] = torch.randn_like(other[:, place])
            assert not torch.allclose(reader(reader.item("text", other, pairs.texts.mask)), plain)


def test_the_row_of_the_answer_is_the_difference_of_two_logits() -> None:
    torch.manual_seed(0)
    system, pairs = QwenReranker(ToyEncoders(), **SMALL).eval(), toy_pairs(5)
    yes, no = torch.randn(2, 16)
    with torch.no_grad():
        system.answer.weight.copy_((yes - no)[None])
        assert system.answer.bias is None
        state = system.image_state(pairs.images), system.text_state(pairs.texts)
        hidden = system.reader(state[1], state[0])  # the query first, then the document
        two = torch.stack([hidden @ yes, hidden @ no], 1).softmax(1)[:, 0]
        torch.testing.assert_close(system.score_pairs(*state).sigmoid(), two)
        swapped = system.answer(system.reader(state[0], state[1]))[:, 0]
        assert not torch.allclose(swapped, system.score_pairs(*state))
    assert read_spec(CONFIGS / "qwen_reranker.yaml").scoring.first == "qwen_embedding"


def test_stages_differ_by_what_is_pushed_apart() -> None:
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dims=(), **SMALL).eval(), toy_pairs(6)
    found = {stage: system.losses(pairs, stage, 0.0) for stage in ("pretrain", "finetune")}
    assert found["pretrain"].keys() == {"t2i", "i2t"} and found["finetune"].keys() == {"t2i", "i2t", "answer", "sts"}
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    for stage, within in (("pretrain", True), ("finetune", False)):

        def contrast(a: torch.Tensor, b: torch.Tensor, within: bool = within) -> torch.Tensor:
            return masked_info_nce(a, b, pairs.image_id, scale=system.scale(), within=within)

        torch.testing.assert_close(found[stage]["t2i"], system._every_form(contrast, text, image))
    assert found["pretrain"]["t2i"] > found["finetune"]["t2i"]
    named = QwenEmbedding(ToyEncoders(), dims=(), category_names=["dog", "cat", "man", "ball"], **SMALL)
    assert float(named.losses(pairs, "finetune", 0.0)["classification"]) > 0


def test_full_width_alone_is_the_base_loss() -> None:
    image, text = unit(4, 8), unit(4, 8)
    ids = torch.arange(4)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return masked_info_nce(a, b, ids, scale=5.0)

    torch.testing.assert_close(matryoshka(loss, text, image, dims=[8]), loss(text, image))


def test_a_duplicate_of_the_positive_is_no_negative() -> None:
    query = unit(3, 6)
    document = query.clone()
    document[1] = document[0]  # as near to query 0 as its own
    ids = torch.tensor([0, 0, 2])
    with_it = masked_info_nce(query, document, ids, scale=10.0)
    loop = 0.0
    for i in range(3):
        s = [float(query[i] @ document[j]) for j in range(3)]
        kept = [j for j in range(3) if j == i or (ids[j] != ids[i] and s[j] <= s[i] + 0.1)]
        loop += (math.log(sum(math.exp(10 * s[j]) for j in kept)) - 10 * s[i]) / 3
    assert float(with_it) == pytest.approx(loop, abs=1e-9)


def test_distillation_ends_in_the_average_of_before_and_after() -> None:
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dims=(), **SMALL), toy_pairs(16)
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    seen: dict[str, torch.Tensor] = {}
    ended = system.end_stage

    def end_stage(stage: str) -> None:
        seen.update({name: p.detach().clone() for name, p in system.named_parameters()})
        ended(stage)

    system.end_stage = end_stage  # type: ignore[method-assign]
    stage = Stage(batch_size=16, trainable={"*": 1.0, "reranker.*": 0.0})
    train(system, {"distil": stage}, lambda *_: endless(pairs, 16), Budget(steps=3))
    for name, p in system.named_parameters():
        if name.startswith("reranker."):
            assert torch.equal(p, before[name])
        elif name.startswith(("reader.", "projection.")):
            torch.testing.assert_close(p, (before[name] + seen[name]) / 2)
        else:
            assert torch.equal(p, seen[name])
    assert not torch.equal(seen["projection.weight"], before["projection.weight"])
