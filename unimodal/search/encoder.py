"""Items through a model, in batches: an embedding for the index, and the tokens that the matching head reads.

Which tokens these are depends on the head. The cached one reads bridged image tokens and the text tower's tokens; the
one in the bridge (BLIP-2) reads the image tower's tokens and the text's ids. Either way each item is read once, however
many pairs it is part of.

Legend: n items, P pairs, N queries, T image tokens, L text length, D backbone width, W bridge width, E embedding width.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unimodal import arguments
from unimodal.backbones import move_pixels
from unimodal.data.conversation import DESCRIBE
from unimodal.data.images import load_images
from unimodal.data.items import Item
from unimodal.data.processor import Processor
from unimodal.data.texts import unknown_words
from unimodal.draws import SAMPLING, Generators, drawing_from, own_generators
from unimodal.model import ImageState, TextState, UnimodalModel
from unimodal.onednn import inference
from unimodal.search.calibrate import Calibration
from unimodal.search.judge import Judge, plan
from unimodal.tuning import base_name

V = TypeVar("V")

# What neither embedding nor match score depends on: training it leaves an index valid.
OTHER_JOBS = ("heads.captioning.", "heads.generation.", "bridge.query_sets.generate", "bridge.lm_")


@dataclass
class Encoded:
    """What a model read from n items.

    Attributes:
        embedding: [n, E] unit vectors, float32; [n, N, E] for images where the model keeps one vector per query; [n, 0] of a model that
            has no embedding and scores pairs.
        tokens: for each item what the matching head reads of it, [N, W], [T, D], [L, D] or ids [L]; empty for an item
            with both an image and a text, and without a matching head.
    """

    embedding: Tensor
    tokens: list[Tensor]


class Encoder:
    """A model in evaluation mode, its processor, and where it has one the calibration of its match logits."""

    processor: Any

    def __init__(self, model: UnimodalModel, processor: Processor, calibration: Calibration | None = None) -> None:
        self.model, self.processor, self.calibration = model.eval(), processor, calibration

    @property
    def device(self) -> torch.device:
        return self.model.log_scale.device

    @property
    def matches(self) -> bool:
        """Whether pairs are scored from tokens that are kept of each item."""
        return self.model.matcher is not None and not self.model.matcher.whole

    @property
    def judges(self) -> bool:
        """Whether a query and a document are read together, as one conversation; nothing is kept of items."""
        return self.model.matcher is not None and self.model.matcher.whole

    @property
    def writes(self) -> bool:
        """Whether captions are written after whole conversations."""
        return self.model.captioner is not None and self.model.captioner.whole

    def images(self, sources: Sequence[Any]) -> ImageState:
        """Read images in any form that `load_image` takes, as one batch."""
        return self.model.encode_image(self._pixels(sources))

    def texts(self, texts: Sequence[str]) -> TextState:
        """Read texts as one batch."""
        return self.model.encode_text(*self._ids(texts))

    def _pixels(self, sources: Sequence[Any]) -> Any:
        pixels = self.processor.images(load_images(sources))
        return move_pixels(pixels, self.device, self.model.log_scale.dtype)

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.processor.texts(list(texts))
        return ids.to(self.device), mask.to(self.device)

    def check_one_shape(self, items: Sequence[Item]) -> None:
        """Refuse items whose embeddings do not fit one array."""
        if self.model.embedding.pool == "query" and len({item.kind == "text" for item in items}) > 1:
            raise ValueError(
                "this model has one vector per query for an image and a single one for a text, which do not fit one "
                "array; pass images and texts in separate calls"
            )

    def require_readable(self, item: Item, where: str = "") -> None:
        """Refuse what the model cannot read."""
        if unread := [part for part in item.parts or ("empty",) if part not in self.model.modalities]:
            raise ValueError(
                f"{where}this model reads {', '.join(self.model.modalities)}, got {', '.join(unread)}: {item.told}"
            )

    def unknown_words(self, item: Item) -> str:
        """What to say of a text none of whose words the model knows; empty of other items."""
        return unknown_words(self.processor.tokenizer, item.text) if item.kind == "text" and item.text else ""

    @inference()
    def read(self, items: Sequence[Item], prompt: str | None = None, where: Sequence[str] | None = None) -> Encoded:
        """Read one batch of items. An item with image and text has the normalised mean of its two embeddings, unless the backbone reads
        both as one sequence.

        Args:
            items: what to read.
            prompt: put before every text; to a model that is told what an embedding is for, the instruction.
            where: for each item how an error calls it.
        """
        where = [""] * len(items) if where is None else where
        for item, name in zip(items, where):
            self.require_readable(item, name)
        if self.model.backbone.whole:
            return self._read_whole(items, prompt, where)
        items = [item if item.text is None else replace(item, text=(prompt or "") + item.text) for item in items]
        vectors: dict[int, list[Tensor]] = {row: [] for row in range(len(items))}
        tokens: dict[int, list[Tensor]] = {row: [] for row in range(len(items))}
        for kind in ("image", "text"):
            rows = [row for row, item in enumerate(items) if getattr(item, kind) is not None]
            if not rows:
                continue
            values = [getattr(items[row], kind) for row in rows]
            read: Sequence[Tensor] = ()
            if kind == "image" and not self.matches:
                embedding = self.model.embed_images(self._pixels(values))
            elif not self.matches:
                embedding = self.model.embed_texts(*self._ids(values))
            elif kind == "image":
                image = self.images(values)
                embedding, read = self._embedded(self.model.image_embedding, image), self._image_tokens(image)
            else:
                text = self.texts(values)
                embedding, read = self._embedded(self.model.text_embedding, text), self._text_tokens(text)
            for row, vector in zip(rows, _unit(embedding, [where[row] for row in rows])):
                vectors[row].append(vector)
            for row, kept in zip(rows, read):
                tokens[row].append(kept)
        joined = [v[0] if len(v) == 1 else F.normalize(v[0] + v[1], dim=-1) for v in vectors.values()]
        single = [t[0] if len(t) == 1 else torch.empty(0) for t in tokens.values()]
        return Encoded(torch.stack(joined), single)

    def _embedded(self, embed: Callable[[Any], Tensor], state: ImageState | TextState) -> Tensor:
        """Embeddings of what was read; [n, 0] of a model that only scores pairs."""
        return (
            embed(state)
            if self.model.embeds is not None
            else state.mask.new_empty(len(state.mask), 0, dtype=torch.float32)
        )

    def _read_whole(self, items: Sequence[Item], instruction: str | None, where: Sequence[str]) -> Encoded:
        """Items with pictures in one batch, mere texts in another, each item as one sequence."""
        vectors: dict[int, Tensor] = {}
        tokens: dict[int, Tensor] = {}
        for seen in (True, False):
            rows = [row for row, item in enumerate(items) if bool(item.images or item.video) is seen]
            if not rows:
                continue
            read = self.processor.items([items[row] for row in rows], instruction, where=[where[row] for row in rows])
            batch: Any = move_pixels(read, self.device, self.model.log_scale.dtype)
            if seen:
                image = self.model.encode_image(batch)
                embedding, kept = self.model.image_embedding(image), self._image_tokens(image) if self.matches else ()
            else:
                text = self.model.encode_text(batch["ids"], batch["mask"])
                embedding, kept = self.model.text_embedding(text), self._text_tokens(text) if self.matches else ()
            vectors |= dict(zip(rows, _unit(embedding, [where[row] for row in rows])))
            tokens |= dict(zip(rows, kept))
        nothing = torch.empty(0)
        found = [
            tokens.get(row, nothing) if item.kind in ("image", "text") else nothing for row, item in enumerate(items)
        ]
        return Encoded(torch.stack([vectors[row] for row in range(len(items))]), found)

    def judge(
        self, pairs: Sequence[tuple[Item, Item]], prompt: str | None, batch_size: int, show: bool | None = False
    ) -> Tensor:
        """Match logits [P], float32, of (query, document) that a vision-language model reads as one conversation each.

        Args:
            pairs: items of any kind that the model reads.
            prompt: what makes a document match, in place of the default instruction.
            batch_size: pairs at a time.
            show: as in `progress`.
        """
        for place, pair in enumerate(pairs):
            for item in pair:
                self.require_readable(item, f"pair {place}: ")
        batches(len(pairs), batch_size)
        scores, judge = torch.empty(len(pairs)), Judge(self.model, self.processor)
        opened: dict[int, Item] = {}
        for places in progress(plan(pairs, batch_size, self.processor.expected_tokens), "Matching", show):
            # A query's pictures are opened once for all of its pairs in turn.
            queries = {id(pairs[i][0]): (i, pairs[i][0]) for i in places}
            opened = {key: opened.get(key) or query.opened(f"pair {i}: ") for key, (i, query) in queries.items()}
            rows = [self.processor.pair(opened[id(pairs[i][0])], pairs[i][1], prompt, f"pair {i}: ") for i in places]
            scores[places] = judge.logits(rows)
        return _finite(scores)

    @inference()
    def write(
        self,
        items: Sequence[Item],
        prompts: Sequence[str] | None,
        options: dict[str, Any],
        batch_size: int,
        show: bool | None = False,
        generator: Generators = None,
    ) -> list[Any]:
        """What a vision-language model writes about images and videos: a text for each, or with `num_return_sequences` a list of texts.

        Args:
            items: images, several images, videos.
            prompts: what is asked about each of them; None, or an empty text, asks for a description.
            options: arguments of transformers' `generate`.
            batch_size: items at a time; those that are drawn are written one by one, since the draws of a batch come from one source.
            show: as in `progress`.
            generator: what the draws follow from: a source for all items, or one for each, see `unimodal.draws`.
        """
        asked = [DESCRIBE] * len(items) if prompts is None else [one or DESCRIBE for one in prompts]
        if "return_dict_in_generate" in options:
            raise ValueError(
                "return_dict_in_generate: texts are returned, not what generate knows of them; leave it out"
            )
        where = [f"item {i}: " for i in range(len(items))] if len(items) > 1 else [""]
        for item, name in zip(items, where):
            self.require_readable(item, name)
            if item.kind not in ("image", "images", "video"):
                raise ValueError(
                    f"{name}caption: expected images or a video, got the {item.kind} {item.told}; what is asked about them "
                    "is the prompt"
                )
        settings = {**self.processor.generation, "do_sample": False, **options}
        own: list[torch.Generator] = []
        if settings["do_sample"]:
            own = own_generators(generator, len(items))
        else:
            settings = {name: value for name, value in settings.items() if name not in SAMPLING}
        out: list[Any] = []
        for rows in progress(batches(len(items), 1 if own else batch_size), "Captioning", show):
            asking = zip(items[rows], asked[rows], where[rows])
            read = self.processor.batch([self.processor.question(*one) for one in asking], "left")
            batch: Any = move_pixels(read, self.device, self.model.log_scale.dtype)
            with drawing_from(own[rows.start], self.device) if own else nullcontext():
                written = self.model.backbone.write(batch, **settings)
            out += [self.processor.decode(ids) for ids in written]
        each = options.get("num_return_sequences", 1)
        return out if each == 1 else [out[i : i + each] for i in range(0, len(out), each)]

    def match(self, pairs: Sequence[tuple[Tensor, Tensor]], batch_size: int, show: bool | None = False) -> Tensor:
        """Match logits [P], float32, of pairs of (image tokens, text tokens) as `read` returns them."""
        scores = [self._match(pairs[rows]) for rows in progress(batches(len(pairs), batch_size), "Matching", show)]
        return torch.cat(scores) if scores else torch.empty(0)

    def probability(self, logits: Tensor) -> Tensor:
        """Match probabilities of logits [P]: calibrated, or the plain sigmoid."""
        return logits.sigmoid() if self.calibration is None else self.calibration.probability(logits)

    @inference()
    def _match(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        images, image_index = _distinct([image for image, _ in pairs])
        texts, text_index = _distinct([text for _, text in pairs])
        kept = [self._place(x) for x in (*_pad(images), *_pad(texts))]
        image, text = self.model.head("matching").restored(*kept)
        logits = self.model.match(image, text, image_index.to(self.device), text_index.to(self.device))
        return _finite(logits.float().cpu())

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.model.log_scale.dtype if x.is_floating_point() else None)

    def _image_tokens(self, state: ImageState) -> Sequence[Tensor]:
        kept, mask = self.model.head("matching").image_kept(state)
        return kept.unbind() if mask is None else [t[m] for t, m in zip(kept, mask)]

    def _text_tokens(self, state: TextState) -> Sequence[Tensor]:
        return [t[m] for t, m in zip(self.model.head("matching").kept_of_text(state), state.mask)]

    def fingerprint(self) -> str:
        """16 hex digits of all that embeddings and match scores depend on: weights, shape, preprocessing."""
        parts = asdict(self.model.config)
        if parts["bridge"] is not None:
            parts["bridge"].pop("queries")
        settings = {name: parts[name] for name in ("bridge", "embedding", "matching")}
        if settings["matching"] is not None:  # indexes and calibrations know models by these, too
            settings["matching"] |= {name: parts["scoring"][name] for name in ("combine", "scale")}
        reads = [self.processor.settings(), self.processor.tokenizer.get_vocab()]
        digest = hashlib.sha256(json.dumps([settings, reads], sort_keys=True).encode())
        state = self.model.own_state(self.model.active)
        for name, value in sorted((base_name(name), value) for name, value in state.items()):
            if not name.startswith(OTHER_JOBS):
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _unit(embedding: Tensor, where: Sequence[str]) -> Tensor:
    """Embeddings [n, E] or [n, N, E] as unit vectors in float32; those of a lower precision are off by half a percent."""
    vectors = embedding if embedding.dtype == torch.float32 else F.normalize(embedding.float(), dim=-1)
    if not bool((finite := vectors.isfinite().flatten(1).all(1)).all()):
        name = where[int((~finite).nonzero()[0, 0])]
        raise ValueError(
            f"{name}the model's embedding is not finite, so it means nothing; its weights are damaged, or {embedding.dtype} is too narrow "
            "for them: load it again, with dtype=torch.float32"
        )
    return vectors


def _finite(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "the matching head's scores are not finite, so they mean nothing; its weights are damaged, or their precision is too low: "
            "load the model again, with dtype=torch.float32"
        )
    return logits


def batches(count: int, batch_size: int) -> list[slice]:
    """`count` rows cut into slices of `batch_size`."""
    batch_size = arguments.integer(batch_size, "batch_size")
    return [slice(start, start + batch_size) for start in range(0, count, batch_size)]


def progress(steps: Sequence[V], description: str, show: bool | None) -> Iterator[V]:
    """The steps, with a bar on standard error; None shows it for several steps on a terminal."""
    show = arguments.optional(arguments.flag, show, "show_progress_bar")
    console = Console(stderr=True)
    if show is None:
        show = console.is_terminal and len(steps) > 1
    yield from track(steps, description, console=console, disable=not show, transient=True)


def _distinct(values: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The different objects among `values`, and where each value is among them."""
    place = {key: i for i, key in enumerate({id(value): None for value in values})}
    distinct = {id(value): value for value in values}
    return list(distinct.values()), torch.tensor([place[id(value)] for value in values])


def _pad(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different length [T_i, ...] -> [P, T, ...] and the mask of what is real [P, T]."""
    lengths = torch.tensor([len(value) for value in values])
    return pad_sequence(list(values), batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]
