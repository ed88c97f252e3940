"""Why a system of the survey matches a picture and a text: the picture that says it, what it says of systems whose reasons are known, and
the test of it. Trained systems take that test in `test_systems.py`."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_published import saved
from torch import Tensor, nn
from toy import toy_config, toy_model, toy_processor
from toysurvey import ToyEncoders, toy_pairs

from unimodal import layers
from unimodal.cli import main
from unimodal.data import Scenes
from unimodal.hub import save_checkpoint
from unimodal.survey.data import SurveyData
from unimodal.survey.encoders import SharedEncoders
from unimodal.survey.explain import deletion_test, explain, image_relevance, whole_words, word_relevance
from unimodal.survey.run import Run, configs, load_system, run_system
from unimodal.survey.specs import systems_folder
from unimodal.survey.train import Budget
from unimodal.systems import AsItComes, Encoders, Images, System, Texts

CONFIGS = configs(systems_folder(), None)
TEXT = "a big red circle"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SurveyData:
    """A few scenes, by two towers that have an embedding of their own."""
    towers = asdict(toy_config().backbone) | {"embedding": {"dim": 8, "hidden": 16}}
    folder = tmp_path_factory.mktemp("toy")
    encoders = SharedEncoders(save_checkpoint(toy_model(backbone=towers), toy_processor(), folder / "model"), grid=2)
    return SurveyData(Scenes("train", count=24), Scenes("val", count=2), encoders, folder / "cache")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Scenes("val", count=1).image(0).save(path)
    return str(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_system_is_explained_in_a_picture(
    name: str, data: SurveyData, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_system(name, CONFIGS[name], Run(data, Budget(steps=2), tmp_path), lambda line: None)
    spec, system, encoders = load_system(tmp_path / name, data.encoders)
    parts = [*system.modules(), *encoders.backbone.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts]
    found = explain(
        system, encoders, photo, TEXT, steps=256 if name.startswith("scan") else 32
    )  # SCAN's path has many kinks
    assert found.heatmap.shape == (2, 2) and np.isfinite(found.heatmap).all() and found.heatmap.any()
    assert [word for word, _ in found.words] == TEXT.split()
    weights = [weight for _, weight in found.words]
    assert all(map(math.isfinite, weights)) and any(weights)
    ids, mask = encoders.tokenise([TEXT])
    words = mask & ~torch.isin(ids, torch.tensor([encoders.start_id, encoders.end_id]))
    with torch.no_grad():  # what all words say is what is lost without them
        one = encoders.read_images(encoders.processor.images([Image.open(photo)]))
        hidden = float(system.score(one, encoders.read_texts(ids.masked_fill(words, encoders.mask_id), mask)))
    if name != "cimn":  # it keeps some nodes of its graphs and leaves others out, and no gradient tells of that jump
        assert sum(weights) == pytest.approx(found.logit - hidden, rel=0.05, abs=1e-4)
    assert all(parameter.grad is None for parameter in system.parameters())
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts]

    capsys.readouterr()
    why = tmp_path / "why.png"
    assert main(["explain", photo, TEXT, "--system", str(tmp_path / name), "--out", str(why)]) == 0
    told = capsys.readouterr().out
    assert spec.title in told and all(word in told for word in TEXT.split())
    assert "Deletion test of this system" in told and "of 2 pairs" in told
    with Image.open(why) as shown:  # photograph, heat-map, and the words below
        assert shown.width == 2 * 320 + 36 and shown.height > 320 + 24 + 28 and len(set(shown.getdata())) > 99


def test_what_a_user_gets_wrong(
    data: SurveyData, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", photo, TEXT, "--out", str(tmp_path / "why.png")]
    assert main([*words, "--system", str(tmp_path)]) == 1
    assert "holds no system that `unimodal survey` trained" in capsys.readouterr().err
    assert main([*words, "--model", data.encoders.source]) == 0
    assert "big" in capsys.readouterr().out


def test_a_class_token_has_no_place_on_a_heat_map(photo: str, tmp_path: Path) -> None:
    saved("clip", tmp_path)
    encoders = SharedEncoders(tmp_path)
    with pytest.raises(ValueError, match="AsItComes reads none of the 16 image tokens that have a place"):
        explain(AsItComes(encoders), encoders, photo, TEXT)


def one_pair() -> tuple[Images, Texts]:
    pairs, first = toy_pairs(1), torch.tensor([0])
    return pairs.images.select(first), pairs.texts.select(first)


# Images.


class Pointer(System):
    """Scores a pair by one image token alone, the fifth, along one axis."""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__(encoders)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def score_pairs(self, images: Any, texts: Any) -> Tensor:
        tokens, mask = images
        return self.scale * tokens[:, 4, 0].abs() * mask[:, 4]


def test_relevance_points_at_what_a_score_depends_on() -> None:
    system, pairs = Pointer(ToyEncoders()), toy_pairs(6)
    image, text = one_pair()
    found = image_relevance(system, image, text, torch.zeros(24))
    assert found.argmax() == 4 and found[[0, 1, 2, 3, 5, 6, 7, 8]].abs().max() == 0
    assert float(found[4]) == pytest.approx(2 * abs(float(image.tokens[0, 4, 0])), rel=1e-4)  # a straight path: exact
    test = deletion_test(system, pairs.images, pairs.texts, pairs.image_id, pairs.image_id, pairs=6)
    assert test["faster"] == 1 and test["gap"] > 0


class Blind(Pointer):
    """As `Pointer`, with a gradient that points the wrong way."""

    def score_pairs(self, images: Any, texts: Any) -> Tensor:
        tokens, mask = images
        wrong = tokens[:, 0, 0] - tokens[:, 0, 0].detach()
        return super().score_pairs((tokens.detach(), mask), texts) + 100 * wrong.abs() + wrong


def test_the_deletion_test_can_fail() -> None:
    pairs = toy_pairs(12)
    test = deletion_test(Blind(ToyEncoders()), pairs.images, pairs.texts, pairs.image_id, pairs.image_id, pairs=12)
    assert test["gap"] < 0.1
    one = toy_pairs(1)
    with pytest.raises(ValueError, match="deletion test: got 1 pair; expected at least 2, .*: rank more images"):
        deletion_test(Blind(ToyEncoders()), one.images, one.texts, one.image_id, one.image_id, pairs=12)


def test_pixels_speak_for_the_place_they_are_in() -> None:
    """Against a system that sees one corner of the pixels: the token of that corner says all, and exactly."""

    class Corner(System):
        needs_pixels = True

        def score(self, images: Any, texts: Any) -> Tensor:
            return images.pixels[:, :, :2, 4:].sum((1, 2, 3))

    system, pairs = Corner(ToyEncoders()), toy_pairs(3)
    image, text = one_pair()
    found = image_relevance(system, image, text, torch.zeros(24))
    assert image.pixels is not None
    assert found[2] == pytest.approx(float(image.pixels[0, :, :2, 4:].sum()), rel=1e-4)
    assert found[[0, 1, 3, 4, 5, 6, 7, 8]].abs().max() == 0
    rows = deletion_test(system, pairs.images, pairs.texts, pairs.image_id, pairs.image_id, pairs=3)
    assert rows["pairs"] == 3 and rows["gap"] != 0


class Looking(System):
    """Words look at image tokens by one attention layer, or by a softmax of their own; `common` is in the value of every token."""

    def __init__(self, encoders: Encoders, looks: str, *, common: float = 0.0) -> None:
        super().__init__(encoders)
        self.looks, self.common = (looks,), common
        self.attention, self.softmax = layers.Attention(24, 2), nn.Softmax(-1)

    def score_pairs(self, images: Any, texts: Any) -> Tensor:
        query = texts[2][:, :3].repeat(1, 1, 2)[..., :24]
        keys, values = self.attention.project(images[0])
        if self.looks == ("attention",):
            rows = torch.arange(len(query)) if self.common else None  # the same, said in another way
            found = self.attention(query, keys, values + self.common, None, rows)
        else:
            found = self.softmax(query @ keys.transpose(1, 2).flatten(2).mT) @ (images[0] + self.common)
        return found.sum((1, 2))


@pytest.mark.parametrize("looks", ["attention", "softmax"])
def test_gradient_times_attention_is_that_of_the_weights_themselves(
    looks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against weights that are leaves of the graph, at each point of the path: w (g - sum of w g), where it is above zero."""
    system, blank = Looking(ToyEncoders(), looks), torch.ones(24)
    image, text = one_pair()
    found = image_relevance(system, image, text, blank, steps=3)
    kept: list[Tensor] = []

    def leaf(scores: Tensor) -> Tensor:
        kept.append(scores.softmax(-1).detach().requires_grad_())
        return kept[-1]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        return leaf(q @ k.mT * 12**-0.5) @ v

    monkeypatch.setattr(layers, "attend", attend)
    monkeypatch.setattr(system.softmax, "forward", leaf)
    expected = torch.zeros(9)
    for share in (1 / 6, 3 / 6, 5 / 6):
        point = image._replace(tokens=blank + share * (image.tokens - blank))
        (gradient,) = torch.autograd.grad(system.score(point, text).sum(), kept[-1:])
        weights = kept[-1].detach()
        centred = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
        expected += (centred.sum(1) if looks == "attention" else centred)[0].clamp(min=0).sum(0) / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.min() >= 0 and found.max() > 0


