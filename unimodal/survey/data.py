"""What the systems of a survey learn from and are asked: one split to train on, one to rank, read once by the shared encoders.

Legend: B pairs of a batch, I images, C captions, K categories.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unimodal.data.categories import categories_of, one_hot
from unimodal.data.features import ImageFeatures, SplitFeatures, TextFeatures
from unimodal.data.noise import Noise, changed, corrupted
from unimodal.data.pairs import Pairs, fingerprint, require_captions
from unimodal.data.sampler import hard_batches, random_batches
from unimodal.files import write_json
from unimodal.survey.encoders import SharedEncoders
from unimodal.systems import Batch, Images, Stage, Texts

READ = 256  # rows read at a time


@dataclass(frozen=True)
class Shots:
    """Few examples to learn from.

    Args:
        count: so many.
        of: `class`: images of each category; `pair`: captions of each image.

    Raises:
        ValueError: there would be nothing to learn from.
    """

    count: int
    of: Literal["class", "pair"] = "class"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"shots: expected at least 1 example of each {self.of}, got {self.count}")


class First:
    """The first images of a split (`unimodal.data.pairs.Pairs`).

    Args:
        pairs: the split.
        count: how many.

    Raises:
        ValueError: the split has fewer, or none is asked for.
    """

    def __init__(self, pairs: Pairs, count: int) -> None:
        if not 0 < count <= len(pairs):
            raise ValueError(
                f"got {count} images of {pairs.name} {pairs.split}, which has {len(pairs)}; expected 1 up to all"
            )
        self.pairs, self.count = pairs, count

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pairs, name)

    def fingerprint(self) -> str:
        """Of these images' keys and captions."""
        return fingerprint((self.pairs.key(i), self.pairs.captions(i)) for i in range(self.count))


