"""Items as conversations: what a vision-language model reads, by the chat template and the preprocessing of its authors.

How Qwen3-VL-Embedding and Qwen3-VL-Reranker phrase an item or a pair is theirs (arXiv 2601.04720); what they leave open is said where it
is decided. Every picture has its own size and takes as many tokens as its area asks for, between two bounds.

Legend: B conversations, L tokens, P patches, C numbers of a patch, V images or videos.
"""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLProcessor, Qwen3VLVideoProcessor

from unimodal.data.images import picture_area
from unimodal.data.items import Item, picture_key
from unimodal.data.processor import (
    SETTINGS_FILE,
    Processor,
    TruncationWarning,
    read_settings,
    require_sound,
    require_texts,
)
from unimodal.data.video import MOST
from unimodal.files import write_json, write_text

EMBED = "Represent the user's input."
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
RETRIEVE = "Given a search query, retrieve relevant candidates that answer the query."
DESCRIBE = "Describe this image."
NOTHING = "NULL"  # stands for an item without content

MIN_TOKENS, MAX_TOKENS = 4, 1800  # of an image
FRAME_TOKENS, VIDEO_TOKENS = (128, 768), 15360  # of a pair of frames, at least and at most, and of a video

LENGTHS = {"embedding": 8192, "matching": 10240}  # longest conversation in tokens

