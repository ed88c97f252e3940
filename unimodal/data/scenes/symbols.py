"""What a scene is, before anyone draws or describes it: objects, their attributes, a relation, a background.

Splits hold out attribute combinations, in the spirit of CLEVR-CoGenT (Johnson et al., CVPR 2017, arXiv:1612.06890):
the pairs (shape, colour) in `HELD_OUT` never occur in `train`; every `val` scene has an object with a pair held out for
`val` and none held out for `test`, and the other way round. All single values occur in `train`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLOURS = {
    "red": (220, 35, 35),
    "green": (40, 175, 65),
    "blue": (40, 80, 230),
    "yellow": (250, 220, 40),
    "orange": (250, 140, 20),
    "purple": (140, 45, 185),
    "pink": (255, 135, 195),
    "cyan": (50, 205, 225),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (160, 160, 160), "black": (12, 12, 12), "beige": (245, 225, 190)}
SIZES = {"small": 8 / 32, "large": 12 / 32}  # extent of the object as a fraction of the picture
TEXTURES = ("solid", "striped")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}

SPLITS = {"train": 6000, "val": 500, "test": 500}  # default number of scenes
# One colour per shape and split: test (circle, red), (square, green), ...; val (circle, orange), (square, purple), ...
_NAMES = tuple(COLOURS)
HELD_OUT = {
    "train": frozenset(),
    "val": frozenset((shape, _NAMES[(k + 4) % len(_NAMES)]) for k, shape in enumerate(SHAPES)),
    "test": frozenset((shape, _NAMES[k]) for k, shape in enumerate(SHAPES)),
}


class Random(Protocol):
    """Anything with `random() -> float in [0, 1)`: random.Random or numpy's Generator."""

    def random(self) -> float: ...


def pick(rng: Random, options):
    """One of the options. Only `random()` is used: its stream is the one that Python promises never to change."""
    return options[int(rng.random() * len(options))]


@dataclass(frozen=True)
class SceneObject:
    size: str
    texture: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """`objects[0]` is `relation` of `objects[1]`; `objects[2]`, if any, is `third` of both of them."""

    objects: tuple[SceneObject, ...]
    relation: str
    background: str | None = None  # None: a description that leaves it out
    third: str | None = None

    def key(self) -> tuple:
        """Equal for all descriptions of one scene, from whichever side; the background is not part of it."""
        a, b, *rest = self.objects
        if self.relation in ("left", "above"):
            return (a, b, self.relation, *rest, self.third)
        return (b, a, INVERSE[self.relation], *rest, self.third)


def sample_scene(rng: Random, split: str, objects: int) -> Scene:
    """A scene that the split allows, told from the left or from above. Its objects differ in shape and in colour."""
    while True:
        shapes, colours = list(SHAPES), list(COLOURS)
        made = []
        for _ in range(objects):
            shape, colour = pick(rng, shapes), pick(rng, colours)
            shapes.remove(shape)
            colours.remove(colour)
            made.append(SceneObject(pick(rng, list(SIZES)), pick(rng, TEXTURES), colour, shape))
        relation = pick(rng, ("left", "above"))
        across = ("above", "below") if relation == "left" else ("left", "right")
        third = pick(rng, across) if objects == 3 else None
        scene = Scene(tuple(made), relation, pick(rng, list(BACKGROUNDS)), third)
        if _allowed(scene, split):
            return scene


def names_held_out(scene: Scene, split: str) -> bool:
    """Whether some object of the scene has a (shape, colour) pair held out for this split."""
    return any((o.shape, o.colour) in HELD_OUT[split] for o in scene.objects)


def _allowed(scene: Scene, split: str) -> bool:
    return all(names_held_out(scene, held) == (held == split) for held in ("val", "test"))


def false_variants(scene: Scene, rng: Random) -> list[tuple[str, Scene]]:
    """Scenes that differ from this one in one respect, with the name of the respect.

    `exchange_*` gives two objects each other's value (what bags of words cannot see), `change_*` gives one object
    another value, one that no object has where a scene never repeats it; `relation` inverts the relation;
    `background` takes another background.
    """
    variants = [("relation", replace(scene, relation=INVERSE[scene.relation]))]
    others = [name for name in BACKGROUNDS if name != scene.background]
    variants.append(("background", replace(scene, background=pick(rng, others))))
    for attribute, values in (
        ("colour", tuple(COLOURS)),
        ("shape", SHAPES),
        ("size", tuple(SIZES)),
        ("texture", TEXTURES),
    ):
        have = [getattr(o, attribute) for o in scene.objects]
        i = int(rng.random() * len(have))
        j = (i + 1 + int(rng.random() * (len(have) - 1))) % len(have)
        if have[i] != have[j]:
            exchanged = {i: have[j], j: have[i]}
            variants.append((f"exchange_{attribute}", _with(scene, attribute, exchanged)))
        taken = have if attribute in ("colour", "shape") else [have[i]]
        value = pick(rng, [v for v in values if v not in taken])
        variants.append((f"change_{attribute}", _with(scene, attribute, {i: value})))
    return variants


def _with(scene: Scene, attribute: str, values: dict[int, str]) -> Scene:
    objects = tuple(replace(o, **{attribute: values[k]}) if k in values else o for k, o in enumerate(scene.objects))
    return replace(scene, objects=objects)
