"""Image-text pairs with categories, in the layouts in which their authors published them: Pascal-Sentence, Wikipedia, NUS-WIDE.

In these sets an item is relevant to a query if the two share a label: `label_matrix` gives the labels as tensors, for
`unimodal.metrics.relevance_by_label`.
"""

from __future__ import annotations

import hashlib
import html
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unimodal import arguments
from unimodal.data.folders import find_pictures, visible
from unimodal.data.pairs import Pairs
from unimodal.data.readers import Listed, OnError, Sample, inside
from unimodal.data.text import decoded, lines

WIKIPEDIA_CATEGORIES = (
    *("art", "biology", "geography", "history", "literature"),
    *("media", "music", "royalty", "sport", "warfare"),
)


def label_matrix(pairs: Pairs, names: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """The labels of a split as bool [I, L], I images and L labels, and the names of the columns.

    Args:
        pairs: a split whose reader gives labels.
        names: the columns; by default all labels of the split, sorted. Give those of the training split to compare splits.

    Raises:
        ValueError: an image has no label, or one that is not in `names`.
    """
    rows = [pairs.labels(i) for i in range(len(pairs))]
    for i, labels in enumerate(rows):
        if not labels:
            raise ValueError(
                f"{pairs.key(i)} of {pairs.name} {pairs.split} has no label; name the labels to its reader"
            )
    columns = sorted(frozenset().union(*rows)) if names is None else list(names)
    place = {name: column for column, name in enumerate(columns)}
    matrix = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for i, labels in enumerate(rows):
        for label in labels:
            if label not in place:
                raise ValueError(f"{pairs.key(i)} has the label {label!r}; names has {', '.join(columns)}")
            matrix[i, place[label]] = True
    return matrix, columns


class PascalSentence(Listed):
    """Pascal-Sentence (Rashtchian et al., NAACL-HLT Workshop 2010): 20 classes of 50 pictures, five sentences each.

    Expected are `dataset/CLASS/NAME.jpg` and `sentence/CLASS/NAME.txt` with one sentence a line. The set has no split of its
    own: the literature takes 800, 100 and 100 images. Here each class gives a tenth of its pictures to val and to test,
    drawn by a hash of seed and name, so that the split is the same on every machine.

    Args:
        root: the folder that holds `dataset` and `sentence`.
        split: "train", "val", "test" or "all".
        seed: another seed draws another split.
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: there is no folder `dataset`.
        ValueError: an unknown split, a bad caption, or no picture.
    """

    def __init__(self, root: str | Path, *, split: str, seed: int = 0, on_error: OnError = "raise") -> None:
        arguments.choice(split, "split", ("train", "val", "test", "all"))
        root, seed = arguments.path(root, "root"), arguments.integer(seed, "seed", least=0)
        pictures, sentences = root / "dataset", root / "sentence"
        if not pictures.is_dir():
            raise FileNotFoundError(f"there is no folder {str(pictures)!r}; expected dataset/CLASS/NAME.jpg")
        samples = []
        for folder in [path for path in visible(pictures) if path.is_dir()]:
            files = [path for path in find_pictures(folder).pictures if path.parent == folder]
            files.sort(key=lambda path: hashlib.sha256(f"{seed}/{path.parent.name}/{path.stem}".encode()).digest())
            tenth = len(files) // 10
            parts = {"val": files[:tenth], "test": files[tenth : 2 * tenth], "train": files[2 * tenth :], "all": files}
            for path in sorted(parts[split]):
                text = sentences / folder.name / f"{path.stem}.txt"
                captions = lines(text.read_bytes()) if text.is_file() else []
                key = f"{folder.name}/{path.name}"
                samples.append(Sample(key, captions, path, labels=frozenset([folder.name])))
        super().__init__("pascal-sentence", split, samples, on_error)


class Wikipedia(Listed):
    """Wikipedia featured articles (Rasiwasia et al., ACM Multimedia 2010): 2,866 pictures, each with a section of text, in ten
    categories; 2,173 for training and 693 for testing.

    Expected are `trainset_txt_img_cat.list` and `testset_txt_img_cat.list` (a line has the text's name, the picture's name and
    the number of the category, separated by tabs), `texts/NAME.xml` whose `<text>` is the caption, and `images/CATEGORY/NAME.jpg`.
    A section has about 200 words: what a model reads of it is up to its `max_length`.

    Args:
        root: the folder `wikipedia_dataset`.
        split: "train" or "test".
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: the list of the split, or a text, is missing.
        ValueError: an unknown split, a bad line, a name that leaves the root.
    """

    def __init__(self, root: str | Path, *, split: str, on_error: OnError = "raise") -> None:
        arguments.choice(split, "split", ("train", "test"))
        root, samples = arguments.path(root, "root"), []
        listed = root / f"{split}set_txt_img_cat.list"
        for n, line in enumerate(decoded(listed.read_bytes()).splitlines(), 1):
            parts = line.split()
            if len(parts) != 3 or not parts[2].isdecimal() or not 1 <= int(parts[2]) <= len(WIKIPEDIA_CATEGORIES):
                raise ValueError(
                    f"{listed} line {n}: expected text, picture and category from 1 to 10, got {line!r:.80}"
                )
            category = WIKIPEDIA_CATEGORIES[int(parts[2]) - 1]
            article = decoded(inside(root / "texts", f"{parts[0]}.xml").read_bytes())
            text = re.search(r"<text>(.*)</text>", article, flags=re.DOTALL)
            captions = [" ".join(html.unescape(text[1]).split())] if text else []
            key = f"{category}/{parts[1]}.jpg"
            samples.append(Sample(key, captions, inside(root / "images", key), labels=frozenset([category])))
        super().__init__("wikipedia", split, samples, on_error)


class NusWide(Listed):
    """NUS-WIDE (Chua et al., CIVR 2009): 269,648 pictures of Flickr with their tags, and 81 concepts of which each has any number.

    Expected are `ImageList/Imagelist.txt`, `ImageList/TrainImagelist.txt` and `ImageList/TestImagelist.txt`;
    `NUS_WID_Tags/All_Tags.txt` (a line has the photo's number and its tags) and `Groundtruth/AllLabels/Labels_CONCEPT.txt` (0 or
    1 a line), both in the order of `Imagelist.txt`; and the pictures in `Flickr`. The caption of a picture is its tags.

    Pictures without any of the concepts, or without tags, are left out under a warning that counts them, as the literature does.

    Args:
        root: the folder that holds the others.
        split: "train", "test", or "all".
        concepts: the labels; by default every concept that has a file. The literature takes the 10 or the 21 most frequent.
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: an unknown split; files that do not agree; a label other than 0 and 1; a name that leaves the root.
    """

    def __init__(
        self, root: str | Path, *, split: str, concepts: list[str] | None = None, on_error: OnError = "raise"
    ) -> None:
        root = arguments.path(root, "root")
        files = {"train": "TrainImagelist.txt", "test": "TestImagelist.txt", "all": "Imagelist.txt"}
        arguments.choice(split, "split", files)
        if concepts is not None:
            named = arguments.listed(concepts, "concepts", "names")
            concepts = [arguments.text(one, f"concepts[{i}]") for i, one in enumerate(named)]
        names = _names(root / "ImageList" / "Imagelist.txt")
        wanted = set(_names(root / "ImageList" / files[split]))
        tags = lines((root / "NUS_WID_Tags" / "All_Tags.txt").read_bytes())
        if len(tags) != len(names):
            raise ValueError(
                f"{root}: All_Tags.txt has {len(tags)} lines and Imagelist.txt {len(names)}; expected one each"
            )
        labels: list[set[str]] = [set() for _ in names]
        truth = root / "Groundtruth" / "AllLabels"
        if concepts is None:
            concepts = sorted(path.stem.removeprefix("Labels_") for path in truth.glob("Labels_*.txt"))
        for concept in concepts:
            file = inside(truth, f"Labels_{concept}.txt")
            values = decoded(file.read_bytes()).split()
            if len(values) != len(names) or not set(values) <= {"0", "1"}:
                raise ValueError(f"{file}: expected {len(names)} lines of 0 or 1; download the file again")
            for row, value in enumerate(values):
                if value == "1":
                    labels[row].add(concept)
        samples, bare = [], 0
        for name, line, shared in zip(names, tags, labels):
            number, *said = line.split()
            if Path(name).stem.rpartition("_")[2] != number:
                raise ValueError(
                    f"{root}: All_Tags.txt has photo {number} where Imagelist.txt has {name}; expected one order"
                )
            if name not in wanted:
                continue
            if shared and said:
                samples.append(Sample(name, [" ".join(said)], inside(root / "Flickr", name), labels=frozenset(shared)))
            bare += not (shared and said)
        if bare:
            warnings.warn(
                f"{bare} of {bare + len(samples)} pictures of NUS-WIDE {split} have no tags or none of the "
                f"{len(concepts)} concepts and are left out",
                stacklevel=2,
            )
        super().__init__("nus-wide", split, samples, on_error)


def _names(path: Path) -> list[str]:
    """Pictures of a list that was written on Windows."""
    return [line.strip().replace("\\", "/") for line in decoded(path.read_bytes()).splitlines() if line.strip()]
