"""Attributions sum to the difference that they explain, follow their token, and find the token that decides; word
weights are what the logit loses without the word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import IMAGE_SIZE, toy_config, toy_model, toy_processor
from toyqwen import toy_qwen

from tests.test_published import clip, naflex, siglip
from unimodal import Unimodal
from unimodal.config import to_dict
from unimodal.explain import Explanation, explain, integrated_gradients, on_grid
from unimodal.model import ImageState, UnimodalModel

TEXT = "a small red circle"


def lively(kind: str = "cached") -> UnimodalModel:
    """A toy model whose logit depends on its tokens more than a fresh one's does."""
    model = toy_model(matching={"kind": kind, "hidden": 32, "layers": 1, "heads": 2})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("heads.matching", "bridge.layers")) and parameter.ndim == 2:
                parameter.mul_(4)
    return model


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["cached", "bridge"])
def test_attributions_sum_to_the_difference_of_the_logits(kind: str) -> None:
    model = lively(kind)
    result = explain(model, toy_processor(), picture(), TEXT, steps=200)
    difference = result.logit - result.blank_logit
    assert abs(difference) > 0.01
    assert result.tokens.sum() == pytest.approx(difference, rel=0.01)
    assert result.gap == pytest.approx(float(result.tokens.sum()) - difference, abs=1e-5)
    assert abs(explain(model, toy_processor(), picture(), TEXT, steps=2).gap) > abs(result.gap)


def states(model: UnimodalModel):
    processor = toy_processor()
    with torch.no_grad():
        image = model.encode_image(processor.images([Image.new("RGB", (32, 32)), picture()]))
        return image, model.encode_text(*processor.texts([TEXT]))


def test_attributions_follow_their_tokens() -> None:
    model = lively()
    image, text = states(model)
    order = torch.randperm(image.tokens.shape[1])
    moved = ImageState(image.tokens[:, order], image.mask[:, order], image.bridged)
    plain, _ = integrated_gradients(model, image, text, steps=8, batch_size=3)
    permuted, _ = integrated_gradients(model, moved, text, steps=8, batch_size=8)
    assert torch.allclose(permuted, plain[order], atol=1e-5, rtol=1e-3)


def test_an_unchanged_token_explains_nothing() -> None:
    model = lively()
    image, text = states(model)
    image.tokens[1, 5] = image.tokens[0, 5]
    tokens, _ = integrated_gradients(model, image, text, steps=8, batch_size=8)
    assert tokens[5] == 0
    assert tokens.abs().sum() > 0


def test_word_weights_are_what_the_logit_loses() -> None:
    model, processor = lively(), toy_processor()
    result = explain(model, processor, picture(), TEXT, steps=1)
    assert [word for word, _ in result.words] == TEXT.split()
    with torch.no_grad():
        image = model.encode_image(processor.images([picture()]))
        texts = [TEXT, f"a small {processor.tokenizer.unk_token} circle"]
        lengths = processor.texts(texts)[1].sum(1)
        logits = [
            float(model.match(image, model.encode_text(*processor.texts([t])), torch.tensor([0]), torch.tensor([0])))
            for t in texts
        ]
    assert lengths[0] == lengths[1]  # one word became one token
    assert result.logit == pytest.approx(logits[0], abs=1e-5)
    assert dict(result.words)["red"] == pytest.approx(logits[0] - logits[1], abs=1e-5)


def test_heatmap_lies_on_the_image_grid() -> None:
    result = explain(lively(), toy_processor(), picture(), TEXT, steps=4)
    side = result.heatmap.shape[0]
    assert result.heatmap.shape == (side, side)
    assert np.array_equal(result.heatmap.ravel(), result.tokens)
    overlay = result.overlay()
    assert overlay.size == result.image.size and overlay.mode == "RGB"


def test_class_tokens_have_no_place_on_the_grid() -> None:
    backbone = to_dict(toy_config().backbone)
    vision = {"name": "test_vit", "kwargs": {"img_size": 32}, "image_size": 32}
    model = toy_model(backbone={**backbone, "vision": vision})
    tokens = torch.arange(float(model.encode_image(torch.zeros(1, 3, 32, 32)).tokens.shape[1]))
    assert on_grid(tokens, model).flatten()[0] == model.backbone.vision.num_prefix_tokens == 1


