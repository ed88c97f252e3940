"""Scenes as pixels: flat colours, stripes in a darker shade, nothing touches and nothing overlaps.

All lengths are given for a picture of 32 pixels and scale with it. Sprites are drawn once at eight times the
resolution, averaged down (that is all the antialiasing) and cached.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from unimodal.data.scenes.symbols import BACKGROUNDS, COLOURS, SHAPES, SIZES, Random, Scene, SceneObject

SHADE = 0.5  # a stripe is the colour times this
_STEP = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y), y downwards


@cache
def shape_mask(shape: str, extent: int, oversample: int = 8) -> np.ndarray:
    """Coverage [extent, extent] in [0, 1] of a shape that fills its square."""
    n = extent * oversample
    axis = (np.arange(n) + 0.5) / n * 2 - 1
    x, y = np.meshgrid(axis, axis)
    r = np.hypot(x, y)
    inside = {
        "circle": r <= 1,
        "square": r >= 0,
        "triangle": np.abs(x) <= (y + 1) / 2,
        "cross": np.minimum(np.abs(x), np.abs(y)) <= 1 / 3,
        "diamond": np.abs(x) + np.abs(y) <= 1,
        "ring": (r <= 1) & (r >= 0.5),
    }[shape]
    return inside.reshape(extent, oversample, extent, oversample).mean((1, 3))


@cache
def _sprite(thing: SceneObject, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage [P, P, 1] and colour [P, 1, 3] of an object in a picture of `size` pixels."""
    extent = round(SIZES[thing.size] * size)
    colour = np.tile(np.array(COLOURS[thing.colour], np.float64), (extent, 1, 1))
    if thing.texture == "striped":
        half_period = 2 * size / 32
        colour[(np.arange(extent) // half_period) % 2 == 1] *= SHADE
    return shape_mask(thing.shape, extent)[..., None], colour


def render(scene: Scene, size: int, rng: Random) -> np.ndarray:
    """Draws the scene: uint8 [size, size, 3]. `rng` moves each object by at most 1 pixel along the relation, 2 across."""
    if size < 32:
        raise ValueError(f"a scene of {size} pixels cannot show its objects; use a size of at least 32")
    if scene.background is None:
        raise ValueError("this scene has no background (it comes from a caption that leaves it out); give it one")
    canvas = np.empty((size, size, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    along, across = _STEP[scene.relation], _STEP[scene.third] if scene.third else (0, 0)
    # Centres in quarters of the picture from its middle: the pair steps apart along the relation, the third across it.
    places = [np.subtract(along, across), -np.add(along, across), np.array(across)][: len(scene.objects)]
    for thing, place in zip(scene.objects, places):
        reach = np.where(np.array(place) == 0, 2, 1)  # room to move, in pixels of a 32-pixel picture
        jitter = np.round((np.array([rng.random(), rng.random()]) * 2 - 1) * (reach + 0.5))
        centre = (16 + 8 * place + np.clip(jitter, -reach, reach)) * size / 32
        mask, colour = _sprite(thing, size)
        left, top = np.round(centre - len(mask) / 2).astype(int)
        window = canvas[top : top + len(mask), left : left + len(mask)]
        window += mask * (colour - window)
    return np.round(canvas).astype(np.uint8)


def checker_arguments() -> dict[str, Any]:
    """What a checker of pixels must know: `check_picture(picture, scene, **checker_arguments())`."""
    return {
        "colours": COLOURS,
        "backgrounds": BACKGROUNDS,
        "shapes": {shape: shape_mask(shape, 96) for shape in SHAPES},
        "sizes": SIZES,
        "shade": SHADE,
    }
