"""CLIP, SigLIP and what ELIP puts on top of them: starts, clamps, losses and rules of ranking, against plain loops in double precision."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toysurvey import ToyEncoders, endless, toy_pairs

from unimodal import stages
from unimodal.survey.score import rank
from unimodal.survey.specs import Spec, read_spec
from unimodal.survey.train import Budget, train
from unimodal.systems import CLIP, ELIPB, ELIPC, ELIPS, Images, SigLIP, Stage
from unimodal.systems import elip as elip_module
from unimodal.systems.elip import Mapper

CONFIGS = Path(__file__).parent.parent / "configs/systems"
SMALL: dict[str, Any] = {"width": 48, "heads": 4, "dropout": 0.0}
PROMPTED = {"elip_c": ELIPC, "elip_s": ELIPS, "elip_b": ELIPB}


def spec_of(name: str) -> Spec:
    return read_spec(CONFIGS / f"{name}.yaml")


def small(system: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return system(ToyEncoders(), **{**SMALL, **settings}).eval()


def cosines(system: Any, pairs: Any) -> list[list[float]]:
    with torch.no_grad():
        image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts).tolist()
    vectors = image[:, None].tolist() if image.ndim == 2 else image.tolist()  # of several the best counts
    return [[max(sum(a * b for a, b in zip(v, t)) for v in several) for t in text] for several in vectors]


# CLIP and SigLIP


def test_projections_start_as_clips_do_and_have_no_bias() -> None:
    system = small(CLIP, dim=400)
    for projection in (system.image_projection, system.text_projection):
        assert projection.bias is None
        assert float(projection.weight.detach().std()) == pytest.approx(48**-0.5, rel=0.02)


def test_scales_start_where_the_papers_have_them() -> None:
    assert float(small(CLIP).scale().detach()) == pytest.approx(1 / 0.07)
    siglip = small(SigLIP)
    assert float(siglip.scale.log.detach()) == pytest.approx(math.log(10)) and float(siglip.bias.detach()) == -10
    assert siglip.bias.requires_grad and siglip.scale.log.requires_grad


@pytest.mark.parametrize(("kind", "clamped"), [(CLIP, True), (SigLIP, False)])
def test_the_scale_of_clip_is_clamped_after_the_optimizers_step(
    kind: Any, clamped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, pairs = small(kind), toy_pairs(8)
    with torch.no_grad():
        system.scale.log.fill_(math.log(99))
    monkeypatch.setattr(kind, "losses", lambda self, *_: {"up": -self.scale()})  # what only a larger scale pleases
    train(system, {"x": Stage(batch_size=8, lr=1.0)}, lambda *_: endless(pairs, 8), Budget(steps=5))
    scale = float(system.scale().detach())
    assert scale == pytest.approx(100, rel=1e-5) if clamped else scale > 200


@pytest.mark.parametrize("captions", [1, 2])
def test_the_loss_of_clip_in_closed_form(captions: int) -> None:
    """Of two pairs it is the mean of four softplus of differences; captions of the same image share the target."""
    system, pairs = small(CLIP), toy_pairs(2, captions=captions)
    # Another view in each row: of equal images, a shared target costs what the row's own does.
    views = torch.randn(pairs.images.tokens.shape, generator=torch.Generator().manual_seed(4))
    pairs = pairs._replace(images=pairs.images._replace(tokens=views))
    with torch.no_grad():
        system.scale.log.fill_(math.log(3.0))
        found = float(system.losses(pairs, "contrast", 0.0)["itc"])
    s = [[3 * cosine for cosine in row] for row in cosines(system, pairs)]
    if captions == 1:
        wrong, own = s[0][1] + s[1][0], s[0][0] + s[1][1]
        differences = [s[0][1] - s[0][0], s[1][0] - s[1][1], s[1][0] - s[0][0], s[0][1] - s[1][1]]
        assert sum(differences) == pytest.approx(2 * (wrong - own))
        expected = sum(math.log1p(math.exp(d)) for d in differences) / 4
    else:
        expected = 0.0
        for lines in (s, [list(column) for column in zip(*s)]):
            for i, line in enumerate(lines):
                same = [j for j in range(4) if pairs.image_id[j] == pairs.image_id[i]]
                assert len(same) == 2
                expected += (math.log(sum(map(math.exp, line))) - sum(line[j] for j in same) / 2) / 8
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_loss_of_siglip_by_plain_loops() -> None:
    system, pairs = small(SigLIP), toy_pairs(4, captions=2)
    with torch.no_grad():
        found = float(system.losses(pairs, "contrast", 0.0)["itc"])
    expected = 0.0
    for i, row in enumerate(cosines(system, pairs)):
        for j, cosine in enumerate(row):
            sign = 1 if pairs.image_id[i] == pairs.image_id[j] else -1
            expected += math.log1p(math.exp(-sign * (10 * cosine - 10)))
    assert found == pytest.approx(expected / 8, rel=1e-5)  # rows, not pairs


def test_layer_norms_are_float32_under_mixed_precision() -> None:
    system, pairs = small(CLIP), toy_pairs(4)
    kinds = []
    for module in system.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, inputs, output: kinds.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on
        loss = system.losses(pairs, "contrast", 0.0)["itc"]
    assert len(kinds) == 8 and set(kinds) == {(torch.float32, torch.float32)}
    assert loss.dtype == torch.float32


def test_published_numbers_name_their_prompt() -> None:
    """Captions after "a photo of" score 1 to 2 points more: a number without its prompt compares with nothing."""
    rows = spec_of("clip").published
    assert rows and all('"a photo of"' in row.setting or "captions as they are" in row.setting for row in rows)


@pytest.mark.parametrize(
    ("name", "decay"),
    [("clip", 0.2), ("siglip", 1e-4), ("elip_c", 0.2), ("elip_s", 0.2), ("albef", 0.02), ("oscar", 0.05)],
)
def test_weight_decay_is_the_published_one(name: str, decay: float) -> None:
    assert list(spec_of(name).stages.values())[-1].weight_decay == decay


# ELIP


def test_the_mapper_is_three_linear_layers_with_gelu_between() -> None:
    torch.manual_seed(0)
    mapper = Mapper(6, 5, prompts=3, hidden=200).double().eval()
    linear = [layer for layer in mapper.layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(6, 200), (200, 200), (200, 15)]
    text = F.normalize(torch.randn(4, 6, dtype=torch.float64), dim=-1)
    with torch.no_grad():
        for layer in linear:
            assert not layer.bias.any() and float(layer.weight.std()) == pytest.approx(0.02, rel=0.1)
            layer.bias.normal_()
            layer.weight.mul_(20)
        for row, found in zip(text, mapper(text)):
            x = row.tolist()
            for depth, layer in enumerate(linear):
                x = [sum(map(float.__mul__, w, x)) + b for w, b in zip(layer.weight.tolist(), layer.bias.tolist())]
                if depth < 2:
                    x = [y * 0.5 * (1 + math.erf(y / math.sqrt(2))) for y in x]
            assert found.flatten().tolist() == pytest.approx(x, rel=1e-9)  # prompt by prompt


def test_ten_prompts_and_dropout_of_elip_c_alone() -> None:
    for name, kind in PROMPTED.items():
        system = kind(ToyEncoders(), width=48, heads=4)
        assert system.mapper.prompts == 10
        assert system.mapper.dropout.p == (0.1 if name == "elip_c" else 0.0)


def test_what_is_mapped_is_the_unit_embedding_that_is_compared() -> None:
    """Of ELIP-B it is another, which has its own test."""
    for kind in (ELIPC, ELIPS):
        system, pairs = small(kind), toy_pairs(5)
        seen: list[Tensor] = []
        system.mapper.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            system.score(pairs.images, pairs.texts)
            torch.testing.assert_close(seen[0], system.embed_texts(pairs.texts))
        torch.testing.assert_close(seen[0].norm(dim=-1), torch.ones(5))


def test_prompts_have_no_position_and_stand_before_all_layers() -> None:
    tower, pairs = small(ELIPC, layers=2).image_tower, toy_pairs(3)
    prompts, order = torch.randn(3, 4, 48), torch.tensor([2, 0, 3, 1])
    inputs: list[Tensor] = []
    tower.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        plain, _ = tower(*pairs.images[:2])
        found, mask = tower(*pairs.images[:2], prompts)
        moved, _ = tower(*pairs.images[:2], prompts[:, order])
    torch.testing.assert_close(found[:, 0], moved[:, 0])
    assert not torch.allclose(found[:, 0], plain[:, 0], atol=1e-3)
    assert mask.shape == (3, 1 + 4 + 9) and mask.all()
    assert torch.equal(inputs[1][:, 1:5], prompts)
    assert torch.equal(torch.cat([inputs[1][:, :1], inputs[1][:, 5:]], 1), inputs[0])  # the rest is as without


def prompted_scores(system: Any, pairs: Any) -> list[list[float]]:
    """[image][text], each image read with the prompts of the text."""
    count = len(pairs.image_id)
    index = torch.arange(count * count)
    with torch.no_grad():
        scores = system.score(pairs.images.select(index // count), pairs.texts.select(index % count))
    return scores.view(count, count).tolist()


def test_the_training_loss_of_elip_c_by_plain_loops() -> None:
    """By the base's scale; another row of the same image is no negative."""
    system, pairs = small(ELIPC), toy_pairs(3, captions=2)
    with torch.no_grad():
        system.scale.log.fill_(math.log(40.0))
        found = float(system.losses(pairs, "elip", 0.0)["elip"])
    s, expected = prompted_scores(system, pairs), 0.0
    for j in range(6):
        others = [i for i in range(6) if pairs.image_id[i] != pairs.image_id[j]]
        assert len(others) == 4
        expected -= 40 * s[j][j] - math.log(sum(math.exp(40 * s[i][j]) for i in [j, *others]))
    assert found == pytest.approx(expected / 6, rel=1e-4)