@pytest.mark.parametrize("looks", ["attention", "softmax"])
def test_what_all_tokens_have_in_common_says_nothing(looks: str) -> None:
    image, text = one_pair()
    found = []
    for common in (1.0, -5.0):
        torch.manual_seed(0)
        found.append(image_relevance(Looking(ToyEncoders(), looks, common=common), image, text, torch.zeros(24)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_pattern_that_names_no_attention_is_refused() -> None:
    system = Looking(ToyEncoders(), "attention")
    system.looks = ("fusion.*",)
    with pytest.raises(ValueError, match=r"Looking.looks is \('fusion.\*',\), but scoring a pair calls no Attention"):
        image_relevance(system, *one_pair(), torch.zeros(24))


# Words.


class Reader(System):
    """Scores a pair by its words alone: the square of one number of each, looked up by itself or found in the encoder's first channel."""

    def __init__(self, encoders: Encoders, reads: Callable[["Reader", Any, Any], Tensor]) -> None:
        super().__init__(encoders)
        self.reads, self.table = reads, nn.Embedding(60, 1)

    def score_pairs(self, images: Any, texts: Any) -> Tensor:
        ids, _, tokens = texts
        return self.reads(self, ids, tokens)


def own(system: Reader, ids: Tensor, tokens: Tensor) -> Tensor:
    return system.table(ids)[..., 0].square().sum(1)


def encoder(system: Reader, ids: Tensor, tokens: Tensor) -> Tensor:
    return tokens[..., 0].square().sum(1)


def test_a_word_says_what_is_lost_without_it() -> None:
    """Exactly, where words do not depend on each other."""
    encoders = ToyEncoders()
    system = Reader(encoders, own)
    image, _ = one_pair()
    ids = torch.tensor([[1, 7, 9, 8, 2]])
    square = system.table.weight[:, 0].detach().square()
    expected = [float(square[word] - square[encoders.mask_id]) for word in (7, 9, 8)]
    text = encoders.read_texts(ids, ids > 0)
    assert word_relevance(system, encoders, image, text, [[1], [2], [3]]) == pytest.approx(expected, abs=1e-5)
    of_two = [expected[0] + expected[2], expected[1]]
    assert word_relevance(system, encoders, image, text, [[1, 3], [2]]) == pytest.approx(of_two, abs=1e-5)


@pytest.mark.parametrize(
    "reads", [own, encoder, lambda *texts: own(*texts) + encoder(*texts), lambda *texts: own(*texts) * encoder(*texts)]
)
def test_all_words_say_what_is_lost_without_them(reads: Any) -> None:
    """Whoever reads them: the frozen encoder, where each changes what the others become, the system, or both."""
    encoders = ToyEncoders()
    system = Reader(encoders, reads)
    image, _ = one_pair()
    ids = torch.tensor([[1, 7, 9, 8, 2], [1, 3, 3, 3, 2]])
    with torch.no_grad():
        whole, hidden = reads(system, ids, encoders.backbone.text_features(ids, ids > 0)).tolist()
    text = encoders.read_texts(ids[:1], ids[:1] > 0)
    found = word_relevance(system, encoders, image, text, [[1], [2], [3]], steps=64)
    assert sum(found) == pytest.approx(whole - hidden, rel=1e-2) and all(found)


def test_positions_are_no_words() -> None:
    """An embedding of places is left alone, whatever ids a text has."""

    def placed(system: Reader, ids: Tensor, tokens: Tensor) -> Tensor:
        return (system.table(torch.arange(5))[..., 0] * tokens[..., 0]).sum(1)

    encoders = ToyEncoders()
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    text = encoders.read_texts(ids, torch.ones_like(ids) > 0)
    found = word_relevance(Reader(encoders, placed), encoders, one_pair()[0], text, [[1], [2]])
    assert all(map(math.isfinite, found)) and any(found)


def test_an_encoder_without_a_table_of_words_is_refused() -> None:
    class Bytes(nn.Module):
        def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids[..., None].float()

    encoders = ToyEncoders()
    image, text = one_pair()
    encoders.backbone = Bytes()
    with pytest.raises(ValueError, match="Bytes looked up no word in an embedding"):
        word_relevance(Reader(encoders, encoder), encoders, image, text, [[1]])


def test_words_are_whole_and_as_they_are_written(data: SurveyData) -> None:
    text = "A big red circle"
    found = whole_words(data.encoders.processor.tokenizer, text, 99)
    assert [word for word, _ in found] == text.split()
    places = [place for _, several in found for place in several]
    assert places == list(range(1, len(places) + 1))  # after the start token
    assert whole_words(data.encoders.processor.tokenizer, text, 3) == found[:2]
