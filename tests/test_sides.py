"""Proves that a picture is never mirrored under a caption that names a side, however the side is written."""

import pytest
from toy import toy_processor

from unimodal.data.module import TrainingSamples
from unimodal.data.scenes import Scenes
from unimodal.data.sides import names_a_side

SIDED = (
    *("a dog on the left.", "a dog on the left", "Left, a dog", "LEFT", "the left-hand lane", "a lefthand drive", "left/right"),
    *("the leftmost of three dogs", "the rightmost, brown dog", "to its right; a cat", "a right-side door", "(right) a cat"),
    *("a right-handed batter", "a lefthander", "turns leftwards", "\u201cright\u201d", "the dog's right's", "left_hand", "the topleft dog"),
    *("right now", "clockwise", "counter-clockwise", "an anticlockwise turn", "the eastern wall", "\uff2c\uff25\uff26\uff34", "left2right"),
)  # fmt: skip
SIDELESS = (
    *("a bright day", "leftovers on a plate", "a copyright sign", "an upright piano", "a straightforward road", "a cleft rock"),
    *("a frightened cat", "the brightest star", "at least two", "a feast", "a guest in a vest", "", "Easter eggs", "links ein Hund"),
)  # fmt: skip


@pytest.mark.parametrize("caption", SIDED)
def test_words_that_name_a_side(caption: str) -> None:
    assert names_a_side(caption)


@pytest.mark.parametrize("caption", SIDELESS)
def test_words_that_name_none(caption: str) -> None:
    assert not names_a_side(caption)


class Told(Scenes):
    """Scenes under captions of one's own."""

    told, false = "a scene.", ["a bright scene."]

    def captions(self, i: int) -> list[str]:
        return [self.told]

    def negatives(self, i: int, c: int) -> list[str]:
        return self.false


@pytest.mark.parametrize(
    ("told", "false", "mirrored"),
    [
        ("a bright scene.", [], True),
        ("the left-hand circle.", [], False),
        ("a scene.", ["a circle at the left."], False),
    ],
)
def test_samples_are_mirrored_only_where_no_side_is_named(told: str, false: list[str], mirrored: bool) -> None:
    pairs = Told("train", count=24)
    pairs.told, pairs.false = told, false
    samples = TrainingSamples(pairs, toy_processor(), seed=0, mirror=True, target_size=None, cache=None)
    assert any(samples[0, i, 0]["mirrored"] for i in range(24)) == mirrored