def test_the_training_loss_of_elip_s_by_plain_loops() -> None:
    """By the base's scale and a bias of -10, whatever the base has learned; divided by rows."""
    system, pairs = small(ELIPS), toy_pairs(3, captions=2)
    with torch.no_grad():
        system.scale.log.fill_(math.log(8.0))
        system.bias.fill_(-3.0)
        found = float(system.losses(pairs, "elip", 0.0)["elip"])
    s, expected = prompted_scores(system, pairs), 0.0
    for i in range(6):
        for j in range(6):
            sign = 1 if pairs.image_id[i] == pairs.image_id[j] else -1
            expected += math.log1p(math.exp(-sign * (8 * s[i][j] - 10)))
    assert found == pytest.approx(expected / 6, rel=1e-5)


def test_elip_b_judges_each_text_with_its_image_and_one_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both images are read with the text's prompts; the wrong one is drawn by the cosines without prompts, times the scale."""
    system, pairs = small(ELIPB), toy_pairs(6)
    seen: dict[str, Any] = {}

    def draw(similarity: Tensor, image_id: Tensor) -> Tensor:
        seen["similarity"], seen["ids"] = similarity, image_id
        return torch.tensor([4, 5, 0, 1, 2, 3])

    monkeypatch.setattr(elip_module, "sample_spared_negatives", draw)
    with torch.no_grad():
        found = system.losses(pairs, "elip", 0.0)
    expected = 0.0
    with torch.no_grad():
        for j, wrong in enumerate([4, 5, 0, 1, 2, 3]):
            for i, sign in ((j, 1), (wrong, -1)):
                pair = pairs.images.select(torch.tensor([i])), pairs.texts.select(torch.tensor([j]))
                expected += math.log1p(math.exp(-sign * float(system.score(*pair)))) / 12
    assert found.keys() == {"itm"} and float(found["itm"]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(seen["ids"], pairs.image_id)
    plain = torch.tensor(cosines(system, pairs)) / 0.07
    torch.testing.assert_close(seen["similarity"], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "combine"), [("elip_c", "replace"), ("elip_s", "replace"), ("elip_b", "sum")])