class SurveyData:
    """A training split and a split to rank, with their features.

    Args:
        train, val: the two splits.
        encoders: what reads them.
        cache: folder of the features, which are kept and found again.
        noise: corruption of the training captions; by default none.
        shots: how few examples to learn from; by default all.
        seed: of everything that is drawn.

    Attributes:
        places: row and caption number of all captions that are learned from, a list for each image.
        rows, captions: the rows of these images, and the captions themselves.
        corrupted: the share of the captions that noise changed.

    Raises:
        ValueError: a split without captions; more shots than the data has.
    """

    def __init__(
        self,
        train: Pairs,
        val: Pairs,
        encoders: SharedEncoders,
        cache: Path,
        *,
        noise: Noise | None = None,
        shots: Shots | None = None,
        seed: int = 0,
    ) -> None:
        for pairs, purpose in ((train, "training"), (val, "ranking")):
            require_captions(pairs, purpose)
        self.train, self.val, self.encoders, self.seed = train, val, encoders, seed
        self.features, self.val_features = (
            SplitFeatures(
                ImageFeatures(cache, pairs, encoders.backbone, encoders.processor, precision="half"),
                texts=TextFeatures(cache, pairs, encoders.backbone, encoders.processor, precision="half"),
            )
            for pairs in (train, val)
        )
        things = [categories_of(pairs) for pairs in (train, val)]
        self.categories = sorted(frozenset().union(*things[0]))
        self.labels, self.val_labels = (one_hot(part, self.categories) for part in things)
        self.places = _shots(train, things[0], shots, seed)
        self.rows = [places[0][0] for places in self.places]
        self.captions = [[train.captions(row)[c] for row, c in places] for places in self.places]
        self.corrupted = 0.0
        if noise is not None:
            clean, self.captions = self.captions, corrupted(train, self.captions, self.places, noise)
            self.corrupted = changed(clean, self.captions)

    def in_order(self) -> Iterator[Batch]:
        """The training split as it is learned from, every caption once."""
        places = [(row, c) for row, texts in enumerate(self.captions) for c in range(len(texts))]
        for start in range(0, len(places), READ):
            yield self._batch(places[start : start + READ], self.captions)

    def batches(self, name: str, stage: Stage, *, pixels: bool = False, order: Path | None = None) -> Iterator[Batch]:
        """Batches for a stage, without end, the same for the same seed. Where there are fewer images than a batch would hold, a batch
        holds all of them.

        Args:
            name: the stage's.
            stage: its settings.
            pixels: whether the pictures' pixels are wanted beside their tokens.
            order: a file of hard batches (`write_hard_batches`), read in its order.
        """
        captions = self.captions
        if stage.noise:
            captions = corrupted(self.train, captions, self.places, Noise(stage.noise, "random", self.seed + 1))
        each = stage.captions_per_image
        size = max(1, min(stage.batch_size // each, len(self.rows)))
        epoch = 0
        while True:
            if order is None:
                plan = random_batches(len(self.rows), size, self.seed, epoch).tolist()
            else:
                plan = json.loads(order.read_text())["batches"]
            for step, rows in enumerate(plan):
                draw = random.Random(f"{name}-{self.seed}-{epoch}-{step}")
                places = [
                    (row, c)
                    for row in rows
                    for c in draw.sample(range(len(captions[row])), min(each, len(captions[row])))
                ]
                yield self._batch(places, captions, pixels=pixels)
            epoch += 1

    def write_hard_batches(self, path: Path, images: Tensor, batch_size: int) -> None:
        """Write groups of images that an embedding [rows, E] finds alike, each a batch: the order in which a stage reads them."""
        neighbours = (images @ images.T).fill_diagonal_(-torch.inf).topk(min(batch_size, len(images) - 1), 1).indices
        batches = hard_batches(neighbours, min(batch_size, len(images)), self.seed, 0)
        write_json(path, {"batches": batches.tolist()})

    def training_images(self) -> Iterator[Images]:
        """All training pictures in order."""
        for start in range(0, len(self.rows), READ):
            yield self._images(self.features, self.rows[start : start + READ])

    def gallery(self, *, pixels: bool = False) -> tuple[Images, Texts, Tensor, Tensor]:
        """The split to rank: images, all captions, image ids [I], the image id of each caption [C]."""
        rows = list(range(len(self.val)))
        parts = [self._images(self.val_features, rows[i : i + READ]) for i in range(0, len(rows), READ)]
        images = Images(*(torch.cat(part) for part in list(zip(*parts))[:2]))
        if pixels:
            images = images._replace(pixels=self._pixels(self.val, rows))
        texts = [(i, text) for i in rows for text in self.val.captions(i)]
        ids = torch.tensor([self.val.image_id(i) for i in rows])
        owners = torch.tensor([self.val.image_id(i) for i, _ in texts])
        return images, self._texts(self.val_features, [text for _, text in texts]), ids, owners

    def _batch(
        self, places: Sequence[tuple[int, int]], captions: Sequence[Sequence[str]], *, pixels: bool = False
    ) -> Batch:
        rows = [self.rows[row] for row, _ in places]
        images = self._images(self.features, rows)
        if pixels:
            images = images._replace(pixels=self._pixels(self.train, rows))
        texts = self._texts(self.features, [captions[row][c] for row, c in places])
        ids = torch.tensor([self.train.image_id(i) for i in rows])
        return Batch(images, texts, ids, self.labels[rows] if self.categories else None)

    def _images(self, features: SplitFeatures, rows: Sequence[int]) -> Images:
        read = features.image(rows)
        return self.encoders.as_images(read["image_features"].float(), read.get("image_features_mask"))

    def _texts(self, features: SplitFeatures, texts: Sequence[str]) -> Texts:
        ids, mask = self.encoders.tokenise(texts)
        tokens = features.text(texts, mask)
        if tokens is None:  # a corrupted caption that is nobody's
            return self.encoders.read_texts(ids, mask)
        return Texts(ids, mask, tokens.float())

    def _pixels(self, pairs: Pairs, rows: Sequence[int]) -> Tensor:
        processor = self.encoders.processor
        return processor.pixels([processor.image_array(pairs.image(i)) for i in rows])


def _shots(
    train: Pairs, things: Sequence[frozenset[str]], shots: Shots | None, seed: int
) -> list[list[tuple[int, int]]]:
    """What is learned from: row and caption number of each caption, a list for each image. A category with fewer images than asked for
    gives all it has."""
    every = [[(row, c) for c in range(len(train.captions(row)))] for row in range(len(train))]
    if shots is None:
        return every
    draw = random.Random(f"shots-{seed}")
    if shots.of == "pair":
        _require(shots, max(map(len, every)), "captions of each image", train)
        return [draw.sample(places, min(shots.count, len(places))) for places in every]
    order = draw.sample(range(len(train)), len(train))
    showing = {name: [row for row in order if name in things[row]] for name in frozenset().union(*things)}
    _require(shots, max(map(len, showing.values()), default=0), "images of each category", train)
    return [every[row] for row in sorted({row for rows in showing.values() for row in rows[: shots.count]})]


def _require(shots: Shots, most: int, what: str, train: Pairs) -> None:
    if shots.count > most:
        raise ValueError(
            f"shots: got {shots.count} {what}, but {train.name} {train.split} has at most {most}; lower it"
        )
