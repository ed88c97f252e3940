"""BLIP-2 and OmniBridge: what queries read, what begins a caption, and OmniBridge's losses, stages and compatibility flags."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import toy_model
from toysurvey import START, ToyEncoders, toy_pairs

from unimodal.losses import caption_loss, info_nce, matching
from unimodal.stages import rates
from unimodal.survey.score import rank
from unimodal.survey.specs import read_spec
from unimodal.systems import BLIP2, OmniBridge, Scoring, Texts

CONFIGS = Path(__file__).parent.parent / "configs/systems"
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "dropout": 0.0}


def blip2(**settings: Any) -> BLIP2:
    torch.manual_seed(0)
    return BLIP2(ToyEncoders(), **{**SMALL, "queries": 3, "dim": 8, **settings}).eval()


def omnibridge(**settings: Any) -> OmniBridge:
    torch.manual_seed(0)
    return OmniBridge(ToyEncoders(), **{**SMALL, **settings}).eval()


# BLIP-2.


def test_texts_change_nothing_that_queries_read_for_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    system, pairs = blip2(), toy_pairs(4)
    compared: list[Tensor] = []

    def contrast(image: Tensor, text: Tensor, image_id: Tensor, **settings: Any) -> Tensor:
        assert settings["label_smoothing"] == 0.1
        torch.testing.assert_close(settings["scale"], torch.tensor(1 / 0.07))
        compared.append(image)
        return info_nce(image, text, image_id, **settings)

    monkeypatch.setattr("unimodal.systems.blip2.info_nce", contrast)
    rows = torch.tensor([1, 2, 3, 0])
    for texts in (pairs.texts, pairs.texts.select(rows)):
        system.losses(pairs._replace(texts=texts), "represent", 0.0)
    assert torch.equal(*compared) and torch.equal(compared[0], system.embed_images(pairs.images))
    with torch.no_grad():  # in matching they do
        state, told = system.image_state(pairs.images), system.text_state(pairs.texts)
        other = system.text_state(pairs.texts.select(rows))
        assert not torch.allclose(
            system.bridge.match("image", *told, *state), system.bridge.match("image", *other, *state)
        )


def test_matching_judges_queries_and_no_word() -> None:
    """Queries come first in the joint sequence; a match is the mean over them, whatever their order, and over no text token."""
    system, pairs = blip2(), toy_pairs(4)
    judged: list[Tensor] = []
    system.itm_head.register_forward_pre_hook(lambda head, args: judged.append(args[0]))
    with torch.no_grad():
        first = system.score(pairs.images, pairs.texts)
        system.bridge.query_sets["image"].copy_(system.bridge.query_sets["image"][[2, 0, 1]])
        torch.testing.assert_close(system.score(pairs.images, pairs.texts), first)
        system.losses(pairs, "represent", 0.0)
    assert [tuple(x.shape) for x in judged] == [(4, 3, 16), (4, 3, 16), (12, 3, 16)]


@torch.no_grad()
@pytest.mark.parametrize("stage", ["represent", "retrieve"])
def test_only_fine_tuning_knows_which_captions_are_of_one_image(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast by plain loops, smoothed by 0.1: targets are a row's own partner, or uniform over equal ids; wrong pairs likewise."""
    system, pairs = blip2(), toy_pairs(3, captions=2)
    alike = [i // 2 if stage == "retrieve" else i for i in range(6)]
    drawn: list[list[int]] = []

    def draw(scores: Tensor, image_id: Tensor, text_image_id: Tensor) -> tuple[Tensor, Tensor]:
        drawn.extend([image_id.tolist(), text_image_id.tolist()])
        return torch.arange(6).roll(2), torch.arange(6).roll(2)

    monkeypatch.setattr(matching, "sample_hard_negatives", draw)
    found = float(system.losses(pairs, stage, 0.0)["itc"])
    assert drawn == [alike, alike]
    image, text = system.embed_images(pairs.images).double(), system.embed_texts(pairs.texts).double()
    scores = [[max(float(read @ told) for read in row) / 0.07 for told in text] for row in image]
    expected = 0.0
    for rows in (scores, list(zip(*scores))):
        for i, row in enumerate(rows):
            norm = math.log(sum(map(math.exp, row)))
            right = [row[j] for j in range(6) if alike[j] == alike[i]]
            expected -= (0.9 * (sum(right) / len(right) - norm) + 0.1 * (sum(row) / 6 - norm)) / 12
    assert found == pytest.approx(expected, rel=1e-4)


def test_captions_begin_with_a_word_of_their_own_that_is_never_written() -> None:
    system, pairs = blip2(), toy_pairs(3)
    begun: list[Tensor] = []
    caption = system.bridge.caption

    def watch(name: str, ids: Tensor, *args: Any, **settings: Any) -> Tensor:
        begun.append(ids)
        return caption(name, ids, *args, **settings)

    system.bridge.caption = watch  # type: ignore[method-assign]
    ids, mask = pairs.texts.ids, pairs.texts.mask
    with torch.no_grad():
        found = system.losses(pairs, "represent", 0.0)["itg"]
        own = system.encoders.vocab_size
        assert (ids[:, 0] == START).all() and (begun[0][:, 0] == own).all() and torch.equal(begun[0][:, 1:], ids[:, 1:])
        # From the image anew, in place of the cache of the contrast pass.
        logits = system.bridge.lm_logits(caption("image", begun[0], *system.memory(pairs.images)))
        torch.testing.assert_close(found, caption_loss(logits, ids, mask, label_smoothing=0.1))
        system.bridge.lm_bias[own] = 1e4
        assert all(word < own for row in system.write(pairs.images) for word in row)
    assert all((ids[:, 0] == own).all() for ids in begun)


def test_the_scale_of_blip2_is_not_held() -> None:
    system = blip2()
    system.scale.log.data.fill_(math.log(300))
    system.after_step("represent")
    assert system.scale().item() == pytest.approx(300)


@torch.no_grad()
def test_reranking_adds_the_match_logit_to_the_raw_cosine() -> None:
    system, pairs = blip2(), toy_pairs(7)
    found = rank(system, Scoring(k=3, combine="sum"), pairs.images, pairs.texts, pairs.image_id, pairs.image_id)
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    changed = 0
    for query in range(7):
        cosines = [max(float(read @ text[query]) for read in image[i]) for i in range(7)]
        best = sorted(range(7), key=lambda i: -cosines[i])[:3]
        one = pairs.texts.select(torch.tensor([query]))
        scores = {i: cosines[i] + float(system.score(pairs.images.select(torch.tensor([i])), one)) for i in best}
        again = sorted(best, key=lambda i: -scores[i])
        changed += again != best
        assert found.t2i_reranked is not None
        if query in best:
            assert int(found.t2i_reranked[query]) == again.index(query) + 1
        else:
            assert int(found.t2i_reranked[query]) > 3
    assert changed
    scoring = read_spec(CONFIGS / "blip2.yaml").scoring
    assert (scoring.first, scoring.combine, scoring.scale) == ("embed", "sum", 1.0)


# OmniBridge.


def loop_cross_entropy(rows: Tensor, columns: Tensor, ids: Tensor, scale: float) -> float:
    """One direction, targets uniform over equal ids."""
    total = 0.0
    for i in range(len(ids)):
        logits = [scale * float(rows[i] @ column) for column in columns]
        norm = math.log(sum(map(math.exp, logits)))
        partners = [j for j in range(len(ids)) if ids[j] == ids[i]]
        total -= sum(logits[j] - norm for j in partners) / len(partners)
    return total / len(ids)


@torch.no_grad()
@pytest.mark.parametrize("itself", [False, True])
def test_the_losses_of_omnibridge_by_plain_loops(itself: bool) -> None:
    """Both directions summed; captions of one image at 0.05, each with itself in the denominator where the authors' code is followed."""
    system, pairs = omnibridge(self_in_denominator=itself), toy_pairs(4, captions=2)
    found = system.losses(pairs, "alignment", 0.0)
    image, text = system.embed_images(pairs.images).double(), system.embed_texts(pairs.texts).double()
    scale, ids = 1 / 0.07, pairs.image_id
    both = loop_cross_entropy(image, text, ids, scale) + loop_cross_entropy(text, image, ids, scale)
    assert float(found["itc"]) == pytest.approx(both, rel=1e-4)
    together = 0.0
    for i in range(8):
        others = [j for j in range(8) if itself or j != i]
        norm = math.log(sum(math.exp(scale * float(text[i] @ text[j])) for j in others))
        together += (norm - scale * float(text[i] @ text[i ^ 1])) / 8  # the other caption is its neighbour
    assert float(found["t2t"]) == pytest.approx(0.05 * together, rel=1e-4)
    assert found.keys() == {"itc", "t2t"}


def test_with_one_caption_an_image_captions_add_nothing() -> None:
    assert float(omnibridge().losses(toy_pairs(6), "alignment", 0.0)["t2t"].detach()) == 0
    for stage in read_spec(CONFIGS / "omnibridge.yaml").stages.values():
        assert stage.captions_per_image > 1  # so that its batches hold several


def test_first_values_of_omnibridge() -> None:
    system = omnibridge(width=64, image_queries=40, text_queries=30)
    for name, count in (("image", 40), ("text", 30)):
        queries = system.bridge.query_sets[name]
        assert queries.shape == (count, 64) and queries.std().item() == pytest.approx(0.02, rel=0.05)
    for reading in (system.image, system.text):
        assert reading.gate.item() == 0 and reading.down.bias is None
    system.scale.log.data.fill_(math.log(300))
    system.after_step("alignment")
    assert system.scale().item() == pytest.approx(300)  # the authors' clamp is commented out


@torch.no_grad()
def test_fusion_by_plain_steps() -> None:
    """Each part of unit length, by its side's gate, then of unit length again."""
    system, pairs = omnibridge(), toy_pairs(3)
    system.text.gate.fill_(1.2)
    assert system.image.gate.item() == 0
    states = system.text.down(system.text.norm(pairs.texts.tokens)) * pairs.texts.mask[..., None]
    found = system.embed_texts(pairs.texts)
    for row in range(3):
        real = states[row : row + 1, pairs.texts.mask[row]]  # without padding there is nothing to mask
        read = system.text.bridge_pool(system.bridge.read("text", real), None)[0]
        seen = system.text.backbone_pool(real, None)[0]
        share = 1 / (1 + math.exp(-1.2))
        fused = share * read / read.norm() + (1 - share) * seen / seen.norm()
        torch.testing.assert_close(found[row], fused / fused.norm(), atol=1e-5, rtol=1e-4)


def test_stages_of_omnibridge_and_encoders_out_of_their_reach() -> None:
    system, pairs = omnibridge(layers=3), toy_pairs(4, captions=2)
    stages = read_spec(CONFIGS / "omnibridge.yaml").stages
    assert list(stages) == ["adaptation", "alignment"]
    factors = rates(system, stages["adaptation"].trainable)
    bridge = {name.removeprefix("bridge.") for name, factor in factors.items() if factor and name.startswith("bridge.")}
    assert bridge == {
        name
        for name, _ in system.bridge.named_parameters()
        if name.startswith("query_sets.") or ".cross_attention" in name
    }
    assert all(factor for name, factor in factors.items() if not name.startswith("bridge."))
    assert all(rates(system, stages["alignment"].trainable).values())
    backbone = system.encoders.backbone.requires_grad_(True)
    ids, mask = pairs.texts.ids, pairs.texts.mask
    seen: Tensor = backbone.image_features(pairs.images.pixels)
    batch = pairs._replace(
        images=pairs.images._replace(tokens=seen.detach()),
        texts=Texts(ids, mask, backbone.text_features(ids, mask).detach()),
    )
    sum(system.losses(batch, "alignment", 0.0).values()).backward()
    assert all(p.grad is None for p in backbone.parameters())
    ours = {id(p) for p in system.parameters()}
    assert not ours & {id(p) for p in backbone.parameters()}


@torch.no_grad()
def test_queries_take_over_from_the_caption() -> None:
    """Generation: with all places replaced nothing of the caption's embeddings is left, with none nothing of the queries."""
    model = toy_model()
    ids = torch.randint(10, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    text = model.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))  # longer than the four queries

    def change(parameter: Tensor) -> list[bool]:
        """Whether the condition stays as it was, with no place replaced, and with all."""
        before, kept = [model.generation_condition(text, p) for p in (0.0, 1.0)], parameter.clone()
        parameter.add_(torch.randn_like(parameter))
        after = [model.generation_condition(text, p) for p in (0.0, 1.0)]
        parameter.copy_(kept)
        return [torch.equal(a, b) for a, b in zip(before, after)]

    assert change(model.bridge.query_sets["generate"]) == [True, False]
    assert change(model.bridge.token_embedding.weight) == [False, True]