Side = Literal["left", "right"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A conversation before padding.

    Attributes:
        ids: token ids [L].
        types: what each stands for [L]: 0 text, 1 image, 2 video.
        keys: [L], the id of a word, or what says which picture a token is of, so that the starts of conversations can be compared.
        images, videos: for each image or video its patches [P, C] and its grid [3].
    """

    ids: list[int]
    types: list[int]
    keys: list[Any]
    images: list[tuple[Tensor, Tensor]]
    videos: list[tuple[Tensor, Tensor]]

    def part(self, start: int, stop: int | None = None) -> Row:
        """Its tokens from `start` to `stop`, with the pictures that lie there; no picture may lie across an end."""
        here = slice(start, stop)
        pictures = []
        for kind, every in ((1, self.images), (2, self.videos)):
            names = list(dict.fromkeys(key for key, type in zip(self.keys, self.types) if type == kind))
            inside = {key for key, type in zip(self.keys[here], self.types[here]) if type == kind}
            pictures.append([picture for name, picture in zip(names, every) if name in inside])
        return Row(self.ids[here], self.types[here], self.keys[here], *pictures)


class ConversationProcessor(Processor):
    """Items and pairs as conversations of a vision-language model.

    Args:
        processor: transformers' own of the model; its chat template and preprocessing are used as they are.
        max_length: longest conversation in tokens. Words beyond it are cut from the end of what the user said.
        generation: the authors' generation configuration, for writing.
    """

    def __init__(
        self, processor: Qwen3VLProcessor, *, max_length: int, generation: dict[str, Any] | None = None
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length, self.generation = max_length, generation or {}
        picture = processor.image_processor
        self.mean, self.std, self.image_size = tuple(picture.image_mean), tuple(picture.image_std), 0
        require_sound(1, self.mean, self.std, max_length)  # pictures keep their own sizes
        marks = (
            processor.vision_start_token_id,
            processor.image_token_id,
            processor.video_token_id,
            processor.vision_end_token_id,
        )
        self.controls = {*self.tokenizer.all_special_ids, *marks}
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        closing = self._rendered([_said("user", [_words(mark)])]).rpartition(mark)[2]
        # How many tokens follow the user's words; the assistant's header comes last.
        self.tail = len(self.tokenizer(closing)["input_ids"])

    def settings(self) -> dict[str, Any]:
        """Everything but the tokenizer, as JSON values."""
        return {
            **json.loads(self.processor.image_processor.to_json_string()),
            "conversation": {"max_length": self.max_length, "generation": self.generation},
            "video": json.loads(self.processor.video_processor.to_json_string()),
            "chat_template": self.processor.chat_template,
            "phrases": [EMBED, JUDGE, RETRIEVE, NOTHING],
        }

    @property
    def pixels_per_token(self) -> int:
        return (self.processor.image_processor.patch_size * self.processor.image_processor.merge_size) ** 2

    @property
    def image_tokens(self) -> tuple[int, int]:
        """The fewest and the most tokens of an image; a picture is made smaller or larger to lie between. Can be set."""
        size = self.processor.image_processor.size
        return size["shortest_edge"] // self.pixels_per_token, size["longest_edge"] // self.pixels_per_token

    @image_tokens.setter
    def image_tokens(self, bounds: tuple[int, int]) -> None:
        fewest, most = bounds
        if not 1 <= fewest <= most:
            raise ValueError(f"image_tokens: expected 1 <= fewest <= most, got {fewest} and {most}")
        area = self.pixels_per_token
        self.processor.image_processor.size = {"shortest_edge": fewest * area, "longest_edge": most * area}

    def expected_tokens(self, item: Item) -> float:
        """About how many tokens an item takes, without opening more of its pictures than their sizes."""
        area, (fewest, most) = self.pixels_per_token, self.image_tokens
        tokens = sum(min(max(picture_area(picture) / area, fewest), most) for picture in item.images)
        if isinstance(item.video, tuple):
            tokens += min(len(item.video), MOST) / 2 * min(picture_area(item.video[0]) / area, FRAME_TOKENS[1])
        elif item.video is not None:
            tokens += VIDEO_TOKENS
        return tokens + len(item.text or "") / 4

    def bound_videos(self) -> None:
        """Videos take the tokens that Qwen3-VL-Embedding gives them."""
        video, area = self.processor.video_processor, self.pixels_per_token
        video.size = {"shortest_edge": FRAME_TOKENS[0] * area, "longest_edge": VIDEO_TOKENS * area}
        video.max_video_tokens, video.cap_pixels_per_frame = FRAME_TOKENS[1], True

    # Conversations.

    def items(
        self, items: Sequence[Item], instruction: str | None = None, *, where: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Items as one batch of conversations for an embedding or a bridge, padded on the right.

        Args:
            items: any; their pictures are loaded here.
            instruction: what the embedding is for, in place of the default; a full stop is added where it ends without punctuation.
            where: for each item how an error calls it.

        Raises:
            OSError, ValueError, TypeError, ImportError: an item cannot be read; the message says which.
        """
        names = _names(items) if where is None else where
        return self.batch([self.row(item, instruction, name) for item, name in zip(items, names)], "right")

    def row(self, item: Item, instruction: str | None = None, where: str = "") -> Row:
        """One item, phrased for an embedding."""
        instruction = (instruction or "").strip()
        self._refuse_controls(instruction, "prompt: ")
        if instruction and not unicodedata.category(instruction[-1]).startswith("P"):
            instruction += "."
        system = _said("system", [_words(instruction or EMBED)])
        return self._row([system, _said("user", self._content(item, where))], [item], where)

    def pair(self, query: Item, document: Item, instruction: str | None = None, where: str = "") -> Row:
        """A query and a document, phrased as the question whether they belong together."""
        self._refuse_controls(instruction or "", "prompt: ")
        content = [_words(f"<Instruct>: {instruction or RETRIEVE}"), _words("<Query>:"), *self._content(query, where)]
        content += [_words("\n<Document>:"), *self._content(document, where)]
        return self._row([_said("system", [_words(JUDGE)]), _said("user", content)], [query, document], where)

    def question(self, item: Item, question: str, where: str = "") -> Row:
        """An item and what is asked about it."""
        self._refuse_controls(question, "prompt: ")
        return self._row([_said("user", [*self._content(item, where), _words(question)])], [item], where)

    def _content(self, item: Item, where: str) -> list[Message]:
        """Videos first, then images, then words, as Qwen3-VL-Embedding reads them."""
        if item.text is not None:
            self._refuse_controls(item.text, where)
        content = [{"type": "video"}] * (item.video is not None) + [{"type": "image"}] * len(item.images)
        if item.text is not None:
            content.append(_words(item.text))
        return content or [_words(NOTHING)]

    def _refuse_controls(self, text: str, where: str) -> None:
        found = [token for token in self.tokenizer.all_special_tokens if token in text]
        if found:
            raise ValueError(
                f"{where}the text {text[:60]!r} holds {found[0]!r}, which steers the model and is no word; take it out"
            )

    def _rendered(self, messages: list[Message]) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _row(self, messages: list[Message], items: Sequence[Item], where: str) -> Row:
        opened = [item.opened(where) for item in items]
        images = [picture for item in opened for picture in item.images]
        videos = [np.stack(_of_one_size(item.video, where)) for item in opened if item.video is not None]
        rates = [item.fps for item in opened if item.video is not None]
        given: dict[str, Any] = {}
        if images:
            given["images"] = images
        if videos:
            metadata = [
                {"fps": fps, "frames_indices": list(range(len(video))), "total_num_frames": len(video)}
                for video, fps in zip(videos, rates)
            ]
            given |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        try:
            out = self.processor(text=[self._rendered(messages)], **given)
        except ValueError as error:  # a picture of extreme shape
            raise ValueError(f"{where}{error}") from error
        ids, types = out["input_ids"][0], out["mm_token_type_ids"][0]
        pictures = {1: _pictures(out, "pixel_values", "image_grid_thw")}
        pictures[2] = _pictures(out, "pixel_values_videos", "video_grid_thw")
        named = {
            1: [picture for item in items for picture in item.images],
            2: [item.video for item in items if item.video is not None],
        }
        row = Row(ids, types, self._keys(ids, types, pictures, named), pictures[1], pictures[2])
        return self._cut(row, where)

    def _keys(
        self, ids: list[int], types: list[int], pictures: dict[int, Any], named: dict[int, list[Any]]
    ) -> list[Any]:
        """See `Row`: a picture is told by the object that the user gave and by its place among those of the conversation."""
        merged, of = self.processor.image_processor.merge_size**2, {}
        for kind, some in pictures.items():
            counts = [int(grid.prod()) // merged for _, grid in some]
            told = [(kind, i, picture_key(picture)) for i, picture in enumerate(named[kind])]
            of[kind] = iter([key for key, count in zip(told, counts) for _ in range(count)])
        return [next(of[kind]) if kind else token for token, kind in zip(ids, types)]

    def _cut(self, row: Row, where: str) -> Row:
        """Leave out words at the end of what the user said, so that the rest fits; pictures, turns and the assistant's header stay."""
        excess = len(row.ids) - self.max_length
        if excess <= 0:
            return row
        words = [i for i, token in enumerate(row.ids[: -self.tail]) if token not in self.controls]
        if len(words) < excess:
            raise ValueError(
                f"{where}its pictures take more than the {self.max_length} tokens that the model reads; give fewer or "
                "smaller ones, or lower the processor's image_tokens"
            )
        warnings.warn(
            f"{where}{len(row.ids)} tokens, more than {self.max_length}: {excess} words or parts of words at its end were left out",
            TruncationWarning,
            stacklevel=2,
        )
        dropped = set(words[-excess:])
        ids, types, keys = (
            [value for i, value in enumerate(values) if i not in dropped] for values in (row.ids, row.types, row.keys)
        )
        return Row(ids, types, keys, row.images, row.videos)

    def batch(self, rows: Sequence[Row], side: Side, *, patches: bool = True) -> dict[str, Tensor]:
        """Rows of different length as one batch, padded on one side: `ids`, `mask`, `types` [B, L], `patches` [B, P, C] and `grids`
        [B, V, 3], `video_patches` and `video_grids`, as far as there are any; without `patches` only what positions depend on."""
        pad: Any = {"batch_first": True, "padding_side": side}
        texts = [torch.tensor(row.ids) for row in rows]
        out = {
            "ids": pad_sequence(texts, padding_value=self.tokenizer.pad_token_id or 0, **pad),
            "mask": pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], **pad),
            "types": pad_sequence([torch.tensor(row.types) for row in rows], **pad),
        }
        for name, grid, pictures in (
            ("patches", "grids", [row.images for row in rows]),
            ("video_patches", "video_grids", [row.videos for row in rows]),
        ):
            if some := [picture for of_row in pictures for picture in of_row]:
                nothing = some[0][0].new_empty(0, some[0][0].shape[1]), some[0][1].new_empty(0, 3)
                grids = [torch.cat([nothing[1], *(shape[None] for _, shape in of_row)]) for of_row in pictures]
                out[grid] = pad_sequence(grids, batch_first=True)
                if patches:
                    cut = [torch.cat([nothing[0], *(patch for patch, _ in of_row)]) for of_row in pictures]
                    out[name] = pad_sequence(cut, batch_first=True)
        return out

    # What every processor does.

    def image_array(self, picture: Image.Image) -> Tensor:
        """A picture in its own size, as uint8 [3, h, w]."""
        if not isinstance(picture, Image.Image):
            raise TypeError(
                f"image_array takes a PIL image, got {type(picture).__name__}; load it with unimodal.data.load_image"
            )
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)

    def pixels(self, arrays: Sequence[Tensor]) -> dict[str, Tensor]:
        """What `image_array` made of some pictures, as `images`."""
        return self.images([Image.fromarray(array.permute(1, 2, 0).numpy()) for array in arrays])

    def images(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Pictures -> conversations, one for each."""
        if len(pictures) == 0:
            raise ValueError("images: got an empty list; give at least one picture")
        return self.items([Item(picture) for picture in pictures])

    def texts(self, texts: Sequence[str], instruction: str | None = None) -> tuple[Tensor, Tensor]:
        """Texts -> token ids and mask [B, L] of conversations, one for each."""
        require_texts(texts)
        out = self.items([Item(text=text) for text in texts], instruction)
        return out["ids"], out["mask"]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Token ids -> text, without special tokens."""
        return str(self.tokenizer.decode(torch.as_tensor(ids, dtype=torch.long), skip_special_tokens=True)).strip()

    # Files.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files, the chat template and `preprocessor_config.json`."""
        self.tokenizer.save_pretrained(str(folder))
        settings = {name: value for name, value in self.settings().items() if name not in ("chat_template", "phrases")}
        write_json(Path(folder) / SETTINGS_FILE, settings)
        write_text(Path(folder) / "chat_template.jinja", str(self.processor.chat_template))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ConversationProcessor:
        """Read what `save_pretrained` wrote; nothing is downloaded."""
        settings = read_settings(folder)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        processor = Qwen3VLProcessor(
            image_processor=AutoImageProcessor.from_pretrained(str(folder), backend="torchvision", **options),
            tokenizer=AutoTokenizer.from_pretrained(str(folder), **options),
            video_processor=Qwen3VLVideoProcessor(**settings["video"]),
            chat_template=(Path(folder) / "chat_template.jinja").read_text(encoding="utf-8"),
        )
        return cls(processor, **settings["conversation"])


def open_conversations(folder: str | Path, settings: Any, *, heads: Sequence[str]) -> ConversationProcessor:
    """The preprocessing of a published Qwen3-VL, from its folder.

    Args:
        folder: local folder of it.
        settings: the model's configuration.
        heads: what it is opened for; `embedding` and `matching` read pictures and lengths as Qwen3-VL-Embedding and Qwen3-VL-Reranker do.

    Raises:
        ValueError: its files lack something, or do not belong to the model.
    """
    try:
        processor = Qwen3VLProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, backend="torchvision"
        )
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"the preprocessing in {folder} is incomplete ({error}); it takes the tokenizer's files, preprocessor_config.json, "
            "video_preprocessor_config.json (or processor_config.json) and chat_template.jinja: get the folder again"
        ) from error
    if processor.chat_template is None:
        raise ValueError(f"{folder} has no chat template (chat_template.jinja); get the folder again")
    if len(processor.tokenizer) > settings.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(processor.tokenizer)} tokens, the model's vocabulary "
            f"{settings.text_config.vocab_size}: they do not belong together; get the folder again"
        )
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if getattr(processor, name) != getattr(settings, name):
            raise ValueError(
                f"{name} is {getattr(processor, name)} in the tokenizer of {folder} and {getattr(settings, name)} in its "
                "config.json: they do not belong together; get the folder again"
            )
    generation = Path(folder) / "generation_config.json"
    stored = json.loads(generation.read_text()) if generation.is_file() else {}
    lengths = [LENGTHS[head] for head in heads if head in LENGTHS] or [settings.text_config.max_position_embeddings]
    out = ConversationProcessor(
        processor,
        max_length=min(max(lengths), settings.text_config.max_position_embeddings),
        generation={
            name: value for name, value in stored.items() if name not in ("transformers_version", "_from_model_config")
        },
    )
    if {"embedding", "matching"} & {*heads}:
        out.image_tokens = (MIN_TOKENS, MAX_TOKENS)
        out.bound_videos()
    return out


