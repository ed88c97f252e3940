"""What LAVIS's users write gives the numbers of our own methods."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from toy import toy_model, toy_processor

from tests.blip2 import pictures as noise
from tests.blip2 import save_captioner
from tests.test_published import saved
from unimodal import Unimodal
from unimodal.data import Scenes
from unimodal.lavis import LavisModel, load_model_and_preprocess
from unimodal.search import Calibration

TEXTS = ["a circle", "a small red square left of a star", "blue"]


@pytest.fixture(scope="module")
def ours() -> Unimodal:
    model = Unimodal(toy_model(), toy_processor())
    model.encoder.calibration = Calibration(0.5, -0.25, 2, 1, 0.1, 0.0, ((0.5, 1.0),), model.encoder.fingerprint())
    return model


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    scenes = Scenes("test", count=3)
    return [scenes.image(i) for i in range(3)]


@pytest.fixture(scope="module")
def folder(ours: Unimodal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lavis") / "model"
    ours.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path):
    return load_model_and_preprocess(name=folder, is_eval=True, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def samples(loaded, pictures: list[Image.Image]) -> dict:
    _, vis_processors, txt_processors = loaded
    images = torch.stack([vis_processors["eval"](picture) for picture in pictures])
    return {"image": images, "text_input": [txt_processors["eval"](text) for text in TEXTS]}


def test_features(loaded, ours: Unimodal, pictures: list[Image.Image], samples: dict) -> None:
    model = loaded[0]
    assert model.device == torch.device("cpu") and not model.training
    image = model.extract_features(samples, mode="image")
    assert image.image_embeds_proj[:, 0].numpy() == pytest.approx(ours.encode(pictures), abs=1e-5)
    assert image.image_embeds.shape == (3, 4, 32) and image.text_embeds is image.multimodal_embeds is None
    text = model.extract_features({"text_input": TEXTS}, mode="text")
    assert text.text_embeds_proj[:, 0, :].numpy() == pytest.approx(ours.encode(TEXTS), abs=1e-5)
    assert text.text_embeds.shape == (3, 3, 32) and text.image_embeds is text.image_embeds_proj is None
    both = model.extract_features(samples)
    pairs = [{"image": i, "text": t} for i, t in zip(pictures, TEXTS)]
    assert both.multimodal_embeds[:, 0].numpy() == pytest.approx(ours.encode(pairs), abs=1e-5)
    assert torch.equal(both.image_embeds_proj, image.image_embeds_proj)
    assert torch.allclose(both.text_embeds_proj, text.text_embeds_proj, atol=1e-6)


def test_match_heads(loaded, ours: Unimodal, pictures: list[Image.Image], samples: dict) -> None:
    model = loaded[0]
    with torch.no_grad():
        itm, itc = model(samples, match_head="itm"), model(samples, match_head="itc")
        one = model({"image": samples["image"][:1], "text_input": TEXTS[0]})
    assert itm.shape == (3, 2)
    assert itm.softmax(dim=1)[:, 1].numpy() == pytest.approx(ours.predict(list(zip(pictures, TEXTS))), abs=1e-5)
    assert torch.allclose(itc, ours.similarity(ours.encode(pictures), ours.encode(TEXTS)), atol=1e-5)
    assert one[0].softmax(0)[1].item() == pytest.approx(ours.predict((pictures[0], TEXTS[0])), abs=1e-5)


def test_captions(loaded, ours: Unimodal, pictures: list[Image.Image], samples: dict) -> None:
    model = loaded[0]
    assert model.generate({"image": samples["image"]}) == ours.caption(pictures)
    greedy = model.generate(samples, num_beams=1, max_length=7)
    assert greedy == ours.caption(pictures, num_beams=1, max_new_tokens=7)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    settings = {"use_nucleus_sampling": True, "top_p": 0.8, "temperature": 1.5}
    drawn = model.generate(samples, num_captions=2, generator=seeded(), **settings)
    source = seeded()
    options = {"num_beams": 1, "do_sample": True, "top_p": 0.8, "temperature": 1.5, "generator": source}
    first, second = ours.caption(pictures, **options), ours.caption(pictures, **options)
    assert drawn == [first[0], second[0], first[1], second[1], first[2], second[2]] and first != second


def test_a_language_model_continues_the_prompt(tmp_path: Path, loaded, samples: dict) -> None:
    save_captioner(tmp_path)
    model, vis_processors, _ = load_model_and_preprocess(tmp_path)
    shown = noise()
    image = torch.stack([vis_processors["eval"](picture) for picture in shown])
    asked = "question: what colour is the circle? answer:"
    told = model.generate({"image": image, "prompt": asked}, num_beams=1)
    assert told == model.unimodal.caption(shown, prompt=asked, num_beams=1)
    assert told != model.generate({"image": image}, num_beams=1)
    several = [asked, "a red", "the circle is"]
    assert model.generate({"image": image, "prompt": several}) == model.unimodal.caption(shown, prompt=several)
    with pytest.raises(ValueError, match="this model's captioning head takes no prompt"):
        loaded[0].generate({**samples, "prompt": asked})


def test_one_vector_per_query(pictures: list[Image.Image], samples: dict) -> None:
    many = Unimodal(
        toy_model(embedding={"dim": 16, "pool": "query"}, matching={"kind": "bridge"}, generation=None), toy_processor()
    )
    model = LavisModel(many)
    features = model.extract_features(samples)
    assert features.image_embeds_proj.numpy() == pytest.approx(many.encode(pictures), abs=1e-5)
    pairs = [{"image": i, "text": t} for i, t in zip(pictures, TEXTS)]
    assert features.multimodal_embeds.numpy() == pytest.approx(many.encode(pairs), abs=1e-5)
    best = (features.image_embeds_proj[:, None] * features.text_embeds_proj[None]).sum(-1).amax(-1)
    with torch.no_grad():
        assert torch.allclose(model(samples, match_head="itc"), best, atol=1e-6)
        itm = model(samples).softmax(1)[:, 1]
    assert itm.numpy() == pytest.approx(many.predict(list(zip(pictures, TEXTS))), abs=1e-5)


def test_refusals(loaded, folder: Path, samples: dict) -> None:
    model = loaded[0]
    with pytest.raises(ValueError, match="is_eval=False: models of this library are trained by `unimodal fit`"):
        load_model_and_preprocess(folder, is_eval=False)
    with pytest.raises(ValueError, match="model_type='base': .* is a folder, which has one model"):
        load_model_and_preprocess(folder, "base")
    with pytest.raises(FileNotFoundError, match="blip2_feature_extractor: no such folder here, and not from the Hub"):
        load_model_and_preprocess("blip2_feature_extractor")
    with pytest.raises(ValueError, match="mode: expected 'image', 'text' or 'multimodal', got 'both'"):
        model.extract_features(samples, mode="both")
    with pytest.raises(KeyError, match="samples lack 'image'; got text_input"):
        model.extract_features({"text_input": TEXTS}, mode="image")
    with pytest.raises(ValueError, match="match_head: expected 'itm' or 'itc', got 'mlm'"):
        model(samples, match_head="mlm")
    with pytest.raises(ValueError, match="3 images but 1 texts: pairs are row by row"):
        model({**samples, "text_input": "a star"})
    with pytest.raises(ValueError, match="min_length=8, repetition_penalty=1.0: captions here have neither"):
        model.generate(samples, min_length=8)
    with pytest.raises(ValueError, match="num_captions=3: a beam search gives its best caption"):
        model.generate(samples, num_captions=3)


def test_a_published_pair_without_a_bridge(tmp_path: Path, pictures: list[Image.Image]) -> None:
    for name in ("clip", "naflex"):
        saved(name, tmp_path / name)
    model, vis_processors, _ = load_model_and_preprocess(tmp_path / "clip")
    image = torch.stack([vis_processors["eval"](picture) for picture in pictures])
    features = model.extract_features({"image": image, "text_input": TEXTS})
    assert features.image_embeds.shape == (3, 17, 32) and features.text_embeds.ndim == 3
    assert features.image_embeds_proj[:, 0].numpy() == pytest.approx(model.unimodal.encode(pictures), abs=1e-5)
    with pytest.raises(ValueError, match="this model has no matching head"):
        model({"image": image, "text_input": TEXTS})
    _, vis_processors, _ = load_model_and_preprocess(tmp_path / "naflex")
    with pytest.raises(ValueError, match="this model reads pictures in their own sizes, and LAVIS's pixels have one"):
        vis_processors["eval"](pictures[0])
