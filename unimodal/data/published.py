"""The preprocessing of a published model, by transformers' own image processor and tokenizer, so that nothing differs from its authors'.

Legend: B items, L text length in tokens, S image side in pixels, N patches.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from unimodal.backbones import QwenVL
from unimodal.config import CaptioningConfig, require_finite
from unimodal.data.conversation import ConversationProcessor, open_conversations
from unimodal.data.processor import SETTINGS_FILE, Processor, read_settings, require_sound
from unimodal.data.texts import TruncationWarning, require_texts
from unimodal.data.writer import Writer
from unimodal.files import write_json

PLACEHOLDER = "<image>"  # stands for BLIP-2's queries in a sequence of ids, and may lie outside of the vocabulary
TEXT_KEY = "unimodal"  # what this library adds to preprocessor_config.json


class PublishedProcessor(Processor):
    """Pictures and texts as a published model wants them.

    Args:
        tokenizer: its tokenizer.
        image_processor: its image processor.
        max_length: longest text in tokens, start and end included.
        pad_to_max: pad every text to `max_length`, for models that read their padding (SigLIP).
        lower_case: put texts into lower case, for models trained on such (SigLIP 2, whose published tokenizer may not do it).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        *,
        max_length: int,
        pad_to_max: bool = False,
        lower_case: bool = False,
    ) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.max_length, self.pad_to_max, self.lower_case = max_length, pad_to_max, lower_case
        self.reserves = PLACEHOLDER in tokenizer.get_vocab()
        self.mean, self.std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
        settings = json.loads(image_processor.to_json_string())
        size = settings.get("crop_size") or settings.get("size") or {}
        self.image_size = size.get("height") or size.get("shortest_edge") or 0
        require_finite(settings, "image processor")
        require_sound(self.image_size or 1, self.mean, self.std, max_length)  # pictures of any size have none

    def settings(self) -> dict[str, Any]:
        """Everything but the tokenizer, as JSON values."""
        own = {"max_length": self.max_length, "pad_to_max": self.pad_to_max, "lower_case": self.lower_case}
        return {**json.loads(self.image_processor.to_json_string()), TEXT_KEY: own}

    # Pictures.

    @property
    def any_size(self) -> bool:
        """Whether pictures keep their own sizes: such a model reads patches, of as many as fit (NaFlex)."""
        return hasattr(self.image_processor, "max_num_patches")

    def image_array(self, picture: Image.Image) -> Tensor:
        """A picture resized and cropped, as uint8 [3, S, S]; as it is, [3, h, w], where pictures keep their own sizes."""
        if not isinstance(picture, Image.Image):
            raise TypeError(
                f"image_array takes a PIL image, got {type(picture).__name__}; load it with unimodal.data.load_image"
            )
        if self.any_size:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        out = self.image_processor(picture.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt")
        return out["pixel_values"][0]

    def pixels(self, arrays: Sequence[Tensor]) -> Any:
        """What `image_array` made of some pictures, as `images`."""
        return self._processed(list(arrays)) if self.any_size else super().pixels(arrays)

    def images(self, pictures: Sequence[Image.Image]) -> Any:
        """Pictures -> float32 [B, 3, S, S]; for NaFlex patches [B, N, 3 p p], their mask [B, N] and grid shapes [B, 2]."""
        if len(pictures) == 0:
            raise ValueError("images: got an empty list; give at least one picture")
        return self._processed([picture.convert("RGB") for picture in pictures])

    def _processed(self, pictures: list[Any]) -> Any:
        out = self.image_processor(pictures, return_tensors="pt")
        return out["pixel_values"] if len(out) == 1 else dict(out)

    # Texts.

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `Processor.texts`, by the published tokenizer's own rules of padding and cutting."""
        require_texts(texts)
        if self.reserves and (named := [text for text in texts if PLACEHOLDER in text]):
            raise ValueError(
                f"text {named[0][:60]!r} spells {PLACEHOLDER}, a token that stands for the picture; leave it out"
            )
        given = [text.lower() for text in texts] if self.lower_case else list(texts)
        out = self.tokenizer(
            given,
            padding="max_length" if self.pad_to_max else True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = out["attention_mask"].bool()
        full = (
            mask.all(1).nonzero()[:, 0].tolist() if mask.shape[1] == self.max_length else []
        )  # among them those that were cut
        longer = [i for i in full if len(self.tokenizer(given[i])["input_ids"]) > self.max_length]
        if longer:
            warnings.warn(
                f"{len(longer)} of {len(given)} texts are longer than {self.max_length} tokens and were cut, "
                f"first {texts[longer[0]][:60]!r}",
                TruncationWarning,
                stacklevel=2,
            )
        return out["input_ids"], mask

    # Files.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and `preprocessor_config.json`, which transformers reads, too."""
        self.tokenizer.save_pretrained(str(folder))
        if self.writer is not None:
            self.writer.save_pretrained(folder)
        write_json(Path(folder) / SETTINGS_FILE, self.settings())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PublishedProcessor:
        """Read what `save_pretrained` wrote; nothing is downloaded."""
        settings = read_settings(folder)[TEXT_KEY]
        return cls(*published_parts(folder), **settings)


def saved_processor(folder: str | Path) -> Processor:
    """The processor of a checkpoint folder, of either kind; see `Processor.from_pretrained`."""
    settings = read_settings(folder)
    if "conversation" in settings:
        return ConversationProcessor.from_pretrained(folder)
    return (PublishedProcessor if TEXT_KEY in settings else Processor).from_pretrained(folder)


def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without running anything that the folder may hold.

    Raises:
        ValueError: there is none, or it needs a library that is not installed.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(
            f"the tokenizer in {folder} needs sentencepiece: pip install 'unimodal[siglip]' ({error})"
        ) from error


def published_parts(folder: str | Path) -> tuple[PreTrainedTokenizerBase, Any]:
    """Tokenizer and image processor of a folder.

    Raises:
        ValueError: its tokenizer needs a library that is not installed.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    return open_tokenizer(folder), AutoImageProcessor.from_pretrained(str(folder), backend="torchvision", **options)


def open_writer(folder: str | Path, settings: CaptioningConfig, captioner: Any) -> Writer:
    """The tokenizer of a language model, from its folder.

    Args:
        folder: the language model's, or that of a published model which holds one.
        settings: of the captioning head.
        captioner: the head, `unimodal.heads.LanguageModelCaptioner`.

    Raises:
        ValueError: there is no tokenizer, or it is not the language model's.
    """
    try:
        return Writer(
            open_tokenizer(folder),
            vocab_size=captioner.vocab_size,
            start_id=captioner.bos_id,
            end_id=captioner.eos_id,
            encoded=captioner.encodes,
            prompt=settings.prompt,
            max_length=settings.max_length,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of the language model in {folder}: {error}") from error


def open_processor(folder: str | Path, backbone: Any) -> Processor:
    """The preprocessing of a published backbone, from its folder.

    Args:
        folder: the model's.
        backbone: `unimodal.backbones.PretrainedPair` or `Blip2Backbone`.

    Raises:
        ValueError: the tokenizer has more tokens than the backbone; also as `open_conversations`.
    """
    if isinstance(backbone, QwenVL):
        return open_conversations(folder, backbone.model.config, heads=("embedding",))
    tokenizer, image_processor = published_parts(folder)
    tokens = tokenizer.get_vocab()
    tokens.pop(PLACEHOLDER, None)
    if max(tokens.values()) >= backbone.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokens)} tokens, the model's vocabulary {backbone.vocab_size}: they do not "
            "belong together; get the folder again"
        )
    settings = backbone.model.config
    if settings.model_type == "blip-2":
        # It was trained on texts of 32 tokens, and reads longer ones, as transformers lets it.
        longest = min(tokenizer.model_max_length, settings.qformer_config.max_position_embeddings)
        return PublishedProcessor(tokenizer, image_processor, max_length=longest)
    text = settings.text_config
    siglip = settings.model_type != "clip"
    return PublishedProcessor(
        tokenizer, image_processor, max_length=text.max_position_embeddings, pad_to_max=siglip, lower_case=siglip
    )
