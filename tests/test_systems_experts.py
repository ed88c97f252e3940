"""VLMo: where its tokens go, what each stage trains, and that it ranks by its two towers alone."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toysurvey import ToyEncoders, endless, toy_pairs

from unimodal.losses import info_nce
from unimodal.stages import rates
from unimodal.survey.specs import read_spec
from unimodal.survey.train import Budget, train
from unimodal.systems import Texts, VLMo
from unimodal.systems.base import Encoders
from unimodal.systems.vlmo import LAYER_SCALE, StochasticDepth
from unimodal.systems.words import NOT_ASKED

SPEC = read_spec(Path(__file__).parent.parent / "configs/systems/vlmo.yaml")


def vlmo(**settings: Any) -> VLMo:
    torch.manual_seed(0)
    return VLMo(ToyEncoders(), **{"width": 16, "heads": 2, "dropout": 0.0, "dim": 8, **settings}).eval()


def lively(system: VLMo) -> VLMo:
    """Random weights of every kind, so that no term hides behind a zero or a small scale."""
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return system


def loop_layer(layer: Any, x: list[Tensor], kinds: list[str]) -> list[Tensor]:
    """Pre-norm shared attention, then the expert of each token's kind, one token and one head at a time."""
    normed = [layer.attention_norm(token) for token in x]
    attention, out = layer.attention, []
    heads = [slice(start, start + 8) for start in (0, 8)]
    for i, token in enumerate(x):
        read = torch.zeros(16, dtype=torch.float64)
        for head in heads:
            query = attention.query(normed[i])[head]
            weights = [math.exp(float(query @ attention.key(other)[head]) / math.sqrt(8)) for other in normed]
            values = [attention.value(other)[head] for other in normed]
            read[head] = sum((w * v for w, v in zip(weights, values)), torch.zeros(8).double()) / sum(weights)
        token = token + layer.attention_scale * attention.output(read)
        expert = getattr(layer, kinds[i])
        out.append(token + expert.scale * expert.mlp(expert.norm(token)))
    return out


@torch.no_grad()
def test_reading_is_that_of_a_loop_over_tokens() -> None:
    """A joint sequence without its padding, token by token: own experts below, that of both modalities on top."""
    system, pairs = lively(vlmo()).double(), toy_pairs(3)
    images = pairs.images._replace(tokens=pairs.images.tokens.double())
    texts = pairs.texts._replace(tokens=pairs.texts.tokens.double())
    found = system.read(images, texts)
    length = 1 + texts.mask.shape[1]
    assert not texts.mask.all()
    for row in range(3):
        words = [system.first["text"], *system.project["text"](texts.tokens[row][texts.mask[row]])]
        patches = [system.first["image"], *system.project["image"](images.tokens[row])]
        kinds = ["text"] * len(words) + ["image"] * len(patches)
        below = loop_layer(system.layers[0], words + patches, kinds)
        top = [system.norm(x) for x in loop_layer(system.layers[1], below, ["both"] * len(below))]
        torch.testing.assert_close(found[row, : len(words)], torch.stack(top[: len(words)]))
        torch.testing.assert_close(found[row, length:], torch.stack(top[len(words) :]))


@torch.no_grad()
def test_the_contrast_of_the_joint_stage_is_taken_twice() -> None:
    """Half by each side's own experts, half by the top layer's expert of both, with projections and a scale of its own."""
    system, pairs = lively(vlmo()), toy_pairs(3, captions=2)
    system.scale.log.fill_(1.0)
    system.top_scale.log.fill_(2.0)
    below, top = system.layers
    sides = {"image": (pairs.images.tokens, pairs.images.mask), "text": (pairs.texts.tokens, pairs.texts.mask)}
    own, both = {}, {}
    for side, (tokens, mask) in sides.items():
        x = torch.cat([system.first[side].expand(len(tokens), 1, -1), system.project[side](tokens)], 1)
        bias = torch.zeros(len(tokens), 1, 1, x.shape[1]).masked_fill(
            ~F.pad(mask, (1, 0), value=True)[:, None, None], -3e4
        )
        x = below(x, bias, side, 0)
        y = top.attention_norm(x)
        x = x + top.attention_scale * top.attention(y, *top.attention.project(y), bias)
        own[side], both[side] = (system.norm(expert(x))[:, 0] for expert in (getattr(top, side), top.both))
    first = info_nce(
        F.normalize(system.image_projection(own["image"]), dim=-1),
        F.normalize(system.text_projection(own["text"]), dim=-1),
        pairs.image_id,
        scale=system.scale(),
    )
    second = info_nce(
        F.normalize(system.top_image_projection(both["image"]), dim=-1),
        F.normalize(system.top_text_projection(both["text"]), dim=-1),
        pairs.image_id,
        scale=system.top_scale(),
    )
    assert abs(float(first - second)) > 1e-3
    torch.testing.assert_close(system.losses(pairs, "joint", 0.0)["itc"], (first + second) / 2)
    alone = system.losses(pairs, "retrieval", 0.0)
    assert alone.keys() == {"itc"}
    torch.testing.assert_close(alone["itc"], first)


