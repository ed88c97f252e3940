"""Objects that a caption names and the picture does not show: CHAIR (Rohrbach et al. 2018, arXiv 1809.02156).

Drawn scenes are known exactly: a named object is there if some object of that colour and shape is. Of photographs the objects are those of
the noun list (`unimodal.data.nouns`) that any of the human captions names, so an object that nobody mentioned counts as invented.
"""

import re
from collections.abc import Callable, Sequence, Set

from unimodal.data.nouns import objects_in
from unimodal.data.pairs import Pairs
from unimodal.data.scenes import COLOURS, SHAPES, Scenes

_DRAWN = re.compile(rf"\b({'|'.join(COLOURS)})\s+(?:\w+\s+)?({'|'.join(SHAPES)})\b")


def drawn_objects_in(caption: str) -> set[str]:
    """`colour shape` of every object that a caption of a scene names."""
    return {f"{colour} {shape}" for colour, shape in _DRAWN.findall(caption.lower())}


def hallucination(
    captions: Sequence[str], shown: Sequence[Set[str]], named: Callable[[str], Set[str]] = objects_in
) -> dict[str, float]:
    """How much captions invent.

    Args:
        captions: one for each image.
        shown: the objects of each image.
        named: the objects that a caption names.

    Returns:
        `objects`: the share of named objects that are not there (CHAIR i), `captions`: the share of captions that name one
        (CHAIR s), both in percent; `named`: objects named in the mean of a caption, for a caption that names nothing invents nothing.

    Raises:
        ValueError: captions and images differ in number, or there are none.
    """
    if len(captions) != len(shown) or not captions:
        raise ValueError(
            f"got {len(captions)} captions and the objects of {len(shown)} images; expected one caption for each image, at least one"
        )
    found = [named(caption) for caption in captions]
    invented = [names - there for names, there in zip(found, shown)]
    total = sum(map(len, found))
    return {
        "objects": 100 * sum(map(len, invented)) / total if total else 0.0,
        "captions": 100 * sum(map(bool, invented)) / len(captions),
        "named": total / len(captions),
    }


def hallucination_on(captions: Sequence[str], pairs: Pairs) -> dict[str, float]:
    """How much captions of all pictures of a split invent: exactly on scenes, by the noun list elsewhere."""
    if isinstance(pairs, Scenes):
        shown = [{f"{thing.colour} {thing.shape}" for thing in scene.objects} for scene in pairs.scenes]
        return hallucination(captions, shown, drawn_objects_in)
    told = [{thing for text in pairs.captions(i) for thing in objects_in(text)} for i in range(len(pairs))]
    return hallucination(captions, told)
