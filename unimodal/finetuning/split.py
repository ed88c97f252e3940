"""Own pairs on their way to a fine-tuning: every picture is opened once, and some images are held out with all of their captions."""

import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from unimodal import arguments
from unimodal.data import Scenes
from unimodal.data.findings import look
from unimodal.data.guess import open_splits
from unimodal.data.pairs import Pairs, fingerprint, is_gallery, require_captions

FEWEST = 20  # images
ENOUGH = 500  # pairs
TRAINING = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev")  # what people call it


class Part:
    """Some images of a split, by their rows, as a split of its own."""

    def __init__(self, pairs: Pairs, rows: list[int], split: str) -> None:
        self.pairs, self.rows, self.name, self.split = pairs, rows, pairs.name, split

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Image.Image:
        return self.pairs.image(self.rows[i])

    def captions(self, i: int) -> list[str]:
        return self.pairs.captions(self.rows[i])

    def labels(self, i: int) -> frozenset[str]:
        return self.pairs.labels(self.rows[i])

    def key(self, i: int) -> str:
        return self.pairs.key(self.rows[i])

    def image_id(self, i: int) -> int:
        return self.pairs.image_id(self.rows[i])

    def fingerprint(self) -> str:
        return fingerprint((self.key(i), self.captions(i)) for i in range(len(self)))

    def negatives(self, i: int, c: int) -> list[str]:
        return self.pairs.negatives(self.rows[i], c)


class Splits(NamedTuple):
    """What is trained on, what chooses the best step, and what the table is measured on, which may be the same as `val`."""

    train: Pairs
    val: Pairs
    test: Pairs

    @property
    def chosen_on_test(self) -> bool:
        """Whether the images of the table also chose the best step."""
        return self.val is self.test


def open_pairs(
    data: str | Path | Pairs, images: str | Path | None, val: str | Path | Pairs | None, seed: int
) -> Splits:
    """The splits of own data.

    A file or folder with splits of its own is taken as it is. Of other data about a tenth of the images is held out, each with all of its
    captions, and with every copy of it.

    Args:
        data: a table, a JSON file, shards, a folder (`unimodal.data.guess.open_splits`), `scenes`, or an opened split.
        images: folder of the pictures.
        val: the validation split, likewise; None takes the data's own, or holds some images out.
        seed: what the choice of images follows from.

    Raises:
        ValueError: there are too few images, or no captions, or pictures that cannot be read.
    """
    train, own, test = _choose(_splits(data, images))
    if val is not None:
        given = _splits(val, images)
        own = next((given[name] for name in (*VALIDATION, "test") if name in given), next(iter(given.values())))
    for pairs in (train, *([] if own is None else [own])):
        require_captions(pairs, "fine-tuning")
    if len(train) < FEWEST:
        raise ValueError(
            f"{train.name} has {len(train)} images to train on, and a fine-tuning needs at least {FEWEST}, some of which it holds out; its "
            f"settings are chosen for {ENOUGH} pairs and more"
        )
    if (count := sum(len(train.captions(i)) for i in range(len(train)))) < ENOUGH:
        warnings.warn(
            f"{train.name} has {count} pairs to train on; the settings are chosen for {ENOUGH} and more", stacklevel=3
        )
    looks = _looks(train)
    if own is None:
        held = set(_held_out(looks, seed))
        rows = [[i for i in range(len(train)) if (i in held) is apart] for apart in (False, True)]
        train, own = Part(train, rows[0], "train"), Part(train, rows[1], "val")
    else:
        _warn_of_copies(looks, own)
    if test is not None:
        _warn_of_copies(looks, test)
    return Splits(train, own, own if test is None else test)


def _choose(found: dict[str, Pairs]) -> tuple[Pairs, Pairs | None, Pairs | None]:
    """Training, validation and test split by their names; a lone split is trained on, whatever its name.

    Raises:
        ValueError: there are several, and none is for training.
    """
    names = [next((name for name in known if name in found), None) for known in (TRAINING, VALIDATION, ("test",))]
    if len(found) == 1:
        return next(iter(found.values())), None, None
    if names[0] is None:
        raise ValueError(
            f"the data has the splits {', '.join(found)}, of which none is called {' or '.join(TRAINING)}; call the one to train on so"
        )
    if left := [name for name in found if name not in names]:
        warnings.warn(f"the data has more splits, which are left out: {', '.join(left)}", stacklevel=4)
    train, own, test = (None if name is None else found[name] for name in names)
    assert train is not None
    return train, own, None if test is None or is_gallery(test) else test


def _warn_of_copies(trained: list[bytes], pairs: Pairs) -> None:
    """Say how many pictures of a split are trained on, too."""
    if copies := len(set(trained) & set(_looks(pairs))):
        warnings.warn(
            f"{copies} pictures of {pairs.name} {pairs.split} are trained on, too, so its numbers say too much; `unimodal data check` "
            "names them",
            stacklevel=4,
        )


def _splits(data: str | Path | Pairs, images: str | Path | None) -> dict[str, Pairs]:
    if not isinstance(data, str | Path):
        if not hasattr(data, "captions") or not hasattr(data, "image"):
            advice = "unimodal.data.CsvTable(path) opens a table"
            raise TypeError(arguments.refused("pairs", "the path of data, or an opened split", data, advice))
        return {"train": data}
    if str(data) == "scenes":
        return {split: Scenes(split, count=count) for split, count in (("train", 1000), ("val", 200))}
    return open_splits(data, images, on_error="raise")[1]


def _looks(pairs: Pairs) -> list[bytes]:
    """A hash of every picture's pixels.

    Raises:
        ValueError: names pictures that cannot be read, and how many there are.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = list(pool.map(lambda i: look(pairs, i), range(len(pairs))))
    bad = [f"{pairs.key(i)}: {found}" for i, found in enumerate(looks) if isinstance(found, str)]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(pairs)} pictures of {pairs.name} {pairs.split} cannot be read: {'; '.join(bad[:3])}"
            f"{'; ...' if len(bad) > 3 else ''}. Put sound files in their place, or leave their rows out; `unimodal data check` lists all"
        )
    return [found for found in looks if isinstance(found, bytes)]


def _held_out(looks: list[bytes], seed: int) -> list[int]:
    """Rows of the images that are held out; copies of one picture stay together."""
    count = len(looks)
    wanted = max(min(count // 5, 100), min(count // 10, 1000))
    copies: dict[bytes, list[int]] = {}
    for row, found in enumerate(looks):
        copies.setdefault(found, []).append(row)
    groups = list(copies.values())
    random.Random(seed).shuffle(groups)
    held: list[int] = []
    for group in groups:
        if len(held) >= wanted:
            break
        if len(group) <= wanted:
            held += group
    return held