def test_elip_ranks_by_its_own_rule(name: str, combine: str) -> None:
    """ELIP-B adds the match logit to the cosine without prompts, in 20 candidates; the others replace it by that with prompts."""
    spec, pairs = spec_of(name), toy_pairs(24)
    system, scoring = small(PROMPTED[name]), spec.scoring
    assert scoring.combine == combine and scoring.scale == 1.0 and scoring.first == "embed"
    assert name != "elip_b" or scoring.k == 20
    with torch.no_grad():
        system.mapper.layers[-1].weight.mul_(50)  # so that prompts matter
    found = rank(system, scoring, pairs.images, pairs.texts, pairs.image_id, pairs.image_id)
    first, again = cosines(system, pairs), prompted_scores(system, pairs)
    other = 0
    for j in range(24):
        column = [row[j] for row in first]
        candidates = sorted(range(24), key=lambda i: -column[i])[: scoring.k]
        by_rule, by_the_other = (
            sorted(candidates, key=lambda i: -(again[i][j] + added * column[i]))
            for added in ((combine == "sum"), (combine != "sum"))
        )
        if j in candidates:
            assert int(found.t2i_reranked[j]) == by_rule.index(j) + 1  # type: ignore[index]
            other += by_rule.index(j) != by_the_other.index(j)
        else:
            assert found.t2i_reranked[j] == found.t2i[j]  # type: ignore[index]
    assert other  # the rules differ here


