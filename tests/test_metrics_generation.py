"""The checker of drawn scenes finds everything right in true pictures, sharp or soft, at any size, and names the one
thing that is wrong in a picture that differs in one thing; it knows no palette but the one that it is given.
"""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from unimodal.data.scenes import Scenes, checker_arguments
from unimodal.data.scenes.drawing import render
from unimodal.data.scenes.symbols import INVERSE, false_variants
from unimodal.metrics.generation import FoundObject, SceneReport, check_picture, find_objects, summarise

KNOWN = checker_arguments()
SCENES = Scenes("test", count=120)


def soft(picture: np.ndarray, seed: int) -> np.ndarray:
    """Blurred by [0.2, 0.6, 0.2] along both axes, with Gaussian noise of 0.03: as a model draws."""
    blurred = picture / 255
    for axis in (0, 1):
        before, after = (np.roll(blurred, step, axis) for step in (1, -1))  # the frame is flat: wrapping adds nothing
        blurred = 0.2 * before + 0.6 * blurred + 0.2 * after
    noise = np.random.default_rng(seed).normal(0, 0.03, picture.shape)
    return (blurred + noise).clip(0, 1)


def wrong(report: SceneReport) -> set[str]:
    return {name for name, right in vars(report).items() if right < 1}


def test_true_pictures_are_all_right() -> None:
    for i, scene in enumerate(SCENES.scenes):
        report = check_picture(SCENES.array(i), scene, **KNOWN)
        assert report.all_right, f"scene {i}, {scene}: {report}"


@pytest.mark.parametrize(("size", "objects"), [(64, 2), (32, 3), (48, 2)])
def test_other_sizes_and_three_objects(size: int, objects: int) -> None:
    scenes = Scenes("val", size=size, objects=objects, count=24)
    for i, scene in enumerate(scenes.scenes):
        assert check_picture(scenes.array(i), scene, **KNOWN).all_right, f"scene {i}, {scene}"


def test_softness_is_not_punished() -> None:
    right = [check_picture(soft(SCENES.array(i), i), s, **KNOWN).all_right for i, s in enumerate(SCENES.scenes)]
    assert np.mean(right) >= 0.97


def test_bytes_and_floats_are_the_same_picture() -> None:
    scene, picture = SCENES.scenes[0], SCENES.array(0)
    assert check_picture(picture, scene, **KNOWN) == check_picture(picture / 255, scene, **KNOWN)
    single = (picture / 255).astype(np.float32)
    assert check_picture(single, scene, **KNOWN) == check_picture(picture, scene, **KNOWN)


def test_one_wrong_thing_is_named_and_nothing_else() -> None:
    """Exchanges and changes of every attribute, the relation, the background: what `false_variants` knows."""
    kinds = set()
    for i, scene in enumerate(SCENES.scenes[:25]):
        picture = SCENES.array(i)
        for kind, asked in false_variants(scene, random.Random(i)):
            kinds.add(kind)
            assert wrong(check_picture(picture, asked, **KNOWN)) == {kind.split("_")[-1]}, f"scene {i}, {kind}"
    attributes = ("shape", "colour", "size", "texture")
    assert kinds == {f"{how}_{a}" for how in ("exchange", "change") for a in attributes} | {"relation", "background"}


def test_a_soft_picture_with_one_wrong_thing_is_refused() -> None:
    caught = [
        kind.split("_")[-1] in wrong(check_picture(soft(SCENES.array(i), i), asked, **KNOWN))
        for i, scene in enumerate(SCENES.scenes[:12])
        for kind, asked in false_variants(scene, random.Random(i))
    ]
    assert np.mean(caught) >= 0.97


def test_pictures_of_other_scenes_are_refused() -> None:
    shifted = SCENES.scenes[1:41]
    assert not any(check_picture(SCENES.array(i), scene, **KNOWN).all_right for i, scene in enumerate(shifted))


def test_told_from_the_other_side_is_the_same_request() -> None:
    scene = SCENES.scenes[0]
    other_side = replace(scene, objects=scene.objects[::-1], relation=INVERSE[scene.relation])
    assert check_picture(SCENES.array(0), other_side, **KNOWN).all_right


