"""Random calls of the public interface with arguments that are wrong in every way, and what an honest answer to one is.

A call either gives a sane result, or raises a ValueError, TypeError or OSError by a `raise` of our own with words of our own. Everything
else is a complaint: another exception, one that Python or another library raised, numbers that are not finite, or no end.
"""

import ast
import datetime
import enum
import functools
import io
import itertools
import linecache
import math
import random
import re
import signal
import tarfile
import traceback
import warnings
from collections import Counter, UserDict, UserList
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from toy import IMAGE_SIZE, toy_model, toy_processor

import unimodal
from unimodal import metrics
from unimodal.data import CsvTable, ImageFolder, JsonLines, KarpathyJson, WebDatasetTars, load_image
from unimodal.data.scenes.symbols import sample_scene
from unimodal.inference import Unimodal
from unimodal.search import Calibration, Index, build_index, calibrate, dequantise, index_folder, quantise
from unimodal.search.calibrate import held_out_check

PACKAGE = str(Path(unimodal.__file__).parent)
SECONDS = 20  # that a call may take
NAN, INF = float("nan"), float("inf")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


class Unlisted:
    """A list, a path and an array that it is not."""

    def __iter__(self) -> Any:
        raise KeyError("no members")

    def __len__(self) -> int:
        raise OverflowError("no length")

    def __fspath__(self) -> str:
        raise AttributeError("no path")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no numbers")

    def __bool__(self) -> bool:
        raise LookupError("neither")


class Mode(enum.IntEnum):
    ON = 1


def _failing() -> Iterator[str]:
    yield "a"
    raise KeyError("no more")


def _nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


