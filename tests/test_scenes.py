"""Proves what the embedded scenes promise: the same from the same seed however many are asked for, splits that share no
scene and no held-out pair, captions that can be read back, and false captions that are false in one respect only."""

import re
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from unimodal.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    Scenes,
    caption_matches,
    parse_caption,
    render,
    vocabulary,
)

SPLITS = ("train", "val", "test")
CASES = [(split, objects) for split in SPLITS for objects in (2, 3)]
THINGS = (SceneObject("large", "solid", "red", "circle"), SceneObject("small", "striped", "blue", "square"))


@pytest.fixture(scope="module")
def data() -> dict[tuple[str, int], Scenes]:
    return {(split, objects): Scenes(split, count=150, objects=objects) for split, objects in CASES}


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.shape, thing.colour) for thing in scene.objects}


# The same seed.


@pytest.mark.parametrize(("split", "objects"), CASES)
def test_a_longer_split_begins_with_the_shorter(data, split: str, objects: int) -> None:
    long, short = data[split, objects], Scenes(split, count=20, objects=objects)
    assert len(short) == 20
    for i in range(20):
        assert short.scenes[i] == long.scenes[i]
        assert short.captions(i) == long.captions(i)
        assert (short.array(i) == long.array(i)).all()
        assert short.swaps(i) == long.swaps(i)
        assert [short.negatives(i, c) for c in range(5)] == [long.negatives(i, c) for c in range(5)]
        assert short.key(i) == long.key(i) == f"scenes/{split}/{i:06d}"
        assert short.image_id(i) == i
    assert short.fingerprint() != long.fingerprint() == Scenes(split, count=150, objects=objects).fingerprint()


@pytest.mark.parametrize(("split", "objects"), CASES)
def test_later_scenes_are_those_that_a_longer_split_goes_on_with(data, split: str, objects: int) -> None:
    long, short = data[split, objects], Scenes(split, count=20, objects=objects)
    later = short.later(30)
    assert len(later) == 30 and len(later.later(5)) == 5
    for i, place in enumerate(range(20, 50)):
        assert later.scenes[i] == long.scenes[place] and later.captions(i) == long.captions(place)
        assert (later.array(i) == long.array(place)).all() and later.swaps(i) == long.swaps(place)
        assert later.key(i) == long.key(place)
    assert later.later(5).scenes == long.scenes[50:55]


def test_the_stream_never_changes() -> None:
    """A data set that a checkpoint was trained on must be the same in every version."""
    assert Scenes("train", count=1).captions(0)[0] == "a little striped blue cross is over a big plain orange square."
    assert [Scenes(split, count=20).fingerprint() for split in SPLITS] == [
        "8ce01a058391c331",
        "c00e4549c971e0fc",
        "aeb26b8cedcd371c",
    ]


def test_another_seed_is_another_data_set(data) -> None:
    ours, theirs = data["val", 2], Scenes("val", count=20, seed=1)
    assert sum(ours.scenes[i] == theirs.scenes[i] for i in range(20)) == 0


def test_a_larger_picture_shows_the_same_scene(data) -> None:
    large = Scenes("val", count=5, size=64)
    assert large.scenes == data["val", 2].scenes[:5]
    assert large.image(0).size == (64, 64)


# Splits.


@pytest.mark.parametrize("objects", [2, 3])
def test_held_out_pairs_are_held_out(data, objects: int) -> None:
    for split in SPLITS:
        for scene in data[split, objects].scenes:
            for held in ("val", "test"):
                assert bool(pairs(scene) & HELD_OUT[held]) == (split == held)


def test_the_held_out_pairs_cover_every_shape_once() -> None:
    assert not HELD_OUT["train"] and not HELD_OUT["val"] & HELD_OUT["test"]
    for held in ("val", "test"):
        assert sorted(shape for shape, _ in HELD_OUT[held]) == sorted(SHAPES)


def test_training_knows_every_single_value(data) -> None:
    scenes = data["train", 2].scenes
    things = [thing for scene in scenes for thing in scene.objects]
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("texture", TEXTURES)):
        assert {getattr(thing, name) for thing in things} == set(values)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.relation for scene in scenes} == {"left", "above"}  # captions also tell it from the other side


@pytest.mark.parametrize("objects", [2, 3])
def test_no_scene_occurs_twice_in_any_split(data, objects: int) -> None:
    keys = Counter(scene.key() for split in SPLITS for scene in data[split, objects].scenes)
    assert max(keys.values()) == 1
    captions = [set(data[split, objects].captions(i)) for split in SPLITS for i in range(150)]
    assert len(set.union(*captions)) == sum(map(len, captions))  # so no caption fits two pictures


@pytest.mark.parametrize("objects", [2, 3])
def test_objects_differ_in_shape_and_colour(data, objects: int) -> None:
    for scene in data["train", objects].scenes:
        assert len({thing.shape for thing in scene.objects}) == len({t.colour for t in scene.objects}) == objects


# Captions.


