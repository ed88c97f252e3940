"""Scenes as sentences, and back: templates write captions, the same templates parse them.

Every caption states shape, colour, size and texture of every object and their relation; some also name the background.
A caption is a scene and a `Form` (which template, from which side, which synonyms), so a false caption is the same
form of another scene: it differs in the words of what is false and in nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from unimodal.data.scenes.symbols import BACKGROUNDS, COLOURS, INVERSE, SHAPES, Random, Scene, SceneObject, pick

# {a} and {b} are the pair, {ab} how a lies to b, {at_a} and {at_b} where in the picture they are; {c} is the third object, {third} how it
# lies to both.
TEMPLATES = {
    2: (
        "a {a} is {ab} a {b} on a {background} background.",
        "there is a {a} {ab} a {b}; the background is {background}.",
        "on a {background} background, a {a} is {ab} a {b}.",
        "the background is {background}; {at_a} sits a {a}, {at_b} a {b}.",
        "{at_a} there is a {a}, and {at_b} a {b}.",
        "a {a} is {ab} a {b}.",
        "{ab} a {b} there is a {a}.",
        "this picture shows a {b} with a {a} {ab} it.",
    ),
    3: (
        "a {a} is {ab} a {b}, with a {c} {third} both.",
        "there is a {a} {ab} a {b} and a {c} {third} them.",
        "{ab} a {b} there is a {a}, and {third} both is a {c}.",
        "this picture shows a {b} with a {a} {ab} it and a {c} {third} them.",
        "a {a} sits {ab} a {b}; {third} them there is a {c}.",
    ),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
TEXTURE_WORDS = {"solid": ("solid", "plain"), "striped": ("striped", "striped")}
# Share of captions told from the right or from below. At one half, "left" and "right" say nothing about what is named first, and a model
# that reads colours and shapes perfectly still finds no gradient towards which of them lies where (measured: a coin flip after 1500 steps).
FROM_B = 0.25
PLACE_WORDS = {
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "above": ("on top", "at the top"),
    "below": ("on the bottom", "at the bottom"),
}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Form:
    """How a caption says what it says."""

    template: int
    from_b: bool  # told from the other side: "b is right of a" for "a is left of b"
    colour_first: bool  # "small red striped circle" or "small striped red circle"
    size_word: int
    texture_word: int
    relation_word: int


def sample_forms(rng: Random, objects: int, count: int = 5) -> list[Form]:
    """`count` forms, each with its own template."""
    templates = sorted(range(len(TEMPLATES[objects])), key=lambda _: rng.random())[:count]
    flag, two = (False, True), (0, 1)
    return [
        Form(t, rng.random() < FROM_B, pick(rng, flag), pick(rng, two), pick(rng, two), pick(rng, two))
        for t in templates
    ]


def write(scene: Scene, form: Form) -> str:
    """The caption of this scene in this form."""

    def name(thing: SceneObject) -> str:
        words = [TEXTURE_WORDS[thing.texture][form.texture_word], thing.colour]
        words = words[::-1] if form.colour_first else words
        return " ".join([SIZE_WORDS[thing.size][form.size_word], *words, thing.shape])

    def place(relation: str) -> str:
        return RELATION_WORDS[relation][form.relation_word]

    names = [name(thing) for thing in scene.objects]
    relation = scene.relation
    if form.from_b:
        names[:2], relation = names[1::-1], INVERSE[relation]
    return TEMPLATES[len(names)][form.template].format(
        ab=place(relation),
        at_a=PLACE_WORDS[relation][form.relation_word],
        at_b=PLACE_WORDS[INVERSE[relation]][form.relation_word],
        third=scene.third and place(scene.third),
        background=scene.background,
        **dict(zip("abc", names)),
    )


def _split(text: str) -> str:
    """Words and punctuation, lower case, one space between; a {slot} is one word."""
    return " ".join(re.findall(r"\{\w+\}|\w+|[^\w\s]", text.lower()))


def _any(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_TABLES = (SIZE_WORDS, TEXTURE_WORDS, RELATION_WORDS, PLACE_WORDS)
_MEANING = {word: meaning for table in _TABLES for meaning, words in table.items() for word in words}
_SIZE, _TEXTURE, _RELATION, _PLACE = (_any({word for words in table.values() for word in words}) for table in _TABLES)
_COLOUR, _SHAPE = _any(COLOURS), _any(SHAPES)
_NAME = f"(?P<{{}}>(?:{_SIZE}) (?:(?:{_TEXTURE}) (?:{_COLOUR})|(?:{_COLOUR}) (?:{_TEXTURE})) (?:{_SHAPE}))"
_SLOTS = {slot: _NAME.format(slot) for slot in "abc"} | {
    "ab": f"(?P<ab>{_RELATION})",
    "at_a": f"(?P<at_a>{_PLACE})",
    "at_b": f"(?P<at_b>{_PLACE})",
    "third": f"(?P<third>{_RELATION})",
    "background": f"(?P<background>{_any(BACKGROUNDS)})",
}
_PATTERNS = [
    re.compile(_split(template).removesuffix(" .").format(**_SLOTS) + r"(?: \.)?")
    for templates in TEMPLATES.values()
    for template in templates
]


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption describes, or None if no template could have written it.

    The background of the scene is None where the caption does not name it. Case, spaces and the final stop are free.
    """
    words = _split(text)
    for pattern in _PATTERNS:
        match = pattern.fullmatch(words)
        if match:
            found = match.groupdict()
            objects = tuple(_object(found[slot]) for slot in "abc" if slot in found)
            third = _MEANING[found["third"]] if "third" in found else None
            relation = _MEANING[found.get("ab") or found["at_a"]]
            if "at_b" in found and _MEANING[found["at_b"]] != INVERSE[relation]:
                return None  # "on the left ..., at the top ...": says nothing of how the two lie to each other
            return Scene(objects, relation, found.get("background"), third)
    return None


def _object(name: str) -> SceneObject:
    size, one, two, shape = name.split()
    texture, colour = (two, one) if one in COLOURS else (one, two)
    return SceneObject(_MEANING[size], _MEANING[texture], colour, shape)


def caption_matches(caption: str, scene: Scene) -> bool:
    """Whether a caption is right about everything: every object with all its attributes, the relation from either side,
    the background if it names one, and nothing invented. A caption that cannot be parsed is wrong."""
    told = parse_caption(caption)
    return told is not None and told.key() == scene.key() and told.background in (None, scene.background)


def vocabulary() -> list[str]:
    """Every word and punctuation mark that a caption can contain, sorted."""
    words = {*SHAPES, *COLOURS, *BACKGROUNDS}
    words.update(word for phrase in _MEANING for word in phrase.split())
    for templates in TEMPLATES.values():
        words.update(word for template in templates for word in _split(template).split() if not word.startswith("{"))
    return sorted(words)
