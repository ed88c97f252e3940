"""A result does not depend on what else is in its batch: drawn captions and pictures follow their own seed, embeddings their own item."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import IMAGE_SIZE, toy_model, toy_processor

from unimodal.draws import drawing_from, own_generators
from unimodal.inference import Unimodal

TEXTS = ["a red circle", "a small blue square left of a large green star", "a star"]
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))
    for i in range(3)
]
CAPTIONS: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 2.0, "top_p": 0.8},
    {"candidates": 5, "temperature": 3.0},
]


@pytest.fixture(scope="module")
def model() -> Unimodal:
    torch.manual_seed(0)
    return Unimodal(toy_model(), toy_processor())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alike(one: list[Image.Image], other: list[Image.Image]) -> bool:
    """Whether pictures are the same to one step of a colour, which rounding may cost."""
    steps = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(one, other, strict=True)]
    return max(steps) <= 1


def draw(model: Unimodal, prompt: Any, generator: Any, **options: Any) -> list[Image.Image]:
    return model.generate_image(prompt, num_inference_steps=2, generator=generator, **options).images


def test_a_picture_follows_its_own_seed(model: Unimodal) -> None:
    together = draw(model, TEXTS, [seeded(i) for i in range(3)])
    alone = [draw(model, text, seeded(i))[0] for i, text in enumerate(TEXTS)]
    assert alike(together, alone)
    assert alike(together[::-1], draw(model, TEXTS[::-1], [seeded(i) for i in (2, 1, 0)]))
    assert not alike(draw(model, [TEXTS[0]] * 2, seeded(0))[:1], draw(model, [TEXTS[0]] * 2, seeded(0))[1:])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pictures_of_one_seed_do_not_depend_on_the_batches(model: Unimodal, batch_size: int) -> None:
    whole = draw(model, TEXTS, seeded(3), num_images_per_prompt=2)
    assert alike(whole, draw(model, TEXTS, seeded(3), num_images_per_prompt=2, batch_size=batch_size))
    assert alike(whole[:2], draw(model, [TEXTS[0]], seeded(3), num_images_per_prompt=2))


@pytest.mark.parametrize("options", CAPTIONS, ids=str)
def test_a_drawn_caption_follows_its_own_seed(model: Unimodal, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, **options}
    together = model.caption(PICTURES, generator=[seeded(i) for i in range(3)], **options)
    assert together == [model.caption(one, generator=seeded(i), **options) for i, one in enumerate(PICTURES)]
    back = model.caption(PICTURES[::-1], generator=[seeded(i) for i in (2, 1, 0)], **options)
    assert together == back[::-1]


@pytest.mark.parametrize("options", CAPTIONS, ids=str)
def test_captions_of_one_seed_do_not_depend_on_the_batches(model: Unimodal, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, **options}
    whole = model.caption(PICTURES, generator=seeded(3), **options)
    for batch_size in (1, 2):
        assert whole == model.caption(PICTURES, generator=seeded(3), batch_size=batch_size, **options)
    assert whole[:2] == model.caption(PICTURES[:2], generator=seeded(3), **options)


def test_draws_without_a_generator_follow_torchs_own_seed(model: Unimodal) -> None:
    def write(batch_size: int) -> list[str]:
        torch.manual_seed(5)
        return list(model.caption(PICTURES, do_sample=True, max_new_tokens=6, batch_size=batch_size))

    assert write(1) == write(3)


def test_embeddings_and_greedy_captions_do_not_depend_on_the_batch(model: Unimodal) -> None:
    for items in (TEXTS, PICTURES):
        together = model.encode(items)
        for item, vector in zip(items, together):
            assert model.encode(item) == pytest.approx(vector, abs=1e-6)
    for beams in (1, 3):
        together = model.caption(PICTURES, num_beams=beams, max_new_tokens=6)
        assert together == [model.caption(one, num_beams=beams, max_new_tokens=6) for one in PICTURES]


def test_one_generator_hands_its_numbers_out_in_order() -> None:
    source = seeded(1)
    several = own_generators(source, 3)
    again = own_generators(seeded(1), 2)
    assert [one.initial_seed() for one in several[:2]] == [one.initial_seed() for one in again]
    assert len({one.initial_seed() for one in several}) == 3
    assert own_generators([seeded(1)], 1)[0].initial_seed() == several[0].initial_seed()


def test_torchs_own_state_is_left_as_it_was() -> None:
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with drawing_from(seeded(2), torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"generator": 0}, TypeError, r"generator: expected a torch.Generator, or a list of 3.*manual_seed\(0\)"),
        ({"generator": [torch.Generator()]}, ValueError, "a list of 3, one for each result, got 1 of them"),
        ({"temperature": 0.5}, ValueError, "temperature: it shapes what is drawn, and nothing is; add do_sample=True"),
        ({"top_p": 0.5, "num_beams": 1}, ValueError, "top_p: it shapes what is drawn"),
        ({"do_sample": True, "temperature": float("nan")}, ValueError, "temperature: expected a finite number above 0"),
        ({"do_sample": True, "temperature": float("inf")}, ValueError, "temperature: expected a finite number above 0"),
        ({"do_sample": True, "num_beams": 2}, ValueError, "num_beams is 2; choose one"),
        ({"do_sample": True, "top_q": 0.5}, TypeError, "no option named 'top_q'; did you mean 'top_p'"),
        ({"do_sample": 1}, TypeError, "do_sample: expected True or False, got 1"),
        ({"match_scale": float("nan")}, ValueError, "match_scale: expected a finite number, got nan"),
        ({"num_beams": True}, TypeError, "num_beams: expected a whole number, 1 to 1000, got True"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected a whole number"),
    ],
)
def test_settings_of_a_caption_are_checked(
    model: Unimodal, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.caption(PICTURES, **options)


def test_sampling_alone_draws_one_caption(model: Unimodal) -> None:
    assert isinstance(model.caption(PICTURES[0], do_sample=True, max_new_tokens=np.int64(6)), str)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"generator": 0}, TypeError, "generator: expected a torch.Generator, or a list of 2"),
        ({"generator": np.random.default_rng(0)}, TypeError, "generator: expected a torch.Generator"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "a list of 2, one for each result, got 3 of them"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: expected a finite number at least 0, got nan"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale: expected a finite number"),
        ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps: expected a whole number"),
        ({"num_inference_steps": 10**9}, ValueError, "num_inference_steps: expected 1 to 1000"),
        ({"prompt": ["a", "\ud800"]}, ValueError, "prompt 1: the text has half of a character"),
    ],
)
def test_settings_of_a_picture_are_checked(
    model: Unimodal, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.generate_image(**{"prompt": TEXTS[:2], "num_inference_steps": 1, **options})


def test_guidance_beyond_the_range_of_numbers_is_refused() -> None:
    model = Unimodal(toy_model(), toy_processor())
    torch.nn.init.ones_(model.model.head("generation").transformer.proj_out.weight)  # an untrained one predicts zero
    with pytest.raises(ValueError, match=r"guidance_scale=1e\+38: the pictures have numbers beyond torch.float32"):
        model.generate_image("a red circle", num_inference_steps=4, guidance_scale=1e38)
