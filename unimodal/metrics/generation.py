"""Is the picture what was asked for? A checker that reads objects off the pixels of a drawn scene, without any model.

In the spirit of GenEval (Ghosh et al., NeurIPS 2023, arXiv:2310.11513), which asks object detectors about count, colour
and position; drawn scenes need no detector, so the score cannot share a blind spot with what it scores. The picture is
segmented against the colour of its frame, and each connected piece is laid under every template (colour, shape, size,
a pixel to either side): the one that leaves the smallest squared error names it. A row of a template may take the full
colour or its shade, whichever fits; that both occur is what makes a piece striped.

What there is to find comes as arguments, the same for both functions: `colours` and `backgrounds` (name -> RGB, 0 to
255), `shapes` (name -> coverage mask [K, K] of the shape filling its square), `sizes` (name -> extent as a fraction of
the picture) and `shade` (the rows of a "striped" object alternate between its colour and its colour times this).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import permutations, product
from typing import Any

import numpy as np

from unimodal import arguments

RELATIONS = ("left", "right", "above", "below")
LARGEST_SIDE = 1024
ATTRIBUTES = ("shape", "colour", "size", "texture")
_SEPARATE = 0.2  # RGB distance (of at most 1.73) from which a pixel is not background
_SMALLEST = 0.01  # fraction of the picture below which a piece is dirt


@dataclass(frozen=True)
class FoundObject:
    shape: str
    colour: str
    size: str
    texture: str
    centre: tuple[float, float]  # (x, y) in pixels, y downwards


@dataclass(frozen=True)
class SceneReport:
    """Each field 1.0 where right; for the four attributes, the fraction of the asked objects that have them right."""

    count: float
    shape: float
    colour: float
    size: float
    texture: float
    relation: float
    background: float

    @property
    def all_right(self) -> bool:
        return all(getattr(self, field.name) == 1.0 for field in fields(self))


def summarise(reports: Sequence[SceneReport]) -> dict[str, float]:
    """Mean of every field over the reports, and of `all_right`."""
    reports = arguments.listed(reports, "reports", "SceneReports")
    for i, report in enumerate(reports):
        if not isinstance(report, SceneReport):
            raise TypeError(arguments.refused(f"reports[{i}]", "a SceneReport", report, "check_picture gives one"))
    if not reports:
        raise ValueError("no reports to summarise: check at least one picture first")
    names = [field.name for field in fields(SceneReport)] + ["all_right"]
    return {name: float(np.mean([getattr(report, name) for report in reports])) for name in names}


def check_picture(
    picture: np.ndarray,
    scene: Any,
    *,
    colours: Mapping[str, Sequence[float]],
    backgrounds: Mapping[str, Sequence[float]],
    shapes: Mapping[str, np.ndarray],
    sizes: Mapping[str, float],
    shade: float,
) -> SceneReport:
    """Compares a picture [H, W, 3], uint8 or float in [0, 1], with the scene that was asked for.

    A scene has `objects` (each with shape, colour, size, texture), `relation` of the first to the second, `third` (how
    the third, if any, lies to both; or None) and `background` (or None if any will do). Found objects are taken for the
    asked ones in the way that makes the most right.
    """
    _check_scene(scene)
    found, background = find_objects(
        picture, colours=colours, backgrounds=backgrounds, shapes=shapes, sizes=sizes, shade=shade
    )
    asked = len(scene.objects)
    candidates = [*found[:asked], *[None] * (asked - len(found))]
    shape, colour, size, texture, relation = max((_right(scene, match) for match in permutations(candidates)), key=sum)
    return SceneReport(
        count=float(len(found) == asked),
        shape=shape,
        colour=colour,
        size=size,
        texture=texture,
        relation=relation,
        background=float(scene.background in (None, background)),
    )


def find_objects(
    picture: np.ndarray,
    *,
    colours: Mapping[str, Sequence[float]],
    backgrounds: Mapping[str, Sequence[float]],
    shapes: Mapping[str, np.ndarray],
    sizes: Mapping[str, float],
    shade: float,
) -> tuple[list[FoundObject], str]:
    """The objects in a picture, largest first, and the name of its background."""
    _check_known(colours, backgrounds, shapes, sizes)
    shade = arguments.number(shade, "shade", least=0, most=1)
    pixels = _as_float(picture)
    side = min(pixels.shape[:2])
    frame = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(frame, 0)
    pieces = _pieces(np.linalg.norm(pixels - ground, axis=-1) > _SEPARATE)
    palette = {name: np.array(rgb) / 255 for name, rgb in colours.items()}
    templates = list(_templates(shapes, sizes, side))
    coverage = np.stack([mask for _, _, mask in templates])  # [T, W, W]
    square = (coverage**2).sum(-1)  # [T, W]
    half = coverage.shape[-1] // 2
    found = []
    for piece in pieces:
        if piece.mean() < _SMALLEST:
            continue
        ys, xs = np.nonzero(piece)
        y, x = (int(v.min() + v.max() + 1) // 2 for v in (ys, xs))  # its middle
        others = np.any([other for other in pieces if other is not piece] or [np.zeros_like(piece)], 0)
        added = np.where(others[..., None], 0, pixels - ground)  # what the object adds to the background
        window = np.pad(added, ((half, half), (half, half), (0, 0)))[y : y + 2 * half, x : x + 2 * half]  # [W, W, 3]
        fits = [(*_fit(window, coverage, square, rgb, ground, shade), name) for name, rgb in palette.items()]
        _, index, texture, colour = min(fits)
        shape, size, mask = templates[index]
        ys, xs = np.nonzero(mask)
        centre = (x - half + (xs.min() + xs.max() + 1) / 2, y - half + (ys.min() + ys.max() + 1) / 2)
        found.append(FoundObject(shape, colour, size, texture, centre))
    names = {name: np.array(rgb) / 255 for name, rgb in backgrounds.items()}
    return found, min(names, key=lambda name: float(np.linalg.norm(names[name] - ground)))


def _templates(
    shapes: Mapping[str, np.ndarray], sizes: Mapping[str, float], side: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(shape, size, coverage [W, W]) of every shape in every size, in the middle of a window and around it."""
    reach = max(1, side // 32)
    extents = {size: round(fraction * side) for size, fraction in sizes.items()}
    width = 2 * (max(extents.values()) // 2 + 2 * reach)
    for (shape, mask), (size, extent) in product(shapes.items(), extents.items()):
        at = ((np.arange(4 * extent) + 0.5) * len(mask) / (4 * extent)).astype(int)
        small = mask[at][:, at].reshape(extent, 4, extent, 4).mean((1, 3))
        for y, x in product(range(-reach, reach + 1), repeat=2):
            y, x = (width - extent) // 2 + y, (width - extent) // 2 + x
            window = np.zeros((width, width))
            window[y : y + extent, x : x + extent] = small
            yield shape, size, window


def _fit(
    window: np.ndarray, coverage: np.ndarray, square: np.ndarray, rgb: np.ndarray, ground: np.ndarray, shade: float
) -> tuple[float, int, str]:
    """(error, index, texture) of the template that fits best in this colour. The error lacks a constant of the window."""
    errors = []
    for tone in (rgb, rgb * shade):
        step = tone - ground
        # sum over a row of |window - coverage step|^2, without |window|^2
        cross = np.einsum("tyx,yx->ty", coverage, window @ step)
        errors.append(square * (step @ step) - 2 * cross)
    full, dark = errors  # [T, W]
    total = np.minimum(full, dark).sum(-1)
    index = int(total.argmin())
    rows = coverage[index].sum(-1) >= 1  # rows in which there is something to see
    darker = (dark < full)[index][rows].mean()
    return float(total[index]), index, "striped" if 0.25 <= darker <= 0.75 else "solid"


def _right(scene: Any, match: Sequence[FoundObject | None]) -> list[float]:
    """Fractions right of the four attributes and of the relation, if found object k is taken for asked object k."""
    attributes = [
        float(np.mean([getattr(f, name, None) == getattr(asked, name) for f, asked in zip(match, scene.objects)]))
        for name in ATTRIBUTES
    ]
    a, b, *rest = match
    relation = _lies(a, scene.relation, b)
    if rest:  # the third stands between the two, so along one axis only
        relation = relation and all(_lies(rest[0], scene.third, other, beside=True) for other in (a, b))
    return [*attributes, float(relation)]


def _check_scene(scene: Any) -> None:
    """Raises:
    TypeError, ValueError: it is no scene as `check_picture` describes it.
    """
    objects = getattr(scene, "objects", None)
    expected = "a scene with objects, relation, third and background"
    if not isinstance(objects, list | tuple) or not all(
        hasattr(scene, name) for name in ("relation", "third", "background")
    ):
        raise TypeError(arguments.refused("scene", expected, scene))
    if len(objects) not in (2, 3):
        raise ValueError(f"scene: expected two or three objects, got {len(objects)}")
    arguments.choice(scene.relation, "scene.relation", RELATIONS)
    if len(objects) == 3:
        arguments.choice(scene.third, "scene.third", RELATIONS)


def _check_known(colours: Any, backgrounds: Any, shapes: Any, sizes: Any) -> None:
    """Raises:
    TypeError, ValueError: one of them is not what there is to find, by name.
    """
    for name, palette in (("colours", colours), ("backgrounds", backgrounds)):
        for word, rgb in _named(palette, name).items():
            values = arguments.listed(rgb, f"{name}[{word!r}]", "three numbers, red, green and blue")
            if len(values) != 3:
                raise ValueError(arguments.refused(f"{name}[{word!r}]", "three numbers, red, green and blue", rgb))
            for value in values:
                arguments.number(value, f"{name}[{word!r}]", least=0, most=255)
    for word, mask in _named(shapes, "shapes").items():
        expected = "a square mask [K, K] of numbers from 0 to 1"
        array = arguments.tensor(mask, f"shapes[{word!r}]", expected)
        if (
            array.ndim != 2
            or array.shape[0] != array.shape[1]
            or not len(array)
            or not ((array >= 0) & (array <= 1)).all()
        ):
            raise ValueError(arguments.refused(f"shapes[{word!r}]", expected, mask))
    for word, size in _named(sizes, "sizes").items():
        arguments.number(size, f"sizes[{word!r}]", above=0, most=1)


def _named(value: Any, name: str) -> dict[str, Any]:
    known = arguments.mapping(value, name)
    if not known:
        raise ValueError(f"{name}: expected at least one, got none; there is nothing to find")
    return known


def _as_float(picture: np.ndarray) -> np.ndarray:
    if not isinstance(picture, np.ndarray):
        raise TypeError(
            arguments.refused("picture", "an array [H, W, 3]", picture, "np.asarray makes one of a picture")
        )
    if picture.ndim != 3 or picture.shape[-1] != 3 or min(picture.shape[:2]) < 16:
        raise ValueError(f"a picture has shape [H, W, 3] with sides of at least 16, got {list(picture.shape)}")
    if max(picture.shape[:2]) > LARGEST_SIDE:
        raise ValueError(f"a picture has sides of at most {LARGEST_SIDE}, got {list(picture.shape)}; resize it first")
    if picture.dtype == np.uint8:
        return picture / 255.0
    if picture.dtype.kind != "f":
        raise TypeError(f"a picture is uint8, or float in [0, 1], got {picture.dtype}")
    if not (picture.min() >= 0 and picture.max() <= 1):  # so that NaN is refused too
        raise ValueError(
            f"a float picture lies in [0, 1], got {picture.min():.3g} to {picture.max():.3g}; clip it first"
        )
    return picture.astype(np.float64)


def _pieces(foreground: np.ndarray) -> list[np.ndarray]:
    """Connected pieces (eight neighbours) as masks, largest first. Each pixel takes the largest label around it."""
    labels = np.where(foreground, np.arange(1, foreground.size + 1).reshape(foreground.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        height, width = labels.shape
        around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        spread = np.where(foreground, np.max(around, 0), 0)
        if (spread == labels).all():
            break
        labels = spread
    names, counts = np.unique(labels[foreground], return_counts=True)
    return [labels == names[k] for k in np.argsort(-counts, kind="stable")]


def _lies(a: FoundObject | None, relation: str, b: FoundObject | None, beside: bool = False) -> bool:
    """Whether a is `relation` of b: mostly so, or with `beside` at all so."""
    if a is None or b is None:
        return False
    x, y = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    along, across = {"left": (-x, y), "right": (x, y), "above": (-y, x), "below": (y, x)}[relation]
    return along > 0 and (beside or along > abs(across))
