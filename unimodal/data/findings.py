"""What is wrong with a data set across its splits, and what to do about it.

`check` of `pairs.py` looks at one split, for a reader that leaves bad samples out. `audit` is for people, before they train: it
also knows what the splits share and what a tokenizer would cut.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from unimodal.data.pairs import Pairs, caption_fault, is_gallery

CHUNK = 1000  # captions that are tokenised at a time
UNLIMITED = 1_000_000  # transformers gives a tokenizer without a limit a number of thirty digits


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Attributes:
        kind: "pictures", "captions", "no captions", "other files", "repeated pictures", "shared pictures", "shared captions" or
            "cut captions".
        count: how many there are.
        told: the same in a line.
        cases: each of them in a line, which names split and picture.
        advice: what to do.
    """

    kind: str
    count: int
    told: str
    cases: list[str]
    advice: str


def audit(
    splits: Mapping[str, Pairs],
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    show_progress_bar: bool = False,
) -> list[Finding]:
    """Open every picture and read every caption of all splits; a sound data set gives an empty list.

    Pictures are compared by their pixels, so that a copy under another name or in another lossless format is found. Captions
    are compared without regard to case and spaces.

    Args:
        splits: readers by the name of their split. Made with `on_error="keep"` they hide nothing and refuse nothing.
        tokenizer: a transformers tokenizer that measures captions; None leaves their length unchecked.
        max_length: longest caption in tokens, start and end included; by default the tokenizer's own limit.
        show_progress_bar: show one for the pictures of each split.

    Raises:
        ValueError: a tokenizer without a limit of its own, and no max_length.
    """
    if tokenizer is not None and max_length is None:
        max_length = tokenizer.model_max_length
        if max_length > UNLIMITED:
            raise ValueError(
                "this tokenizer names no limit of its own; give max_length, the longest text your model reads"
            )
    findings = [
        *_bad_captions(splits),
        _others(splits),
        *_bad_and_equal_pictures(splits, show_progress_bar),
        *_shared_captions(splits),
    ]
    if tokenizer is not None and max_length is not None:
        findings += _cut_captions(splits, tokenizer, max_length)
    return [finding for finding in findings if finding.count]


def _texts(pairs: Pairs, i: int) -> list[str]:
    """The captions of an image, without those that are none."""
    captions = pairs.captions(i)
    return [text for text in captions if caption_fault([text]) is None] if isinstance(captions, list) else []


def _bad_captions(splits: Mapping[str, Pairs]) -> list[Finding]:
    bad, none = [], []
    for split, pairs in splits.items():
        for i in () if is_gallery(pairs) else range(len(pairs)):
            captions = pairs.captions(i)
            if captions == []:
                none.append(f"{split}/{pairs.key(i)}")
            elif fault := caption_fault(captions):
                bad.append(f"{split}/{pairs.key(i)}: {fault}")
    told = f"images with captions that are empty or no text: {len(bad)}"
    advice = "Write these captions again, in UTF-8, or leave the images out with on_error: skip."
    missing = Finding(
        "no captions",
        len(none),
        f"images without captions in a split where others have them: {len(none)}",
        none,
        "Write captions for them, or leave them out with on_error: skip.",
    )
    return [Finding("captions", len(bad), told, bad, advice), missing]


def _others(splits: Mapping[str, Pairs]) -> Finding:
    """What lies among the samples and belongs to none."""
    others = [f"{split}/{name}" for split, pairs in splits.items() for name in getattr(pairs, "others", ())]
    return Finding(
        "other files",
        len(others),
        f"files or members that are neither picture nor caption of one: {len(others)}",
        others,
        "Nothing reads them. A caption has the name of its picture, but for the ending .txt or, in a shard, .json; see that none of these "
        "was meant as one.",
    )


def _bad_and_equal_pictures(splits: Mapping[str, Pairs], show: bool) -> list[Finding]:
    bad: list[str] = []
    places: dict[bytes, dict[str, dict[int, str]]] = defaultdict(dict)  # pixels: split: image_id: key
    for split, pairs in splits.items():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looks = pool.map(lambda i, pairs=pairs: look(pairs, i), range(len(pairs)))
            console = Console(stderr=True)
            bar = track(looks, f"pictures of {split}", len(pairs), console=console, disable=not show, transient=True)
            for i, found in enumerate(bar):
                if isinstance(found, str):
                    bad.append(f"{split}/{pairs.key(i)}: {found}")
                else:
                    places[found].setdefault(split, {}).setdefault(pairs.image_id(i), pairs.key(i))
    repeated = [
        [f"{split}/{key}" for key in keys.values()]
        for by_split in places.values()
        for split, keys in by_split.items()
        if len(keys) > 1
    ]
    shared = [
        [f"{split}/{key}" for split, keys in by_split.items() for key in keys.values()]
        for by_split in places.values()
        if len(by_split) > 1
    ]
    return [
        Finding(
            "pictures",
            len(bad),
            f"pictures that cannot be read: {len(bad)}",
            bad,
            "Put sound files in their place, or leave these images out with on_error: skip.",
        ),
        Finding(
            "repeated pictures",
            len(repeated),
            f"pictures that stand in one split several times under different names: {len(repeated)}",
            [" = ".join(names) for names in repeated],
            "Keep one entry with all the captions: training would push a picture away from the captions of its copy, and a "
            "search that finds the copy would count as wrong.",
        ),
        Finding(
            "shared pictures",
            len(shared),
            f"pictures that stand in more than one split: {len(shared)}",
            [" = ".join(names) for names in shared],
            "Remove them from the training split: what a model has trained on says little when it is tested on it.",
        ),
    ]


def look(pairs: Pairs, i: int) -> bytes | str:
    """A hash of the picture's pixels, or why there are none."""
    try:
        picture = pairs.image(i)
    except (OSError, ValueError) as error:
        return str(error)
    return hashlib.blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=16).digest()


def _shared_captions(splits: Mapping[str, Pairs]) -> list[Finding]:
    first: dict[str, dict[str, str]] = defaultdict(dict)  # caption: split: the first image that has it
    for split, pairs in splits.items():
        for i in range(len(pairs)):
            for text in _texts(pairs, i):
                first[" ".join(text.lower().split())].setdefault(split, f"{split}/{pairs.key(i)}")
    cases = [f"{text!r:.120}: {', '.join(by.values())}" for text, by in first.items() if len(by) > 1]
    return [
        Finding(
            "shared captions",
            len(cases),
            f"captions that stand in more than one split: {len(cases)}",
            cases,
            "Long ones are a sign that images of one source were split apart: remove them from the training split. Short ones "
            "may agree by chance; in a test they have several right answers, of which one counts.",
        )
    ]


def _cut_captions(splits: Mapping[str, Pairs], tokenizer: Any, max_length: int) -> list[Finding]:
    rows = [
        (f"{split}/{pairs.key(i)}", text)
        for split, pairs in splits.items()
        for i in range(len(pairs))
        for text in _texts(pairs, i)
    ]
    cases, longest = [], 0
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        for (name, text), ids in zip(part, tokenizer([text for _, text in part], verbose=False)["input_ids"]):
            longest = max(longest, len(ids))
            if len(ids) > max_length:
                cases.append(f"{name}: {len(ids)} tokens, {text!r:.120}")
    return [
        Finding(
            "cut captions",
            len(cases),
            f"captions of more than {max_length} tokens, whose end would be cut: {len(cases)} of {len(rows)}, the longest "
            f"of {longest} tokens",
            cases,
            f"Set backbone.text.max_length to {longest} to keep them whole, if the text tower has so many positions, or accept "
            "that their last words are not read.",
        )
    ]
