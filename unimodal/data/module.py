"""The Lightning data module: readers in, batches out, resumable at any step.

Everything random about a training sample (its place in the epoch, its caption, its mirroring and cropping) follows from (seed, epoch,
index), so a resumed run sees exactly the batches that an uninterrupted one would have seen.
"""

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop
from transformers import AutoTokenizer

from unimodal.backbones import Backbone
from unimodal.backbones.published import find_published
from unimodal.config import ModelConfig
from unimodal.data.batch import Batch
from unimodal.data.categories import categories_of, one_hot
from unimodal.data.features import ImageFeatures, SplitFeatures, TextFeatures, trained
from unimodal.data.negatives import Negatives, read_negatives
from unimodal.data.noise import Noise, NoisyCaptions
from unimodal.data.pairs import Pairs, is_gallery, require_captions
from unimodal.data.processor import Processor, scenes_tokenizer
from unimodal.data.published import open_processor, open_writer
from unimodal.data.readers import Listed
from unimodal.data.sampler import hard_batches, random_batches
from unimodal.data.sides import names_a_side
from unimodal.data.store import Precision


def cropped(array: Tensor, least: float, draw: random.Random) -> Tensor:
    """A random part of a picture [3, S, S], of `least` to all of its area and 3:4 to 4:3 (Szegedy et al. 2014, arXiv 1409.4842), at the
    size of the whole."""
    height, width = array.shape[1:]
    area, ratio = draw.uniform(least, 1.0), math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)) / 2)
    rows, columns = (min(1.0, math.sqrt(area) * factor) for factor in (1 / ratio, ratio))
    high, wide = max(1, round(height * rows)), max(1, round(width * columns))
    top, left = draw.randint(0, height - high), draw.randint(0, width - wide)
    return resized_crop(array, top, left, high, wide, [height, width], InterpolationMode.BICUBIC, antialias=True)


def as_targets(pixels: Tensor, size: int) -> Tensor:
    """Pictures uint8 [B, 3, S, S] -> what a generator learns to draw: [B, 3, size, size] in [-1, 1]."""
    targets = pixels.float() / 127.5 - 1
    if targets.shape[-1] != size:
        targets = torch.nn.functional.interpolate(targets, size=size, mode="bilinear", antialias=True)
    return targets


