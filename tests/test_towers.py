"""Two towers: a second image tower beside the first, and an embedding of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import IMAGE_SIZE, toy_config, toy_model, toy_processor

from unimodal import stages
from unimodal.config import BackboneConfig, TowerEmbeddingConfig, VisionTowerConfig, from_dict
from unimodal.hub import load_checkpoint, save_checkpoint
from unimodal.model import UnimodalModel

BESIDE = VisionTowerConfig(name="test_efficientnet", stage=1, image_size=IMAGE_SIZE)


def two_eyed(beside: VisionTowerConfig | None = BESIDE, **overrides: Any) -> UnimodalModel:
    backbone = replace(toy_config().backbone, beside=beside, embedding=TowerEmbeddingConfig(dim=12, hidden=20))
    overrides = {"embedding": {"kind": "backbone", "dim": 12, "gate": False, "matryoshka": [4]}, **overrides}
    torch.manual_seed(0)
    return UnimodalModel(replace(toy_config(**overrides), backbone=backbone)).eval()


def test_channels_stand_beside_each_other_at_every_place() -> None:
    model = two_eyed()
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    found = model.backbone.image_features(pixels)
    first, second = (
        tower.forward_intermediates(pixels, indices=[stage], intermediates_only=True)[0]
        for tower, stage in ((model.backbone.vision, 1), (model.backbone.beside, 1))
    )
    assert found.shape == (2, first.shape[2] * first.shape[3], first.shape[1] + second.shape[1])
    for row in range(first.shape[2]):
        for column in range(first.shape[3]):
            expected = torch.cat([first[:, :, row, column], second[:, :, row, column]], dim=1)
            torch.testing.assert_close(found[:, row * first.shape[3] + column], expected)


def test_the_own_embedding_is_the_projected_mean() -> None:
    model = two_eyed().double().eval()
    pixels, ids = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE).double(), torch.tensor([[2, 9, 8, 3], [2, 7, 3, 0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    features, words = model.backbone.image_features(pixels), model.backbone.text_features(ids, mask)
    for row, length in ((0, 4), (1, 3)):
        mean = sum(words[row, i] for i in range(length)) / length
        projected = model.backbone.embed_text((mean / mean.norm())[None])[0]
        torch.testing.assert_close(model.text_embedding(text)[row], projected / projected.norm())
        seen = model.backbone.embed_image((sum(features[row]) / features.shape[1])[None])[0]
        torch.testing.assert_close(model.image_embedding(image)[row], seen / seen.norm())


def test_a_generalised_mean_stands_beside_the_mean() -> None:
    backbone = replace(
        toy_config().backbone, beside=BESIDE, embedding=TowerEmbeddingConfig(dim=12, hidden=20, pool="mean_gem")
    )
    config = toy_config(embedding={"kind": "backbone", "dim": 12, "gate": False})
    model = UnimodalModel(replace(config, backbone=backbone)).double().eval()
    features = model.backbone.image_features(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE).double())
    places, channels = features.shape[1:]
    for row in range(2):
        power = [
            (sum(max(float(features[row, t, c]), 1e-4) ** 3 for t in range(places)) / places) ** (1 / 3)
            for c in range(channels)
        ]
        pooled = torch.cat([sum(features[row]) / places, torch.tensor(power, dtype=torch.float64)])
        projected = model.backbone.embed_image(pooled[None])[0]
        found = model.backbone.image_embedding(features, None)[row]
        torch.testing.assert_close(found, projected / projected.norm(), atol=1e-6, rtol=1e-6)  # powers are float32


def test_an_earlier_stage_stands_beside_the_last_features() -> None:
    vision = VisionTowerConfig(name="test_efficientnet", also=-1, image_size=IMAGE_SIZE)
    model = UnimodalModel(replace(toy_config(), backbone=replace(toy_config().backbone, vision=vision))).eval()
    pixels, tower = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), model.backbone.vision
    found = model.backbone.image_features(pixels)
    last = tower.forward_features(pixels)
    (earlier,) = tower.forward_intermediates(pixels, indices=[-1], intermediates_only=True)
    expected = torch.cat([last, earlier], dim=1).flatten(2).transpose(1, 2)
    assert found.shape[-1] == tower.num_features + earlier.shape[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", ["vision", "beside"])
def test_a_stage_beside_a_stage_is_refused_by_the_configuration(part: str) -> None:
    message = f"backbone.{part}: stage is 1 and also is 1; `also` stands beside the last features, so leave stage null"
    with pytest.raises(ValueError, match=message):
        from_dict(BackboneConfig, {part: {"also": 1, "stage": 1}})


@pytest.mark.parametrize("part", ["vision", "beside"])
def test_a_stage_of_another_grid_is_refused(part: str) -> None:
    tower = VisionTowerConfig(name="test_efficientnet", also=1, image_size=IMAGE_SIZE)
    message = rf"backbone.{part}: stage 1 \(also\) leaves features \(\d+, 8, 8\) and the last ones are \(\d+, 1, 1\); expected a conv"
    with pytest.raises(ValueError, match=message):
        UnimodalModel(replace(toy_config(), backbone=replace(toy_config().backbone, **{part: tower})))


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (replace(BESIDE, stage=2), r"test_efficientnet leaves \d+ places .* need the same grid.*same stride"),
        (replace(BESIDE, image_size=64), r"of pixels \(64, .*of \(32, .*the same image_size, mean and std"),
        (replace(BESIDE, mean=(0.4, 0.5, 0.5)), r"the two see the same pixels"),
    ],
)
def test_towers_that_do_not_fit_beside_each_other_are_refused(beside: VisionTowerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_eyed(beside)


def test_both_travel_in_a_checkpoint(tmp_path: Path) -> None:
    model = two_eyed()
    save_checkpoint(model, toy_processor(), tmp_path / "model")
    again, _ = load_checkpoint(tmp_path / "model")
    assert again.config == model.config
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(
        again.image_embedding(again.encode_image(pixels)), model.image_embedding(model.encode_image(pixels))
    )


def test_what_a_bridge_learns_leaves_the_own_embedding_alone() -> None:
    model = two_eyed()
    projections = {"backbone.vision_projection.*": 1.0, "backbone.text_norm.*": 1.0}
    for trainable, untouched in (
        ({"bridge.*": 1.0, "heads.*": 1.0, **projections}, ["embedding"]),
        ({"backbone.embed_*": 1.0}, ["matching", "captioning", "generation"]),
        ({"backbone.beside.*": 1.0}, ["generation"]),
    ):
        stages.freeze(model, stages.rates(model, trainable))
        assert stages.untouched_heads(model) == untouched
    bridged = toy_model()
    stages.freeze(bridged, stages.rates(bridged, {"bridge.*": 1.0}))
    assert "embedding" not in stages.untouched_heads(bridged)


def test_a_config_without_an_own_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dim is 12, but the backbone's own embedding has no dimensions"):
        UnimodalModel(toy_config(embedding={"kind": "backbone", "dim": 12, "gate": False}))


def test_trimmed_texts_embed_and_match_alike() -> None:
    model = toy_model()
    ids = torch.tensor([[2, 9, 8, 3, 0, 0, 0], [2, 7, 3, 0, 0, 0, 0]])
    text, image = model.encode_text(ids, ids != 0), model.encode_image(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    short = text.trim()
    assert short.ids.shape == short.mask.shape == (2, 4) and short.tokens.shape[:2] == (2, 4)
    rows = torch.arange(2)
    torch.testing.assert_close(model.match(image, short, rows, rows), model.match(image, text, rows, rows))