def test_a_background_that_is_not_asked_for_may_be_any() -> None:
    assert check_picture(SCENES.array(0), replace(SCENES.scenes[0], background=None), **KNOWN).all_right


def test_where_the_third_object_lies_counts() -> None:
    scenes = Scenes("val", objects=3, count=8)
    for i, scene in enumerate(scenes.scenes):
        asked = replace(scene, third=INVERSE[scene.third])
        assert wrong(check_picture(scenes.array(i), asked, **KNOWN)) == {"relation"}


def test_one_object_too_many_or_too_few() -> None:
    scene = replace(Scenes("val", objects=3, count=1).scenes[0], background="grey")
    picture = render(scene, 32, random.Random(0))
    two = replace(scene, objects=scene.objects[:2], third=None)
    assert "count" in wrong(check_picture(picture, two, **KNOWN))

    pair = render(two, 32, random.Random(0))
    report = check_picture(pair, scene, **KNOWN)
    assert report.count == 0 and report.relation == 0 and report.shape == pytest.approx(2 / 3)


def test_an_empty_picture_has_nothing_but_its_background() -> None:
    scene = replace(SCENES.scenes[0], background="grey")
    report = check_picture(np.full((32, 32, 3), 160, np.uint8), scene, **KNOWN)
    assert report == SceneReport(count=0, shape=0, colour=0, size=0, texture=0, relation=0, background=1)


def test_noise_is_no_scene() -> None:
    picture = np.random.default_rng(0).random((32, 32, 3))
    assert not check_picture(picture, SCENES.scenes[0], **KNOWN).all_right


def test_found_objects_by_hand() -> None:
    """A palette, a shape and sizes that no scene of ours has: everything comes from the arguments."""
    picture = np.full((40, 40, 3), 255, np.uint8)
    picture[4:14, 6:16] = (0, 60, 0)
    picture[22:36, 20:34] = (90, 0, 90)
    picture[22:36:4, 20:34] = picture[23:36:4, 20:34] = (45, 0, 45)
    known = {
        "colours": {"moss": (0, 60, 0), "plum": (90, 0, 90)},
        "backgrounds": {"paper": (255, 255, 255), "ink": (0, 0, 0)},
        "shapes": {"block": np.ones((9, 9)), "bar": np.repeat([0.0, 1.0, 0.0], 3)[:, None] * np.ones((9, 9))},
        "sizes": {"tiny": 0.25, "big": 0.35},
        "shade": 0.5,
    }
    found, background = find_objects(picture, **known)
    assert background == "paper"
    assert found == [  # the largest first
        FoundObject(colour="plum", shape="block", size="big", texture="striped", centre=(27, 29)),
        FoundObject(colour="moss", shape="block", size="tiny", texture="solid", centre=(11, 9)),
    ]
    # 20 pixels higher and 16 to the left: that is above, and not left.
    asked = {"objects": found[::-1], "third": None, "background": "paper"}
    assert check_picture(picture, SimpleNamespace(relation="above", **asked), **known).all_right
    assert wrong(check_picture(picture, SimpleNamespace(relation="left", **asked), **known)) == {"relation"}


def test_summary_is_the_mean() -> None:
    right = SceneReport(count=1, shape=1, colour=1, size=1, texture=1, relation=1, background=1)
    half = replace(right, shape=0.5)
    assert summarise([right, half]) == {**vars(right), "shape": 0.75, "all_right": 0.5}
    with pytest.raises(ValueError, match="check at least one picture first"):
        summarise([])


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (np.zeros((32, 32), np.uint8), ValueError, r"\[H, W, 3\] with sides of at least 16, got \[32, 32\]"),
        (np.zeros((3, 32, 32), np.uint8), ValueError, r"got \[3, 32, 32\]"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"got \[8, 8, 3\]"),
        (np.zeros((32, 32, 3), np.int64), TypeError, "uint8, or float in .* got int64"),
        (np.full((32, 32, 3), 2.0), ValueError, "got 2 to 2; clip it first"),
        (np.full((32, 32, 3), np.nan), ValueError, "got nan to nan; clip it first"),
    ],
)
def test_what_is_no_picture_is_refused(picture: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_picture(picture, SCENES.scenes[0], **KNOWN)