def test_every_text_is_tried_on_every_image_and_frozen_parts_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """B x B passes of the image tower in a step, and no dropout in what the stage does not train."""
    for name in ("elip_c", "elip_s"):
        system, pairs = small(PROMPTED[name], dropout=0.5), toy_pairs(6)
        stages.freeze(system, stages.rates(system, spec_of(name).stages["elip"].trainable))
        system.train()
        stages.quiet_frozen(system)
        rows: list[int] = []
        system.image_tower.layers[0].register_forward_hook(lambda m, i, output, rows=rows: rows.append(len(output)))
        monkeypatch.setattr(system.mapper.dropout, "p", 0.0)
        first, again = (float(system.losses(pairs, "elip", 0.0)["elip"].detach()) for _ in range(2))
        assert first == again and sum(rows) == 2 * 6 * 6


def test_what_is_inferred_of_elip_says_so() -> None:
    assert "inferred design" in spec_of("elip_c").inferred
    assert "inferred design" in " ".join((elip_module.__doc__ or "").split())


# What all of them share


@pytest.mark.parametrize(
    "name", ["cca", "clip", "siglip", "elip_c", "elip_s", "elip_b", "albef", "oscar", "scan_ensemble"]
)
def test_padding_is_never_read(name: str) -> None:
    """Noise behind the last real token of an image and of a text changes no score."""
    spec, pairs = spec_of(name), toy_pairs(8)
    torch.manual_seed(0)
    settings = {key: value for key, value in SMALL.items() if key in spec.system.keywords}  # type: ignore[attr-defined]
    system = spec.system(ToyEncoders(), **settings).eval()
    system.prepare(iter([toy_pairs(64)]))
    generator = torch.Generator().manual_seed(2)
    noise = 30 * torch.randn(8, 4, 24, generator=generator)
    images = Images(torch.cat([pairs.images.tokens, noise], 1), F.pad(pairs.images.mask, (0, 4)))
    mask = F.pad(pairs.texts.mask, (0, 3))
    tokens = F.pad(pairs.texts.tokens, (0, 0, 0, 3))
    tokens[~mask] = 30 * torch.randn(int((~mask).sum()), 20, generator=generator)
    texts = pairs.texts._replace(ids=F.pad(pairs.texts.ids, (0, 3)), mask=mask, tokens=tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            system.score(images, texts), system.score(pairs.images, pairs.texts), atol=1e-5, rtol=1e-4
        )
