"""Objects by their names: which of a fixed list a caption speaks of, for categories, false captions and hallucination.

The list holds the shapes of drawn scenes and the objects that everyday photographs show most, with their plurals and near synonyms, as
CHAIR does for COCO (Rohrbach et al. 2018, arXiv 1809.02156). It is short on purpose: what is not on it is not judged.
"""

import re
from collections import Counter
from collections.abc import Sequence

OBJECTS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "disk"),
    "square": ("square",),
    "triangle": ("triangle",),
    "cross": ("cross",),
    "diamond": ("diamond",),
    "ring": ("ring",),
    "dog": ("dog", "puppy", "terrier", "poodle", "greyhound", "retriever", "hound"),
    "cat": ("cat", "kitten"),
    "horse": ("horse", "pony"),
    "bird": ("bird", "duck", "seagull", "goose", "pigeon"),
    "cow": ("cow", "bull", "cattle"),
    "man": ("man", "men", "guy", "gentleman"),
    "woman": ("woman", "women", "lady"),
    "boy": ("boy",),
    "girl": ("girl",),
    "child": ("child", "children", "kid", "toddler", "baby", "babies"),
    "player": ("player", "athlete", "team"),
    "ball": ("ball", "basketball", "football", "baseball", "volleyball", "soccer"),
    "bicycle": ("bicycle", "bike", "cyclist", "biker"),
    "motorcycle": ("motorcycle", "motorbike", "motocross"),
    "car": ("car", "truck", "van", "suv", "vehicle"),
    "boat": ("boat", "canoe", "kayak", "raft", "sailboat"),
    "surfboard": ("surfboard", "surfer", "wakeboard"),
    "skateboard": ("skateboard", "skateboarder", "skater"),
    "snowboard": ("snowboard", "snowboarder"),
    "ski": ("ski", "skier", "skis"),
    "sled": ("sled",),
    "frisbee": ("frisbee",),
    "stick": ("stick", "branch"),
    "water": ("water", "ocean", "sea", "lake", "river", "pool", "pond", "wave", "surf"),
    "beach": ("beach", "shore"),
    "snow": ("snow",),
    "grass": ("grass", "lawn", "field", "meadow"),
    "sand": ("sand", "dune"),
    "rock": ("rock", "cliff", "boulder"),
    "mountain": ("mountain", "hill"),
    "tree": ("tree", "forest", "woods"),
    "street": ("street", "road", "sidewalk"),
    "building": ("building", "house"),
    "bench": ("bench",),
    "fence": ("fence",),
    "swing": ("swing",),
    "slide": ("slide",),
    "hat": ("hat", "cap", "helmet"),
    "toy": ("toy",),
    "guitar": ("guitar",),
}
_NAMED = {name: thing for thing, names in OBJECTS.items() for name in names}
_WORD = re.compile(r"[a-z]+")


def objects_in(caption: str) -> set[str]:
    """The objects of the list that a caption names."""
    found = set()
    for word in _WORD.findall(caption.lower()):
        thing = _NAMED.get(word) or _NAMED.get(word.removesuffix("s")) or _NAMED.get(word.removesuffix("es"))
        if thing is not None:
            found.add(thing)
    return found


def objects_of(captions: Sequence[str]) -> frozenset[str]:
    """What an image shows by its captions: every object that at least two of them name, or one where there is but one caption."""
    named = Counter(thing for caption in captions for thing in objects_in(caption))
    return frozenset(thing for thing, times in named.items() if times >= min(2, len(captions)))