# Made anew for each call, since some are used up by it.
POOL: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: 0,
    lambda: -1,
    lambda: 1,
    lambda: 7,
    lambda: 10**9,
    lambda: 2**63,
    lambda: 10**30,
    lambda: 10**5000,
    lambda: 0.5,
    lambda: -0.0,
    lambda: 1e300,
    lambda: NAN,
    lambda: INF,
    lambda: 1j,
    lambda: "",
    lambda: " ",
    lambda: "a",
    lambda: "a red circle",
    lambda: "\ud800 a",
    lambda: "a\0b",
    lambda: "\0",
    lambda: "a" * 100_000,
    lambda: "missing.png",
    lambda: "nowhere/at/all",
    lambda: "https://example.com/a",
    lambda: "http://[",
    lambda: "file:///missing.png",
    lambda: "data:image/png;base64,AAAA",
    lambda: "{}{0}{a}%s",
    lambda: b"",
    lambda: b"a",
    lambda: bytearray(b"a"),
    lambda: memoryview(b"a"),
    object,
    lambda: Unprintable(),
    lambda: len,
    lambda: int,
    lambda: lambda *a, **k: None,
    lambda: set(),
    lambda: {1, "a"},
    lambda: frozenset({1}),
    lambda: iter([]),
    lambda: (x for x in ["a red circle"]),
    lambda: (x for x in [1, None]),
    lambda: _failing(),
    lambda: itertools.repeat("a"),
    lambda: itertools.count(),
    lambda: Decimal("0.5"),
    lambda: Fraction(1, 2),
    lambda: datetime.date(2026, 12, 1),
    lambda: re.compile("a"),
    lambda: slice(1),
    lambda: Mode.ON,
    lambda: Unlisted(),
    lambda: io.BytesIO(b"a"),
    lambda: io.StringIO("a"),
    lambda: UserDict({"a": 1}),
    lambda: UserList(["a"]),
    lambda: range(3),
    lambda: [],
    lambda: (),
    lambda: [None],
    lambda: ["a"],
    lambda: ["a", "b", "c"],
    lambda: ["a", 1],
    lambda: [[]],
    lambda: [1, 2, 3],
    lambda: [0.5, NAN],
    lambda: [[1.0, 2.0], [3.0]],
    lambda: [True],
    lambda: [10**30],
    lambda: _nested(3),
    lambda: _nested(400),
    dict,
    lambda: {"a": 1},
    lambda: {1: 2},
    lambda: {"image": None},
    lambda: {"text": 3},
    lambda: {"text": "a", "image": []},
    lambda: {"video": ["missing.png"], "fps": NAN},
    lambda: [{"year": NAN}],
    lambda: [{"year": 1}, {"year": "a"}],
    lambda: np.int64(1),
    lambda: np.float32(0.5),
    lambda: np.float64(NAN),
    lambda: np.bool_(True),
    lambda: np.str_("a"),
    lambda: np.datetime64("2026-12-01"),
    lambda: np.array(1),
    lambda: np.array([]),
    lambda: np.zeros((0, 16), np.float32),
    lambda: np.array(["a", "b"]),
    lambda: np.array([object(), None]),
    lambda: np.array([[NAN] * 16], np.float32),
    lambda: np.full((2, 16), INF),
    lambda: np.full((1, 16), 1e300),
    lambda: np.ones((2, 16), np.float16),
    lambda: np.ones((2, 16), np.longdouble),
    lambda: np.ones((2, 3, 4, 5)),
    lambda: np.eye(3, dtype=np.int8),
    lambda: np.eye(2, dtype=bool),
    lambda: np.array([1 + 1j]),
    lambda: np.arange(16, dtype=">f4"),
    lambda: np.zeros((2, 16), np.float32)[:, ::-1],
    lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
    lambda: np.zeros(2, dtype=[("a", "i4")]),
    lambda: torch.tensor(1),
    lambda: torch.tensor(NAN),
    lambda: torch.tensor([]),
    lambda: torch.tensor([1, 2]),
    lambda: torch.tensor([True, False]),
    lambda: torch.ones(2, 16, dtype=torch.float16),
    lambda: torch.ones(2, 16, dtype=torch.bfloat16),
    lambda: torch.ones(2, 3, 16),
    lambda: torch.ones(2, 16, requires_grad=True),
    lambda: torch.full((2, 16), NAN),
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.ones(2, device="meta"),
    lambda: torch.ones(2, dtype=torch.complex64),
    lambda: torch.zeros(0, 3, 8, 8),
    lambda: torch.float32,
    lambda: torch.int8,
    lambda: torch.device("meta"),
    lambda: "cuda:99",
    lambda: "gpu",
    lambda: "cpu",
    lambda: torch.Generator(),
    lambda: [torch.Generator()],
    lambda: torch.nn.Linear(1, 1),
    lambda: np.random.default_rng(0),
    lambda: Path("missing.png"),
    lambda: Path("nowhere"),
    lambda: Path("."),
    lambda: Path(""),
    lambda: Path("a" * 5000),
    lambda: "a" * 5000 + ".png",
    lambda: Image.new("RGB", (1, 1)),
    lambda: Image.new("RGB", (0, 4)),
    lambda: ValueError("an error"),
    lambda: NotImplemented,
    lambda: ...,
]


@dataclass
class Door:
    """A public function.

    Args:
        call: takes the arguments by name.
        good: a value for each argument, made anew for each call; what a call starts from.
        sane: says what is wrong with a result, or nothing.
        rare: whether each call costs so much that few are made.
    """

    call: Callable[..., Any]
    good: dict[str, Callable[[], Any]]
    sane: Callable[[Any], str | None] = lambda result: None
    rare: bool = False


def _finite(result: Any) -> str | None:
    """A complaint about numbers that are not finite, anywhere in a result."""
    if isinstance(result, np.ndarray) and result.dtype.kind == "f":
        return None if np.isfinite(result).all() else "numbers that are not finite"
    if isinstance(result, torch.Tensor) and result.is_floating_point():
        return None if bool(result.isfinite().all()) else "numbers that are not finite"
    if isinstance(result, float | np.floating):
        return None if math.isfinite(result) else f"the number {result}"
    if isinstance(result, dict):
        return next(filter(None, map(_finite, result.values())), None)
    if isinstance(result, list | tuple):
        return next(filter(None, map(_finite, result)), None)
    if isinstance(result, metrics.Result):
        return _finite(result.scores())
    return None