def single_token(processor: ConversationProcessor, word: str) -> int:
    """The id of a word that is one token.

    Raises:
        ValueError: it is several.
    """
    ids = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"a match is judged by the words yes and no, each a token of its own; this tokenizer takes {len(ids)} for "
            f"{word!r}: it is not the tokenizer of Qwen3-VL"
        )
    return ids[0]


def _said(role: str, content: list[Message]) -> Message:
    return {"role": role, "content": content}


def _words(text: str) -> Message:
    return {"type": "text", "text": text}


def _names(items: Sequence[Item]) -> list[str]:
    """How errors call the items of a batch."""
    return [f"item {i}: " for i in range(len(items))] if len(items) > 1 else [""] * len(items)


def _pictures(out: Any, patches: str, grids: str) -> list[tuple[Tensor, Tensor]]:
    """Patches [P, C] and grid [3] of each image or video that transformers processed."""
    if patches not in out:
        return []
    pixels, grid = torch.as_tensor(out[patches]), torch.as_tensor(out[grids])
    return list(zip(pixels.split(grid.prod(-1).tolist()), grid))


def _of_one_size(frames: Sequence[Image.Image], where: str) -> list[np.ndarray]:
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"{where}the frames of a video have one size, got {sizes[0]} and {sizes[1]}; resize them")
    return [np.asarray(frame) for frame in frames]