class TrainingSamples(Dataset):
    """Samples by (epoch, index, row): one picture, one of its captions, false captions where the reader has them, mined wrong ones."""

    def __init__(
        self,
        pairs: Pairs,
        processor: Processor,
        *,
        seed: int,
        mirror: bool,
        target_size: int | None,
        cache: SplitFeatures | None,
        crop: float = 1.0,
        false_captions: int = 1,
        mined: Negatives | None = None,
        hard_texts: int = 1,
        hard_images: int = 1,
        categories: Sequence[str] = (),
    ):
        self.labels = one_hot(categories_of(pairs), categories) if categories else None
        self.mined, self.hard_texts, self.hard_images = mined, hard_texts, hard_images
        self.pairs, self.processor, self.seed, self.false_captions = pairs, processor, seed, false_captions
        self.mirror, self.crop, self.target_size, self.cache = mirror, crop, target_size, cache
        self.arrays: dict[int, Tensor] = {}

    def array(self, index: int) -> Tensor:
        """The picture at the model's size, uint8 [3, S, S], decoded once."""
        if index not in self.arrays:
            self.arrays[index] = torch.as_tensor(self.processor.image_array(self.pairs.image(index)))
        return self.arrays[index]

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        epoch, index, row = key
        draw = random.Random(f"{self.seed}-{epoch}-{index}")
        captions = self.pairs.captions(index)
        chosen = (draw.randrange(len(captions)) + row) % len(captions)
        caption = captions[chosen]
        false = self.pairs.negatives(index, chosen)
        turned = self.mirror and draw.random() < 0.5
        sample: dict[str, Any] = {
            "index": index,
            "image_id": self.pairs.image_id(index),
            "text_id": index * 1000 + chosen,
            "caption": caption,
            "false": draw.sample(false, min(self.false_captions, len(false))),
        }
        sample["false_logits"] = [math.nan] * len(sample["false"])
        if self.mined is not None:
            texts, images = self.mined.texts.get(index, []), self.mined.images.get((index, chosen), [])
            for j, c, score in draw.sample(texts, min(self.hard_texts, len(texts))):
                sample["false"].append(self.pairs.captions(j)[c])
                sample["false_logits"].append(score)
            sample["wrong"] = draw.sample(images, min(self.hard_images, len(images)))
            sample["match_logit"] = self.mined.own.get((index, chosen), 0.0)  # nobody asks where there is no negative
        # A false caption could become true of the mirror image.
        sample["mirrored"] = turned and not any(map(names_a_side, [caption, *sample["false"]]))
        if self.cache is None or self.cache.images is None or self.target_size is not None:
            array = self.array(index)
            array = array.flip(-1) if sample["mirrored"] else array
            sample["array"] = array if self.crop == 1 else cropped(array, self.crop, draw)
        return sample

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        captions = [s["caption"] for s in samples]
        false = [caption for s in samples for caption in s["false"]]
        # Together, so that true and false captions are padded to one length.
        ids, mask = self.processor.texts(captions + false)
        batch: Batch = {
            "image_id": torch.tensor([s["image_id"] for s in samples]),
            "text_id": torch.tensor([s["text_id"] for s in samples]),
            "text": ids[: len(samples)],
            "text_mask": mask[: len(samples)],
        }
        if self.labels is not None:
            batch["labels"] = self.labels[[s["index"] for s in samples]]
        places = self.false_captions + (self.hard_texts if self.mined is not None else 0)
        if self.processor.writer is not None:
            batch["caption"], batch["caption_mask"] = self.processor.writer.captions(captions)
        if false or (self.mined is not None and places):
            given = torch.tensor([[k < len(s["false"]) for k in range(places)] for s in samples])  # [B, K]
            batch["negative_text"] = ids.new_zeros(*given.shape, ids.shape[1])  # [B, K, L]
            batch["negative_mask"] = mask.new_zeros(batch["negative_text"].shape)
            batch["negative_text"][given], batch["negative_mask"][given] = ids[len(samples) :], mask[len(samples) :]
        if self.cache is not None:
            batch |= self._cached_texts(captions, false, batch)
        if self.mined is not None:
            batch |= self._mined_images(samples)
            if self.mined.judged_by_match:
                batch["match_logit"] = torch.tensor([s["match_logit"] for s in samples])
                if places:
                    batch["negative_text_logit"] = torch.full(given.shape, math.nan)
                    batch["negative_text_logit"][given] = torch.tensor([x for s in samples for x in s["false_logits"]])
        if self.cache is not None and self.cache.images is not None:
            batch |= self.cache.image([s["index"] for s in samples], [s["mirrored"] for s in samples])
        else:
            batch["image"] = self.processor.pixels([s["array"] for s in samples])
        if self.target_size is not None:
            batch["target"] = as_targets(torch.stack([s["array"] for s in samples]), self.target_size)
        return batch

    def _cached_texts(self, captions: list[str], false: list[str], batch: Batch) -> Batch:
        """Features of the captions, and of the false ones where all of them are some picture's captions."""
        assert self.cache is not None
        out: Batch = {}
        if (features := self.cache.text(captions, batch["text_mask"])) is not None:
            out["text_features"] = features
        if false:
            mask = batch["negative_mask"]
            given = mask.any(dim=-1)
            if (features := self.cache.text(false, mask[given])) is not None:
                out["negative_text_features"] = features.new_zeros(*mask.shape, features.shape[-1])  # [B, K, L, C]
                out["negative_text_features"][given] = features
        return out

    def _mined_images(self, samples: list[dict[str, Any]]) -> Batch:
        """The pictures that are wrong for each caption, [B, K, ...], with what is known of them."""
        assert self.mined is not None
        if not self.hard_images:
            return {}
        given = torch.tensor([[k < len(s["wrong"]) for k in range(self.hard_images)] for s in samples])  # [B, K]
        rows = [j for s in samples for j, _ in s["wrong"]]
        shown = rows or [samples[0]["index"]]  # of some picture, for its shape
        if self.cache is not None and self.cache.images is not None:
            pictures = {f"negative_{key}": part for key, part in self.cache.image(shown).items()}
        else:
            pictures = {"negative_image": self.processor.pixels([self.array(j) for j in shown])}
        out: Batch = {"negative_image_mask": given}
        out |= {key: _at_places(part, given) for key, part in pictures.items()}
        if self.mined.judged_by_match:
            out["negative_image_logit"] = torch.full(given.shape, math.nan)
            out["negative_image_logit"][given] = torch.tensor([score for s in samples for _, score in s["wrong"]])
        return out