def _cosines(result: torch.Tensor) -> str | None:
    if result.dtype != torch.float32 or result.ndim != 2:
        return f"cosines {list(result.shape)} of {result.dtype}"
    if result.numel() and not bool((result.abs() <= 1).all()):
        return f"a cosine of {result.abs().max()}"
    return None


def _texts(result: Any) -> str | None:
    texts = result if isinstance(result, list) else [result]
    return None if all(isinstance(one, str) for one in texts) else f"{result!r:.80} for captions"


def _pictures(result: Any) -> str | None:
    return None if all(isinstance(one, Image.Image) for one in result.images) else "no pictures"


class Doors:
    """The public interface around a toy model, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = Unimodal(toy_model(), toy_processor(), prompts={"query": "find "})
        self.folder = folder
        self.picture = Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        )
        (folder / "pictures").mkdir()
        self.picture.save(folder / "pictures" / "a.png")
        (folder / "pictures" / "a.txt").write_text("a red circle\n")
        (folder / "a.jsonl").write_text('{"image": "pictures/a.png", "caption": "a red circle", "split": "train"}\n')
        (folder / "a.csv").write_text("image,caption,split\npictures/a.png,a red circle,train\n")
        (folder / "a.json").write_text(
            '{"images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": "a red circle"}]}]}'
        )
        self.model.save_pretrained(folder / "model", example=False)
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name in ("a.png", "a.txt"):
                tar.add(folder / "pictures" / name, name)
        self.scene = sample_scene(random.Random(0), "train", 2)
        self.index = self._index()
        self.index.save(folder / "index")
        self.calibration = calibrate(torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([True, True, False, False]))
        self.calibration.save(folder / "calibration.json")
        self.protocol = metrics.Protocol(dataset="mine", split="test", fingerprint="0", images=2, captions=4)
        self.ranks = metrics.Ranks(
            self.protocol, torch.tensor([1, 2, 1, 2]), torch.tensor([1, 2]), torch.tensor([0, 0, 1, 1])
        )
        metrics.save_ranks(folder / "ranks.safetensors", {"first": self.ranks})
        self.candidates = metrics.candidates_from_scores(torch.rand(2, 3), torch.eye(2, 3, dtype=torch.bool), 2)
        self.retrieved = metrics.retrieval_metrics(
            torch.eye(2, 16), torch.eye(2, 16).repeat_interleave(2, 0), [0, 0, 1, 1], protocol=self.protocol
        )
        self.report = metrics.SceneReport(*[1.0] * 7)

    def _index(self) -> Index:
        items = [self.picture, self.picture]
        return self.model.build_index(items, metadata=[{"year": 1, "place": "Oslo"}, {"year": 2, "place": "Rome"}])

    def _changed(self, method: str) -> Callable[..., Any]:
        """A method that changes the index, which is built anew where it did."""

        def call(**options: Any) -> None:
            getattr(self.index, method)(**options)
            self.index = self._index()

        return call

    def of_model(self) -> dict[str, Door]:
        m, vectors = self.model, np.eye(2, 16, dtype=np.float32)
        none: Callable[[], Any] = lambda: None  # noqa: E731
        encode = {
            "inputs": lambda: ["a red circle", "a star"],
            "prompt_name": none,
            "prompt": none,
            "batch_size": lambda: 2,
            "show_progress_bar": lambda: False,
            "precision": lambda: "float32",
            "convert_to_numpy": lambda: True,
            "convert_to_tensor": lambda: False,
            "device": lambda: "cpu",
            "normalize_embeddings": lambda: True,
            "truncate_dim": none,
            "adapter": none,
        }
        pair = {"batch_size": lambda: 2, "show_progress_bar": lambda: False, "prompt": none}
        return {
            "encode": Door(m.encode, encode, _finite),
            "encode_query": Door(m.encode_query, {**encode, "prompt_name": lambda: "query"}, _finite),
            "similarity": Door(m.similarity, {"a": lambda: vectors, "b": lambda: vectors}, _cosines),
            "predict": Door(
                m.predict,
                {"inputs": lambda: [(self.picture, "a star")], "activation_fn": none, **pair},
                _finite,
            ),
            "rank": Door(
                m.rank,
                {
                    "query": lambda: "a star",
                    "documents": lambda: [self.picture],
                    "top_k": lambda: 1,
                    "return_documents": lambda: True,
                    **pair,
                },
            ),
            "caption": Door(
                m.caption,
                {
                    "images": lambda: [self.picture],
                    "max_new_tokens": lambda: 3,
                    "num_beams": lambda: 1,
                    "candidates": lambda: 1,
                    "match_scale": lambda: 0.1,
                    "batch_size": lambda: 2,
                    "prompt": none,
                    "do_sample": lambda: False,
                    "temperature": lambda: 1.0,
                    "top_p": lambda: 1.0,
                    "generator": none,
                    "length_penalty": lambda: 1.0,
                },
                _texts,
            ),
            "answer": Door(
                m.answer,
                {
                    "images": lambda: self.picture,
                    "questions": lambda: "what?",
                    "prompt": none,
                    "max_new_tokens": lambda: 3,
                    "num_beams": lambda: 1,
                },
                _texts,
            ),
            "generate_image": Door(
                m.generate_image,
                {
                    "prompt": lambda: "a star",
                    "num_inference_steps": lambda: 1,
                    "guidance_scale": lambda: 1.0,
                    "generator": none,
                    "num_images_per_prompt": lambda: 1,
                    "batch_size": lambda: 2,
                },
                _pictures,
            ),
            "explain": Door(
                m.explain,
                {"image": lambda: self.picture, "text": lambda: "a star", "steps": lambda: 2, "batch_size": lambda: 2},
            ),
            "to": Door(m.to, {"device": lambda: "cpu", "dtype": lambda: torch.float32}),
            "set_adapter": Door(m.set_adapter, {"name": none}),
            "load_adapter": Door(m.load_adapter, {"name_or_path": lambda: "nowhere", "name": none}),
            "supports": Door(m.supports, {"modality": lambda: "image"}),
            "Unimodal": Door(Unimodal, {"model": lambda: m.model, "processor": lambda: m.processor, "prompts": none}),
            "load_image": Door(load_image, {"item": lambda: self.picture, "max_pixels": none, "timeout": lambda: 1.0}),
        }

    def of_search(self) -> dict[str, Door]:
        m = self.model
        none: Callable[[], Any] = lambda: None  # noqa: E731
        read = {"batch_size": lambda: 2, "on_error": lambda: "raise", "show_progress_bar": lambda: False}
        search = {
            "queries": lambda: "a star",
            "top_k": lambda: 2,
            "rerank_top_k": lambda: 2,
            "filter": none,
            "combine": none,
            "match_scale": none,
            "batch_size": lambda: 2,
            "prompt": none,
        }
        codes = np.ones((2, 16), np.int8)
        logits, labels = torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([True, True, False, False])
        return {
            "build_index": Door(
                functools.partial(build_index, m.encoder),
                {
                    "documents": lambda: [self.picture],
                    "ids": none,
                    "precision": lambda: "int8",
                    "backend": lambda: "exact",
                    "first_precision": lambda: "float32",
                    "first_width": none,
                    "metadata": none,
                    "uri": none,
                    "folder": none,
                    "prompt": none,
                    **read,
                },
            ),
            "index.search": Door(lambda **options: self.index.search(**options), search, _finite),
            "model.search": Door(m.search, {**search, "index": lambda: self.index}, _finite),
            "index.search filter": Door(
                lambda filter: self.index.search("a star", filter=filter), {"filter": lambda: "year = 1"}, _finite
            ),
            "index.add": Door(
                self._changed("add"),
                {
                    "documents": lambda: [self.picture],
                    "ids": lambda: ["new"],
                    "metadata": none,
                    "replace": lambda: False,
                    **read,
                },
            ),
            "index.delete": Door(self._changed("delete"), {"ids": lambda: [0]}),
            "index.save": Door(lambda folder: self.index.save(folder), {"folder": lambda: "other"}),
            "Index.load": Door(Index.load, {"folder": lambda: self.folder / "index", "encoder": lambda: m.encoder}),
            "load_index": Door(m.load_index, {"folder": lambda: self.folder / "index"}),
            "index_folder": Door(
                functools.partial(index_folder, m.encoder),
                {"folder": lambda: self.folder / "pictures", "kept_in": none, "batch_size": lambda: 2},
            ),
            "quantise": Door(
                quantise, {"x": lambda: np.eye(2, 16, dtype=np.float32), "precision": lambda: "int8"}, _finite
            ),
            "dequantise": Door(dequantise, {"codes": lambda: codes, "precision": lambda: "int8"}, _finite),
            "calibrate": Door(calibrate, {"logits": lambda: logits, "labels": lambda: labels, "model": lambda: ""}),
            "held_out_check": Door(
                held_out_check,
                {
                    "logits": lambda: logits.repeat(8),
                    "labels": lambda: labels.repeat(8),
                    "image_id": lambda: torch.arange(8).repeat_interleave(4),
                    "precisions": lambda: [0.5],
                    "seed": lambda: 0,
                },
            ),
            "Calibration": Door(
                Calibration,
                {
                    "scale": lambda: 1.0,
                    "offset": lambda: 0.0,
                    "pairs": lambda: 4,
                    "positives": lambda: 2,
                    "error_before": lambda: 0.1,
                    "error_after": lambda: 0.1,
                    "curve": lambda: ((0.1, 0.2),),
                    "model": lambda: "",
                },
            ),
            "Calibration.load": Door(Calibration.load, {"path": lambda: self.folder / "calibration.json"}),
            "threshold_for": Door(self.calibration.threshold_for, {"precision": lambda: 0.1}, _finite),
            "probability": Door(self.calibration.probability, {"logits": lambda: logits}, _finite),
        }

    def of_files(self) -> dict[str, Door]:
        none: Callable[[], Any] = lambda: None  # noqa: E731
        return {
            "from_pretrained": Door(
                Unimodal.from_pretrained,
                {
                    "name_or_path": lambda: self.folder / "model",
                    "device": none,
                    "dtype": none,
                    "revision": none,
                    "cache_folder": none,
                    "local_files_only": lambda: True,
                    "token": none,
                    "heads": none,
                },
                rare=True,
            ),
            "save_pretrained": Door(
                self.model.save_pretrained,
                {
                    "folder": lambda: "saved",
                    "example": lambda: False,
                    "precision": lambda: "float32",
                    "max_shard_size": lambda: "2GB",
                    "include_backbone": lambda: True,
                    "metrics": lambda: (),
                    "card": none,
                },
                rare=True,
            ),
        }

    def of_readers(self) -> dict[str, Door]:
        none: Callable[[], Any] = lambda: None  # noqa: E731
        table = {
            "root": none,
            "split": lambda: "train",
            "image": none,
            "captions": none,
            "labels": none,
            "split_column": lambda: "split",
            "on_error": lambda: "raise",
        }
        return {
            "JsonLines": Door(JsonLines, {"path": lambda: self.folder / "a.jsonl", **table}),
            "CsvTable": Door(CsvTable, {"path": lambda: self.folder / "a.csv", **table, "delimiter": none}),
            "KarpathyJson": Door(
                KarpathyJson,
                {
                    "path": lambda: self.folder / "a.json",
                    "root": lambda: self.folder / "pictures",
                    "split": lambda: "train",
                    "captions_per_image": none,
                    "fold": none,
                    "on_error": lambda: "raise",
                },
            ),
            "ImageFolder": Door(
                ImageFolder,
                {"root": lambda: self.folder, "split": lambda: "pictures", "on_error": lambda: "raise"},
            ),
            "WebDatasetTars": Door(
                WebDatasetTars,
                {"pattern": lambda: self.folder / "*.tar", "split": lambda: "train", "on_error": lambda: "raise"},
            ),
        }

    def of_metrics(self) -> dict[str, Door]:
        none: Callable[[], Any] = lambda: None  # noqa: E731
        image, text = np.eye(2, 16, dtype=np.float32), np.eye(2, 16, dtype=np.float32).repeat(2, 0)
        owner = np.array([0, 0, 1, 1])
        values = [1.0, 2.0, 3.0]
        drawn = {"seed": lambda: 0, "groups": none, "confidence": lambda: 0.9, "samples": lambda: 10}
        candidates, references = ["a red circle", "a star"], [["a circle"], ["a star here"]]
        words = {"candidates": lambda: candidates, "references": lambda: references}
        known: dict[str, Callable[[], Any]] = {
            "colours": lambda: {"red": (255, 0, 0)},
            "backgrounds": lambda: {"white": (255, 255, 255)},
            "shapes": lambda: {"square": np.ones((8, 8))},
            "sizes": lambda: {"small": 0.25},
            "shade": lambda: 0.5,
            "picture": lambda: np.zeros((32, 32, 3), np.uint8),
        }
        search = {
            "image": lambda: image,
            "text": lambda: text,
            "text_image_id": lambda: owner,
            "image_id": none,
            "chunk": lambda: 3,
        }
        return {
            "retrieval_metrics": Door(
                metrics.retrieval_metrics, {**search, "protocol": lambda: self.protocol}, _finite
            ),
            "first_stage": Door(metrics.first_stage, {**search, "k": lambda: 1}),
            "text_to_text": Door(
                metrics.text_to_text,
                {"text": lambda: text, "text_image_id": lambda: owner, "k": lambda: 1, "chunk": lambda: 3},
            ),
            "ranks_from_scores": Door(
                metrics.ranks_from_scores,
                {"scores": lambda: np.eye(2), "relevant": lambda: np.eye(2, dtype=bool)},
            ),
            "candidates_from_scores": Door(
                metrics.candidates_from_scores,
                {"scores": lambda: np.eye(2), "relevant": lambda: np.eye(2, dtype=bool), "k": lambda: 1},
            ),
            "second_stage": Door(
                metrics.second_stage,
                {"candidates": lambda: self.candidates, "scores": lambda: np.ones((2, 2))},
            ),
            "summarise": Door(
                metrics.summarise,
                {
                    "text_to_image": lambda: [1, 2, 1, 1],
                    "image_to_text": lambda: [1, 1],
                    "protocol": lambda: self.protocol,
                },
                _finite,
            ),
            "mean_of_folds": Door(metrics.mean_of_folds, {"folds": lambda: [self.retrieved] * 2}, _finite),
            "relevance_metrics": Door(
                metrics.relevance_metrics,
                {
                    "query": lambda: text,
                    "gallery": lambda: image,
                    "query_label": lambda: owner,
                    "gallery_label": lambda: [0, 1],
                    "direction": lambda: "t2i",
                    "protocol": lambda: self.protocol,
                    "ks": lambda: (1, 5),
                    "chunk": lambda: 3,
                },
                _finite,
            ),
            "relevance_by_label": Door(
                metrics.relevance_by_label,
                {"query_labels": lambda: np.eye(2, dtype=int), "gallery_labels": lambda: np.eye(2, dtype=int)},
            ),
            "bootstrap_interval": Door(
                metrics.bootstrap_interval,
                {
                    "values": lambda: values,
                    "protocol": lambda: self.protocol,
                    "statistic": lambda: np.mean,
                    **drawn,
                },
                _finite,
            ),
            "paired_test": Door(
                metrics.paired_test,
                {
                    "a": lambda: values,
                    "b": lambda: values[::-1],
                    "protocols": lambda: (self.protocol, self.protocol),
                    **drawn,
                },
                _finite,
            ),
            "Ranks": Door(
                metrics.Ranks,
                {
                    "protocol": lambda: self.protocol,
                    "text_to_image": lambda: [1, 2, 1, 2],
                    "image_to_text": lambda: [1, 2],
                    "text_image": lambda: owner,
                },
            ),
            "compare": Door(
                metrics.compare,
                {
                    "a": lambda: self.ranks,
                    "b": lambda: self.ranks,
                    "seed": lambda: 0,
                    "samples": lambda: 5,
                },
            ),
            "ranks.intervals": Door(self.ranks.intervals, {"seed": lambda: 0, "samples": lambda: 5}),
            "save_ranks": Door(
                metrics.save_ranks,
                {"path": lambda: "some.safetensors", "stages": lambda: {"first": self.ranks}},
            ),
            "load_ranks": Door(metrics.load_ranks, {"path": lambda: self.folder / "ranks.safetensors"}),
            "Protocol": Door(
                metrics.Protocol,
                {
                    "dataset": lambda: "mine",
                    "split": lambda: "test",
                    "fingerprint": lambda: "0",
                    "images": lambda: 2,
                    "captions": lambda: 4,
                    "captions_per_image": lambda: 2,
                    "folds": lambda: 1,
                    "stage": lambda: "reranked",
                    "k": lambda: 2,
                    "combine": lambda: "sum",
                    "match_scale": none,
                    "rule": lambda: "hit",
                    "decoding": none,
                },
            ),
            "protocol.reranked": Door(
                self.protocol.reranked, {"k": lambda: 2, "combine": lambda: "sum", "match_scale": none}
            ),
            "require_alike": Door(
                metrics.require_alike, {"protocols": lambda: [self.protocol] * 2, "any_search": lambda: False}
            ),
            "results_table": Door(
                metrics.results_table,
                {"rows": lambda: [("a", self.retrieved)], "any_search": lambda: False, "digits": lambda: 2},
            ),
            "caption_metrics": Door(
                metrics.caption_metrics,
                {
                    **words,
                    "protocol": lambda: metrics.Protocol(dataset="a", split="b", fingerprint="", images=2, captions=2),
                },
                _finite,
            ),
            "cider_d": Door(metrics.cider_d, {**words, "sigma": lambda: 6.0}, _finite),
            "bleu": Door(metrics.bleu, words, _finite),
            "rouge_l": Door(metrics.rouge_l, {**words, "beta": lambda: 1.2}, _finite),
            "tokenize": Door(metrics.tokenize, {"caption": lambda: "a star"}),
            "find_objects": Door(metrics.find_objects, known),
            "check_picture": Door(metrics.check_picture, {**known, "scene": lambda: self.scene}),
            "summarise scenes": Door(metrics.generation.summarise, {"reports": lambda: [self.report]}, _finite),
        }


class TooLong(BaseException):
    """A call did not end."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def _raises(file: str) -> list[tuple[int, int]]:
    """First and last lines of the `raise` statements of a source file."""
    tree = ast.parse("".join(linecache.getlines(file)))
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def complaint(error: BaseException) -> str | None:
    """What is wrong with an exception as an answer; None where it is one of ours with words of ours."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{type(error).__name__}: {str(error)[:150]!r} at {Path(last.filename).name}:{last.lineno}"
    if isinstance(error, TooLong):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"no end within {SECONDS} s at {where}"
    if isinstance(error, OSError) and error.errno is not None:
        return None  # the system's own words name the file
    if not isinstance(error, ValueError | TypeError | OSError):
        return told
    line = last.lineno or 0
    if not last.filename.startswith(PACKAGE) or not any(a <= line <= b for a, b in _raises(last.filename)):
        return told
    if len(str(error)) > 2000:
        return f"{told} has {len(str(error))} characters"
    return None


def fuzz(doors: dict[str, Door], seed: int, count: int) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Complaints about `count` random calls, and how many calls of each door gave a result or were refused."""
    draw = random.Random(seed)
    complaints: Counter[str] = Counter()
    ends: Counter[tuple[str, str]] = Counter()
    names = list(doors)
    weights = [0.1 if doors[name].rare else 1.0 for name in names]
    for _ in range(count):
        name = draw.choices(names, weights)[0]
        door = doors[name]
        values = {key: make() for key, make in door.good.items()}
        wrong = draw.sample(list(values), min(len(values), draw.choice((0, 1, 1, 1, 1, 2, 3))))
        values |= {key: draw.choice(POOL)() for key in wrong}
        said = None
        try:
            with _limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = door.sane(door.call(**values))
            ends[name, "result"] += 1
        except (Exception, TooLong) as error:
            said = complaint(error)
            ends[name, "refused"] += 1
        if said:
            given = ", ".join(f"{key}={_words(values[key])}" for key in wrong)
            complaints[f"{name}: {said} for {given}"] += 1
    return complaints, ends


def _words(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:
        return type(value).__name__