def test_first_values_are_those_of_the_paper() -> None:
    system = vlmo()
    scales = [p for name, p in system.layers.named_parameters() if name.endswith("scale")]
    assert len(scales) == 2 + 3 * 2 - 1  # one of attention in each layer, three experts on top and two below
    assert LAYER_SCALE == 0.1 and all(torch.equal(p, torch.full((16,), 0.1)) for p in scales)
    for scale in (system.scale, system.top_scale):
        assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
        scale.log.data.fill_(math.log(300))
    system.after_step("joint")
    assert float(system.scale()) == pytest.approx(100) and float(system.top_scale()) == pytest.approx(100)
    projections = [p for name, p in system.named_children() if name.endswith("_projection")]
    assert len(projections) == 4 and all(p.bias is None for p in projections)


@torch.no_grad()
def test_stochastic_depth_leaves_out_whole_samples_of_a_branch() -> None:
    torch.manual_seed(0)
    depth, x = StochasticDepth(0.25), torch.ones(4000, 3, 2)
    out = depth(x)
    kept = out.flatten(1).amax(1) > 0
    assert 0.72 < kept.float().mean() < 0.78
    assert not out[~kept].any() and torch.allclose(out[kept], torch.tensor(4 / 3))
    assert torch.equal(depth.eval()(x), x)
    system, pairs = vlmo(dropout=1.0 - 1e-9), toy_pairs(3)  # nearly always without: tokens pass a layer as they are
    layer, tokens = system.layers[0].train(), pairs.images.tokens[..., :16]
    assert torch.equal(layer(tokens, None, "image", 0), tokens)


def part(name: str) -> str:
    """What a parameter is of: `layers.*.text` for all layers' text experts, `project.text`, `words`."""
    pieces = re.sub(r"\.\d+\.", ".*.", name).split(".")
    return ".".join(pieces[: {"layers": 3, "project": 2, "first": 2}.get(pieces[0], 1)])


ATTENTION = {"layers.*.attention", "layers.*.attention_norm", "layers.*.attention_scale"}
TOP = {"top_image_projection", "top_text_projection", "top_scale"}


def test_every_stage_trains_what_the_paper_trains() -> None:
    system = vlmo()
    trained, parts = {}, {part(name) for name, _ in system.named_parameters()}
    for stage, settings in SPEC.stages.items():
        factors = rates(system, settings.trainable)
        trained[stage] = {part(name) for name, factor in factors.items() if factor}
        assert not trained[stage] & {part(name) for name, factor in factors.items() if not factor}
    assert list(trained) == ["vision", "text", "joint", "retrieval"]
    image = {"project.image", "first.image", "layers.*.image", "norm", "restorer"}
    assert trained["vision"] == image | ATTENTION
    assert trained["text"] == {"project.text", "first.text", "layers.*.text", "words"}
    assert trained["joint"] == parts - {"restorer"}
    assert trained["retrieval"] == parts - {"restorer", "words", "itm_head", "layers.*.both"} - TOP


def test_the_text_stage_changes_texts_and_no_image() -> None:
    system, pairs = vlmo(), toy_pairs(16)
    batches = lambda *_: endless(pairs, 16)  # noqa: E731
    train(system, {"vision": SPEC.stages["vision"]}, batches, Budget(steps=3))
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    train(system, {"text": SPEC.stages["text"]}, batches, Budget(steps=3))
    assert torch.equal(system.embed_images(pairs.images), image)
    assert not torch.allclose(system.embed_texts(pairs.texts), text)


def test_words_with_the_image_count_a_quarter_and_alone_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    system, pairs = vlmo(), toy_pairs(4)

    def second_word(ids: Tensor, mask: Tensor, encoders: Encoders) -> tuple[Tensor, Tensor]:
        holes, asked = ids.clone(), torch.full_like(ids, NOT_ASKED)
        holes[:, 1], asked[:, 1] = encoders.mask_id, ids[:, 1]
        return holes, asked

    monkeypatch.setattr("unimodal.systems.vlmo.hide_words", second_word)
    holes, _ = second_word(pairs.texts.ids, pairs.texts.mask, system.encoders)
    read: Texts = system.encoders.read_texts(holes, pairs.texts.mask)
    for images, stage, weight in ((pairs.images, "joint", 0.25), (None, "text", 1.0)):
        state = system.read(images, read)[:, 2]  # after the class token and the start
        expected = F.cross_entropy(system.words.logits(state), pairs.texts.ids[:, 1])
        torch.testing.assert_close(system.losses(pairs, stage, 0.0)["mlm"], weight * expected)


def test_it_ranks_as_a_dual_encoder() -> None:
    """Its match logit judges in training alone: there is no pair score that could rank again."""
    system, pairs = vlmo(), toy_pairs(5)
    assert SPEC.scoring.first == "embed" and not system.scores_pairs
    with torch.no_grad():
        cosine = (system.embed_images(pairs.images) * system.embed_texts(pairs.texts)).sum(-1)
        torch.testing.assert_close(system.score(pairs.images, pairs.texts), cosine)
    assert {"itc", "itm", "mlm"} == system.losses(pairs, "joint", 0.0).keys()
