"""Training on published backbones whose pictures are named tensors of any size (NaFlex, Qwen3-VL): chunks, mined pictures, caches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_features import Sized, published
from test_qwen import bridged
from test_tasks import SMALL
from toyqwen import toy_qwen

import unimodal
from tests.blip2 import save_retrieval
from unimodal.backbones import move_pixels
from unimodal.config import AdapterConfig
from unimodal.data.module import PairData
from unimodal.data.negatives import write_negatives
from unimodal.search import Encoder, mine_negatives
from unimodal.tasks import ITC, ITM, Joint

FROZEN = {"*": 1.0, "backbone.model.*": 0.0}


class OneLarge(Sized):
    """Scenes of which one takes many more tokens than the others."""

    def image(self, i: int) -> Image.Image:
        return super().image(i).resize((96, 96)) if i == 3 else super().image(i)


def backbone(name: str, folder: Path) -> Any:
    """The configuration of a bridge and heads on it; BLIP-2 has its own."""
    if name == "naflex":
        return published(name, folder)[0]
    if name == "blip2":
        save_retrieval(folder / name)
        return unimodal.from_pretrained(folder / name).model.config
    toy_qwen(folder / name, "embedder")
    return bridged(folder / name)


def mined(one: Joint, folder: Path) -> dict[str, Any]:
    """Settings of data with mined captions and pictures."""
    pairs = OneLarge("train", count=8)
    encoder = Encoder(one.model, PairData(pairs).bind(one.config, one.model.backbone))
    header, rows = mine_negatives(
        encoder, pairs, num_negatives=3, top_k=6, positive_threshold=-9.0, margin=9.0, judge="cosine"
    )
    path = write_negatives(folder / "negatives.jsonl", header, rows)
    return {"negatives": str(path), "hard_texts": 2, "hard_images": 2, "false_captions": 0}


def losses(one: Joint, batch: Any) -> dict[str, float]:
    torch.manual_seed(0)
    return {name: loss.item() for name, loss in one.training_forward(batch)[0].items()}


def gradients(one: Joint, batch: Any) -> dict[str, torch.Tensor]:
    one.zero_grad()
    torch.manual_seed(0)
    torch.stack(list(one.training_forward(batch)[0].values())).sum().backward()
    return {name: weight.grad.clone() for name, weight in one.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ["qwen", "blip2"])
def test_losses_from_a_cache_are_those_without(name: str, tmp_path: Path) -> None:
    """Conversations of any length, and a tower whose last normalisation trains; BLIP-2 has no text tower to keep anything of."""
    one = Joint(backbone(name, tmp_path), {"itc": ITC(negatives=True), "itm": ITM()}, FROZEN, evaluation=SMALL)
    one.eval()
    settings = mined(one, tmp_path)
    kinds = ("image", "text") if name == "qwen" else ("image",)
    results = []
    for cache in ({}, {"feature_cache": str(tmp_path / "features"), "cached_features": kinds}):
        module = PairData(OneLarge("train", count=8), batch_size=4, **settings, **cache)
        module.bind(one.config, one.model.backbone)
        batch = next(iter(module.train_dataloader()))
        results.append(losses(one, batch))
    assert {"image_features", "negative_image_features"} <= set(batch) and "image" not in batch
    assert ("text_features" in batch) == ("image_features_mask" in batch) == (name == "qwen")
    assert results[1] == pytest.approx(results[0], rel=1e-3)


@pytest.mark.parametrize("name", ["naflex", "qwen"])
def test_chunks_and_mined_pictures(name: str, tmp_path: Path) -> None:
    """Mined pictures come in their own sizes, and chunks give the gradient of the whole batch."""
    one = Joint(backbone(name, tmp_path), {"itc": ITC(negatives=True), "itm": ITM()}, FROZEN, evaluation=SMALL)
    module = PairData(OneLarge("train", count=8), batch_size=4, **mined(one, tmp_path))
    module.bind(one.config, one.model.backbone)
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch["negative_image"], dict) and batch["negative_image_mask"].all()
    one.double().eval()  # without dropout, which chunks draw otherwise
    batch = {key: move_pixels(part, torch.device("cpu"), torch.float64) for key, part in batch.items()}
    expected = gradients(one, batch)
    one.mini_batch_size = 3
    found = gradients(one, batch)
    assert found.keys() == expected.keys() and any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    shown = {key: part.clone() for key, part in batch["negative_image"].items()}
    before = losses(one, batch)
    batch["negative_image"] = {key: part.flip(0) if part.is_floating_point() else part for key, part in shown.items()}
    assert losses(one, batch) != before  # the pictures that were mined are read


TUNED = {
    "naflex": ("backbone.model.*_proj",),
    "qwen": ("backbone.model.model.language_model.*_proj", "backbone.model.model.visual.*.qkv"),
    "blip2": ("backbone.model.*.qkv", "bridge.*.query"),
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(TUNED))
def test_recomputed_blocks_with_an_adapter_learn_the_same_to_the_last_bit(
    name: str, precision: torch.dtype, tmp_path: Path
) -> None:
    adapters = {"news": AdapterConfig(target=TUNED[name], r=4)}
    config, found = replace(backbone(name, tmp_path), adapters=adapters), []
    for settings in ({}, {"gradient_checkpointing": True}):
        one = Joint(
            config, {"itc": ITC(), "itm": ITM()}, {**FROZEN, "adapters.news": 1.0}, evaluation=SMALL, **settings
        )
        module = PairData(Sized("train", count=8), batch_size=4)
        module.bind(one.config, one.model.backbone)
        one.train()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            found.append(gradients(one, next(iter(module.train_dataloader()))))
    assert any(".news." in key and gradient.abs().sum() > 0 for key, gradient in found[0].items())
    assert found[0].keys() == found[1].keys()
    assert not [key for key, gradient in found[0].items() if not torch.equal(gradient, found[1][key])]