def _at_places(rows: Any, given: Tensor) -> Any:
    """Rows [G, ...], or named ones, at the places that are True in `given` [B, K], zeros elsewhere."""
    if isinstance(rows, dict):
        return {name: _at_places(part, given) for name, part in rows.items()}
    out = rows.new_zeros(*given.shape, *rows.shape[1:])
    out[given] = rows[: int(given.sum())]
    return out


class TrainingLoader:
    """Batches of an endless run, an epoch at a time. Its state is (epoch, step); Lightning saves and restores it.

    Args:
        samples: what is drawn from.
        batch_size: images of a batch, on each rank.
        captions: rows of each image.
        workers: loader processes.
        neighbours: mined neighbours that stand beside each image in its batch, if any.
        rank: which part of the global batch is read here.
        world: number of parts.
        limit: batches of an epoch that the trainer takes, or their share: the next epoch begins after them.
        repeat: every epoch is the first one again (`overfit_batches`).
    """

    def __init__(
        self,
        samples: TrainingSamples,
        *,
        batch_size: int,
        captions: int = 1,
        workers: int,
        neighbours: Tensor | None,
        rank: int,
        world: int,
        limit: int | float = 1.0,
        repeat: bool = False,
    ):
        self.samples, self.batch_size, self.workers, self.neighbours = samples, batch_size, workers, neighbours
        self.captions = captions
        self.rank, self.world, self.limit, self.repeat = rank, world, limit, repeat
        self.epoch, self.step, self.resumed = 0, 0, False
        self.plan()  # too few images are an error now: a trainer would take a loader of length 0 for finished work

    def plan(self) -> list[list[tuple[int, int, int]]]:
        """The epoch's batches for this rank; the global batch is cut in contiguous parts."""
        whole = self.batch_size * self.world
        if self.neighbours is None:
            batches = random_batches(len(self.samples.pairs), whole, self.samples.seed, self.epoch)
        else:
            batches = hard_batches(self.neighbours, whole, self.samples.seed, self.epoch)
        mine = batches[:, self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return [
            [(self.epoch, i, caption) for i in images for caption in range(self.captions)] for images in mine.tolist()
        ]

    def __len__(self) -> int:
        return len(self.samples.pairs) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Batch]:
        if not self.resumed:
            self.step = 0
        self.resumed = False
        loader = DataLoader(
            self.samples,
            batch_sampler=self.plan()[self.step :],
            collate_fn=self.samples.collate,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(
                0
            ),  # or each iterator would draw a seed from the training's random state
        )
        for batch in loader:
            self.step += 1
            if self.step == self._taken():  # before the last batch: who knows the length asks for nothing after it
                self.epoch, self.step = self.epoch + (not self.repeat), 0
            yield batch

    def _taken(self) -> int:
        """Batches of an epoch that the trainer takes."""
        return min(self.limit, len(self)) if isinstance(self.limit, int) else int(self.limit * len(self))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step, "world": self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["world"] != self.world:
            raise ValueError(
                f"the run was stopped with {state['world']} processes and goes on with {self.world}: its batches would be others; "
                "start as many as before, or begin anew from its weights (init_from)"
            )
        self.epoch, self.step, self.resumed = state["epoch"], state["step"], True


