"""The small parts of a page: pictures inside the file, numbers, marks, tables that scroll in their own box."""

import base64
import difflib
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from unimodal.report.contents import Picture

PIXEL_ART = 96  # a picture with no side longer than this many pixels is enlarged pixel by pixel
PHOTO = 256  # a larger one is reduced to this many


def image(picture: Picture, description: str, side: int = PHOTO) -> str:
    """An `<img>` that carries the picture itself: PNG where it is small, where it is a photograph a JPEG of at most `side` pixels."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        came = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise TypeError(f"a picture is a PIL image or a uint8 array [H, W, 3], not {came}")
    small = max(picture.size) <= PIXEL_ART
    picture = picture.convert("RGB")
    if not small:
        picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "PNG" if small else "JPEG", optimize=True)
    source = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    kind = ' class="pixels"' if small else ""
    return f'<img{kind} src="{source}" width="{picture.width}" height="{picture.height}" alt="{escape(description)}">'


def grid(kind: str, cards: Iterable[str]) -> str:
    content = "".join(cards)
    return f'<div class="grid {kind}">{content}</div>' if content else ""


def scrolling(label: str, rows: str, columns: int, kind: str = "results") -> str:
    """A table with `columns` columns of numbers; wider than its box, it scrolls there, by keyboard too."""
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    return f'{box}<table class="{kind}" style="--columns:{columns}">{rows}</table></div>'


def measure(value: float | None, unit: str) -> str:
    """A number, with a bar under it where it is a share."""
    if value is None:
        return "–"
    bar = f'<span class="bar"><span style="width:{value:.1%}"></span></span>' if unit == "share" else ""
    return f"{number(value, unit)}{bar}"


def number(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{round(value, 2):,g}"


def signed(score: float) -> str:
    return minus(f"{score:.3f}")


def minus(text: str) -> str:
    """A number's text with the sign that is as wide as a plus."""
    return text.replace("-", "−")


def chance(probability: float | None) -> str:
    """A match score; one that would round to nothing or to certainty says on which side of it it is."""
    if probability is None:
        return "–"
    return "<0.1%" if probability < 0.0005 else ">99.9%" if probability >= 0.9995 else f"{probability:.1%}"


def told_apart(values: Sequence[float], digits: int = 3, ends: Sequence[float] = (0,)) -> list[str]:
    """Numbers of one column: all with `digits` decimals, or with as many digits as it takes that different ones look different and that
    none is rounded to one of the `ends` of their scale."""
    texts: list[str] = []
    for style in [*(f".{n}f" for n in range(digits, digits + 4)), *(f".{n}g" for n in range(digits + 1, 18))]:
        texts = [f"{value:{style}}" for value in values]
        rounded = [text for text, value in zip(texts, values) if float(text) in ends and value not in ends]
        if not rounded and len(set(texts)) == len(set(values)):
            break
    return texts


def chances(probabilities: Sequence[float | None]) -> list[str]:
    """Match scores of one column, as `chance` writes them; with more digits where different ones would look alike."""
    texts = [chance(one) for one in probabilities]
    if len(set(texts)) == len(set(probabilities)):
        return texts
    percents = told_apart([100 * one for one in probabilities if one is not None], 1, (0, 100))
    known = iter(percents)
    return ["–" if one is None else f"{next(known)}%" for one in probabilities]


def mark(right: bool) -> str:
    """Right or wrong, by shape, colour and word."""
    word = "right" if right else "wrong"
    return f'<span class="mark {word}" role="img" aria-label="{word}">{"✓" if right else "✗"}</span>'


def count(size: int) -> str:
    if size >= 1_000_000:
        return f"{size / 1e6:.2f} M"
    return f"{size / 1e3:.1f} k" if size >= 1_000 else str(size)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join(f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if n) or "0 s"


def differing(true: str, false: str) -> tuple[str, str]:
    """Both captions, escaped, with the words that differ marked."""
    sides = true.split(), false.split()
    same = difflib.SequenceMatcher(None, *sides, autojunk=False).get_matching_blocks()
    marked = []
    for side, words in enumerate(sides):
        kept = {block[side] + i for block in same for i in range(block.size)}
        marked.append(" ".join(escape(w) if i in kept else f"<mark>{escape(w)}</mark>" for i, w in enumerate(words)))
    return marked[0], marked[1]