def test_nothing_is_left_behind() -> None:
    model = lively()
    explain(model, toy_processor(), picture(), TEXT, steps=2)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "steps", "message"),
    [("", 4, "empty"), (TEXT, 0, "steps: expected 1 to 10000, got 0")],
)
def test_bad_input_is_named(text: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(lively(), toy_processor(), picture(), text, steps=steps)


ALONE: dict[str, Any] = {"matching": None, "captioning": None, "generation": None}
EMBEDDINGS: dict[str, Callable[[Path], Unimodal]] = {
    "bridged": lambda folder: Unimodal(toy_model(**ALONE), toy_processor()),
    "a vector for each query": lambda folder: Unimodal(
        toy_model(**ALONE, embedding={"dim": 16, "pool": "query"}), toy_processor()
    ),
    "clip": lambda folder: opened(clip, folder),
    "siglip": lambda folder: opened(siglip, folder),
}


def opened(build: Callable[[], Any], folder: Path) -> Unimodal:
    """A toy published model, as its authors publish it, with weights that tell pictures apart."""
    torch.manual_seed(0)
    model, processor = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Unimodal.from_pretrained(folder)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_without_a_matching_head_the_cosine_is_explained(name: str, tmp_path: Path) -> None:
    model, text = EMBEDDINGS[name](tmp_path), "a dog is red"
    result = model.explain(picture(), text, steps=200)
    cosine = float(model.similarity(model.encode([picture()]), model.encode([text])))
    assert result.score == "cosine" and result.logit == pytest.approx(cosine, abs=1e-5)
    difference = result.logit - result.blank_logit
    assert result.tokens.sum() == pytest.approx(difference, abs=0.05)  # the normalisation of a blank picture is steep
    assert result.gap == pytest.approx(float(result.tokens.sum()) - difference, abs=1e-5)
    assert result.heatmap.sum() == pytest.approx(result.tokens.sum(), abs=1e-5)  # all of it lies on the grid
    assert np.abs(result.heatmap).max() > 0 and [word for word, _ in result.words] == text.split()


def test_a_blank_place_explains_nothing_of_a_cosine() -> None:
    model, half = Unimodal(toy_model(**ALONE), toy_processor()), picture()
    half.paste((128, 128, 128), (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    heatmap = model.explain(half, TEXT, steps=4).heatmap
    side = heatmap.shape[1] // 2
    assert np.abs(heatmap[:, side:]).max() > 20 * np.abs(heatmap[:, :side]).max()  # grey is blank but for rounding


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reranker", "reads picture and words as one conversation.*explain a model that reads them apart"),
        ("embedder", "reads picture and words as one conversation.*explain a model that reads them apart"),
        ("naflex", "pictures have any size, so that pixels have no common grid; explain one of fixed resolution"),
    ],
)
def test_what_has_no_places_to_explain_is_refused(name: str, message: str, tmp_path: Path) -> None:
    if name == "naflex":
        model = opened(naflex, tmp_path)
    else:
        toy_qwen(tmp_path, name)
        model = Unimodal.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        model.explain(picture(), TEXT)


def test_a_model_that_scores_nothing_cannot_explain() -> None:
    with pytest.raises(ValueError, match="this model has no matching head"):
        explain(toy_model(matching=None, embedding=None), toy_processor(), picture(), TEXT)


def test_the_picture_holds_photograph_heat_map_and_words() -> None:
    why = Explanation(
        logit=1.0,
        blank_logit=0.0,
        tokens=np.array([1.0, -1.0]),
        heatmap=np.array([[1.0, -1.0]]),
        words=[("yes", 0.5), ("no", -0.5), *[("word", 0.0)] * 30],
        gap=0.0,
        image=Image.new("RGB", (40, 20), (0, 200, 0)),
    )
    shown = np.asarray(why.picture(side=100))
    height, width, _ = shown.shape
    assert width == 236 and height > 50 + 24 + 3 * 56  # thirty words take several lines
    assert shown[37, 62].tolist() == [0, 200, 0]  # the photograph
    left, right = shown[37, 126].astype(int), shown[37, 222].astype(int)
    assert left[0] > left[2] and right[2] > right[0]  # red for, blue against
    words = shown[74:102].reshape(-1, 3).tolist()
    assert [255, 102, 102] in words and [102, 102, 255] in words