@pytest.mark.parametrize(("split", "objects"), CASES)
def test_captions_are_read_back(data, split: str, objects: int) -> None:
    reader, words = data[split, objects], set(vocabulary())
    for i, scene in enumerate(reader.scenes):
        captions = reader.captions(i)
        assert len(set(captions)) == 5
        for caption in captions:
            told = parse_caption(caption)
            assert told is not None
            assert told.key() == scene.key()
            assert told.background == (scene.background if "background" in caption else None)
            assert caption_matches(caption, scene)
            assert caption_matches(caption.upper().removesuffix("."), scene)
            assert set(re.findall(r"\w+|[^\w\s]", caption)) <= words
            assert not caption_matches(caption, reader.scenes[i - 1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a large solid red circle is left of a small striped blue square. and more",
        "a large solid red circle is near a small striped blue square.",
        "a large solid red sphere is left of a small striped blue square.",
    ],
)
def test_other_texts_are_no_caption(text: str) -> None:
    assert parse_caption(text) is None
    assert not caption_matches(text, Scene(THINGS, "left", "white"))


def test_a_caption_from_the_other_side_is_the_same_scene() -> None:
    scene = Scene(THINGS, "left", "white")
    assert caption_matches("a large solid red circle is left of a small striped blue square.", scene)
    assert caption_matches("a little blue striped square is to the right of a big red plain circle.", scene)
    assert not caption_matches("a large solid red circle is right of a small striped blue square.", scene)
    told = "on a {} background, a large solid red circle is left of a small striped blue square."
    assert [caption_matches(told.format(background), scene) for background in ("white", "black")] == [True, False]


# False captions.


def differences(a: Scene, b: Scene) -> list[tuple[str, int | None]]:
    """Where two scenes differ: (field, number of the object or None)."""
    found: list[tuple[str, int | None]] = []
    for name in ("relation", "background", "third"):
        found += [(name, None)] * (getattr(a, name) != getattr(b, name))
    for i, (x, y) in enumerate(zip(a.objects, b.objects, strict=True)):
        found += [(field.name, i) for field in fields(x) if getattr(x, field.name) != getattr(y, field.name)]
    return found


@pytest.mark.parametrize(("split", "objects"), CASES)
def test_swaps_are_false_in_one_respect(data, split: str, objects: int) -> None:
    reader = data[split, objects]
    kinds: Counter[str] = Counter()
    for i, scene in enumerate(reader.scenes):
        captions = reader.captions(i)
        for swap in reader.swaps(i):
            kinds[swap.kind] += 1
            true, false = parse_caption(swap.caption), parse_caption(swap.negative)
            assert swap.caption in captions
            assert true is not None and false is not None
            assert not caption_matches(swap.negative, scene)
            kind, _, attribute = swap.kind.partition("_")
            differ = differences(true, false)
            assert {name for name, _ in differ} == {attribute or kind}
            assert len(differ) == (2 if kind == "exchange" else 1)
            if kind == "exchange":
                old, new = ([getattr(thing, attribute) for thing in s.objects] for s in (true, false))
                assert sorted(old) == sorted(new)
        assert len({swap.kind for swap in reader.swaps(i)}) == len(reader.swaps(i))
    attributes = ("colour", "shape", "size", "texture")
    everything = {f"{kind}_{attribute}" for kind in ("exchange", "change") for attribute in attributes}
    backgrounds = {"background"} if objects == 2 else set()  # captions of three objects do not name it
    assert set(kinds) == everything | {"relation"} | backgrounds


@pytest.mark.parametrize("objects", [2, 3])
def test_negatives_are_false_and_training_never_tells_what_is_held_out(data, objects: int) -> None:
    for split in SPLITS:
        reader = data[split, objects]
        for i in range(50):
            for c in range(5):
                negatives = reader.negatives(i, c)
                assert negatives
                for negative in negatives:
                    told = parse_caption(negative)
                    assert told is not None and not caption_matches(negative, reader.scenes[i])
                    assert split != "train" or not pairs(told) & (HELD_OUT["val"] | HELD_OUT["test"])


# Pictures.


@pytest.mark.parametrize("size", [32, 48, 64])
def test_pictures_show_the_scene(size: int) -> None:
    picture = render(Scene(THINGS, "left", "white"), size, np.random.default_rng(0))
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert picture[0, 0].tolist() == list(BACKGROUNDS["white"])
    columns = []
    for thing in THINGS:
        rows_columns = np.argwhere((picture == COLOURS[thing.colour]).all(-1))
        extent = np.ptp(rows_columns, axis=0) + 1
        assert 0 <= round(SIZES[thing.size] * size) - extent[1] <= 2  # a round edge is a mixture of colours
        columns.append(rows_columns[:, 1])
    assert columns[0].max() < columns[1].min()


def test_every_picture_is_different(data) -> None:
    reader = data["train", 3]
    assert len({reader.array(i).tobytes() for i in range(len(reader))}) == len(reader)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="dev"), "split 'dev' is unknown; choose one of train, val, test"),
        (dict(objects=4), "a scene has 2 or 3 objects, got objects=4"),
        (dict(size=16), "scenes need at least 32 pixels to show their objects, got size=16"),
        (dict(count=0), "count=0: a split needs at least one scene"),
        (dict(first=-1), "first=-1: a split is read from its start on, so give 0 or more"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**{"split": "train", **arguments})


def test_bad_scenes_are_named() -> None:
    with pytest.raises(ValueError, match="a scene of 16 pixels cannot show its objects; use a size of at least 32"):
        render(Scene(THINGS, "left", "white"), 16, np.random.default_rng(0))
    with pytest.raises(ValueError, match="this scene has no background .*; give it one"):
        render(Scene(THINGS, "left"), 32, np.random.default_rng(0))