class PairData(pl.LightningDataModule):
    """Image-text pairs for training and evaluation.

    Args:
        train: training split.
        val: validation split.
        test: test split.
        tokenizer: a local folder or Hub id of a tokenizer, or `scenes` for the embedded one. None takes that of the checkpoint which
            the training starts from, or without one the embedded one.
        batch_size: images per step and rank, one caption each.
        seed: what every random choice of the data follows from.
        mirror: mirror pictures at random, except where the caption, or a false one beside it, names a side (`names_a_side`).
        crop: least share of a picture's area that is shown, a random part of it each time; 1 shows the whole.
        feature_cache: folder of what frozen towers make of the splits; None runs the towers each time.
        cached_features: which towers' features it keeps.
        feature_precision: `half` (float16), or `int8` with a scale for each token, in half the space.
        target_size: side of the picture to generate; None leaves the target out.
        false_captions: the reader's own false captions shown with each picture, where it has them.
        captions_per_image: rows of a batch that show the same image, each with its next caption; an image with fewer shows one again.
        noise: share of the training captions that are replaced by those of other images on purpose, for what learns to live with them.
        hard_neighbours: mined neighbours that stand beside each image in its batch; 0 draws batches at random.
        negatives: file of hard negatives of the training split (`unimodal mine`); in a schedule also the name of a stage that mines.
        hard_texts: captions of that file shown with each picture, drawn anew in every epoch.
        hard_images: pictures of that file shown with each caption.
        workers: loader processes.
    """

    def __init__(
        self,
        train: Pairs | None = None,
        val: Pairs | None = None,
        test: Pairs | None = None,
        tokenizer: str | None = None,
        batch_size: int = 64,
        seed: int = 0,
        mirror: bool = False,
        crop: float = 1.0,
        feature_cache: str | None = None,
        cached_features: tuple[Literal["image", "text"], ...] = ("image",),
        feature_precision: Precision = "half",
        target_size: int | None = None,
        false_captions: int = 1,
        captions_per_image: int = 1,
        noise: float = 0.0,
        hard_neighbours: int = 0,
        negatives: str | None = None,
        hard_texts: int = 1,
        hard_images: int = 1,
        workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < crop <= 1:
            raise ValueError(f"data.crop: expected a share of the picture's area above 0 and at most 1, got {crop}")
        if crop < 1 and feature_cache is not None and "image" in cached_features:
            raise ValueError(
                f"data.crop is {crop}, but data.feature_cache keeps what the image tower makes of whole pictures, which would be "
                "shown whole. Set data.crop to 1, or data.feature_cache to null for this stage"
            )
        self.train, self.val, self.test, self.crop = train, val, test, crop
        self.tokenizer, self.batch_size, self.seed, self.mirror = tokenizer, batch_size, seed, mirror
        self.feature_cache, self.target_size, self.workers = feature_cache, target_size, workers
        self.cached_features, self.feature_precision = cached_features, feature_precision
        self.false_captions, self.hard_neighbours = false_captions, hard_neighbours
        self.captions_per_image, self.noise = captions_per_image, noise
        self.negatives, self.hard_texts, self.hard_images = negatives, hard_texts, hard_images
        self.neighbours: Tensor | None = None
        self.processor: Processor | None = None
        self.categories: Sequence[str] = ()
        self.caches: dict[str, SplitFeatures] = {}

    def setup(self, stage: str) -> None:
        self.require_files()

    def require_files(self) -> None:
        """Look whether the pictures of every split are there, before any work is spent on one of them.

        Raises:
            FileNotFoundError: names the split, and files that are not there.
        """
        for pairs in (self.train, self.val, self.test):
            if isinstance(pairs, Listed):
                pairs.require_files()

    def bind(
        self, config: ModelConfig, backbone: Any, language_captioner: Any = None, start: Processor | None = None
    ) -> Processor:
        """Fit the preprocessing to a model, and open (or build) the feature caches of its towers.

        Args:
            config: the model's.
            backbone: the model's.
            language_captioner: the model's head that writes by a language model (`unimodal.heads.LanguageModelCaptioner`), if it has one.
            start: the processor of the checkpoint that the model comes from.

        Raises:
            ValueError: `tokenizer` is another one than that of `start`.
        """
        if start is not None:
            self._require_tokenizer(start)
        if config.system is not None:
            self.categories = config.system.categories
        self.processor = self._processor(config, backbone) if start is None else start
        needs_writer = language_captioner is not None and self.processor.writer is None
        if needs_writer and config.captioning and (named := config.captioning.language_model):
            if named.source is None:
                raise ValueError(
                    "captioning.language_model.source: training needs the folder or Hub id of its tokenizer, got None"
                )
            folder = find_published(named.source, named.revision)
            self.processor.writer = open_writer(folder, config.captioning, language_captioner)
        if self.feature_cache is not None:
            for split, pairs in (("train", self.train), ("val", self.val), ("test", self.test)):
                if pairs is not None and split not in self.caches:
                    self.caches[split] = self._cached(pairs, backbone, training=split == "train")
        return self.processor

    def _cached(self, pairs: Pairs, backbone: Backbone, *, training: bool) -> SplitFeatures:
        assert self.feature_cache is not None and self.processor is not None
        place = Path(self.feature_cache), pairs, backbone, self.processor
        device = self.trainer.strategy.root_device if self.trainer else None
        settings: dict[str, Any] = {"precision": self.feature_precision, "device": device}
        if training and self.trainer is not None and self.trainer.precision == "bf16-mixed":
            settings["autocast"] = (
                torch.bfloat16
            )  # as the towers would run without the cache; evaluation runs in float32
        out = SplitFeatures()
        if "image" in self.cached_features:
            out.images = ImageFeatures(*place, **settings)
            out.mirrored = ImageFeatures(*place, **settings, mirrored=True) if self.mirror and training else None
        if "text" in self.cached_features and not is_gallery(pairs):
            out.texts = TextFeatures(*place, **settings)
        return out

    def require_frozen(self, backbone: Backbone) -> None:
        """Refuse to cache what a tower makes while it trains.

        Raises:
            ValueError: names a parameter that trains.
        """
        for kind in self.cached_features if self.feature_cache is not None else ():
            if names := trained(backbone, kind):
                raise ValueError(
                    f"data.feature_cache keeps what the {kind} tower makes, and this stage trains {len(names)} of its parameters, for "
                    f"example backbone.{names[0]}: they would train without effect. Freeze them in model.trainable, leave {kind!r} out "
                    "of data.cached_features, or set data.feature_cache to null for this stage"
                )

    def _processor(self, config: ModelConfig, backbone: Any) -> Processor:
        vision, published = config.backbone.vision, config.backbone.published
        if published is not None:
            if published.source is None:
                raise ValueError(
                    "backbone.published.source: training needs the folder or Hub id of its preprocessing, got None"
                )
            return open_processor(find_published(published.source, published.revision), backbone)
        return Processor(
            self._tokenizer(),
            image_size=vision.image_size,
            mean=vision.mean,
            std=vision.std,
            max_length=config.backbone.text.max_length,
        )

    def _tokenizer(self) -> Any:
        named = self.tokenizer or "scenes"
        return scenes_tokenizer() if named == "scenes" else AutoTokenizer.from_pretrained(named)

    def _require_tokenizer(self, start: Processor) -> None:
        if self.tokenizer is not None and self._tokenizer().get_vocab() != start.tokenizer.get_vocab():
            raise ValueError(
                f"data.tokenizer is {self.tokenizer!r}, and the checkpoint that the training starts from has learned the ids of another "
                "tokenizer; leave data.tokenizer out, and the checkpoint's own is taken"
            )

    def targets(self, count: int, size: int) -> Tensor:
        """The first `count` training pictures as targets [count, 3, size, size] in [-1, 1]."""
        assert self.train is not None and self.processor is not None
        return as_targets(torch.stack([self.processor.image_array(self.train.image(i)) for i in range(count)]), size)

    def train_dataloader(self) -> TrainingLoader:
        if self.train is None:
            raise ValueError(
                "training needs data.train; name a reader, for example {class_path: unimodal.data.Scenes, init_args: {split: train}}"
            )
        require_captions(self.train, "training")
        if self.processor is None:
            raise RuntimeError("PairData.bind(config, backbone) must run before its loaders are made")
        samples = TrainingSamples(
            NoisyCaptions(self.train, Noise(self.noise, seed=self.seed)) if self.noise else self.train,
            self.processor,
            seed=self.seed,
            mirror=self.mirror,
            crop=self.crop,
            target_size=self.target_size,
            cache=self.caches.get("train"),
            false_captions=self.false_captions,
            mined=None if self.negatives is None else read_negatives(self.negatives, self.train),
            hard_texts=self.hard_texts,
            hard_images=self.hard_images,
            categories=self.categories,
        )
        if self.hard_neighbours and self.neighbours is None:
            raise RuntimeError("hard_neighbours asks for mined neighbours, which the task mines in its setup")
        trainer: Any = self.trainer
        loader = TrainingLoader(
            samples,
            batch_size=self.batch_size,
            captions=self.captions_per_image,
            workers=self.workers,
            neighbours=self.neighbours,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            limit=trainer.limit_train_batches if trainer else 1.0,
            repeat=bool(trainer and trainer.overfit_batches),
        )
        if trainer and not loader.repeat:
            loader.epoch = trainer.current_epoch  # a trainer may make its loaders anew in every epoch
        return loader

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("val", self.val, purpose="validation")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test", self.test, purpose="testing")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test", self.test)

    def mining_dataloader(self) -> DataLoader:
        """The training split in order, for mining."""
        return self._evaluation_loader("train", self.train)

    def _evaluation_loader(self, split: str, pairs: Pairs | None, purpose: str | None = None) -> DataLoader:
        if pairs is None:
            raise ValueError(f"this run reads data.{split}, which is not configured; name a reader for it")
        if purpose is not None:
            require_captions(pairs, purpose)
        if self.processor is None:
            raise RuntimeError("PairData.bind(config, backbone) must run before its loaders are made")
        rows = [list(range(i, min(i + self.batch_size, len(pairs)))) for i in range(0, len(pairs), self.batch_size)]
        return DataLoader(EvaluationBatches(pairs, self.processor, rows, self.caches.get(split)), batch_size=None)


class EvaluationBatches(Dataset):
    """Whole rows of a split in order: every picture with all of its captions, whose `text_image_id` says which picture each is of.
    Batches of a gallery have pictures only."""

    def __init__(self, pairs: Pairs, processor: Processor, rows: list[list[int]], cache: SplitFeatures | None) -> None:
        self.pairs, self.processor, self.rows, self.cache = pairs, processor, rows, cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Batch:
        rows = self.rows[step]
        captions = [(i, caption) for i in rows for caption in self.pairs.captions(i)]
        batch: Batch = {"image_id": torch.tensor([self.pairs.image_id(i) for i in rows])}
        if captions:
            batch["text"], batch["text_mask"] = self.processor.texts([caption for _, caption in captions])
            batch["text_image_id"] = torch.tensor([self.pairs.image_id(i) for i, _ in captions])
            texts = None if self.cache is None else self.cache.text([text for _, text in captions], batch["text_mask"])
            if texts is not None:
                batch["text_features"] = texts
        if self.cache is not None and self.cache.images is not None:
            batch |= self.cache.image(rows)
        else:
            batch["image"] = self.processor.images([self.pairs.image(i) for i in rows])
        return batch
