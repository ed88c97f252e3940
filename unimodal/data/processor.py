"""The processor: pictures and strings in, tensors out, and back. It is saved beside the weights, since a model means nothing without it.

Legend: B items, L text length in tokens, S image side in pixels.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unimodal import arguments
from unimodal.config import require_finite
from unimodal.data.scenes import vocabulary
from unimodal.data.texts import TruncationWarning, require_texts
from unimodal.data.writer import Writer
from unimodal.files import require_readable, write_json

SETTINGS_FILE = "preprocessor_config.json"
LARGEST_PICTURE, LONGEST_TEXT = 4096, 1 << 20  # side in pixels, tokens: beyond, one item would fill the memory
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def require_sound(image_size: Any, mean: Any, std: Any, max_length: Any) -> None:
    """Refuse settings that make no numbers of pictures and texts.

    Raises:
        TypeError, ValueError: a size is none, a mean or scale of a channel is not finite, or a scale is not above 0.
    """
    arguments.integer(image_size, "image_size", most=LARGEST_PICTURE)
    arguments.integer(max_length, "max_length", least=2, most=LONGEST_TEXT)
    for name, values, limit in (("mean", mean, {}), ("std", std, {"above": 0.0})):
        channels = arguments.listed(values, name, "three numbers, one for each channel")
        if len(channels) != 3:
            raise ValueError(f"{name}: expected three numbers, one for each channel, got {len(channels)}")
        for i, channel in enumerate(channels):
            arguments.number(channel, f"{name}[{i}]", **limit)


class Processor:
    """Square pictures and token ids as a model wants them.

    Args:
        tokenizer: a fast transformers tokenizer whose template adds the start and end tokens.
        image_size: side S; pictures are resized to S x S with bicubic interpolation, whatever their aspect ratio.
        mean: per-channel mean that is subtracted, for pixels between 0 and 1.
        std: per-channel scale that is divided by.
        max_length: longest text in tokens, start and end included.

    Raises:
        TypeError, ValueError: as `require_sound`.

    Attributes:
        writer: prompts and captions of a language model that writes the captions; None where this tokenizer serves for them, too.
    """

    writer: Writer | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_size: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        max_length: int = 64,
    ) -> None:
        require_sound(image_size, mean, std, max_length)
        self.tokenizer = tokenizer
        self.image_size, self.mean, self.std, self.max_length = image_size, tuple(mean), tuple(std), max_length

    def settings(self) -> dict[str, Any]:
        """Everything but the tokenizer, as JSON values."""
        return {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "max_length": self.max_length,
        }

    # Pictures.

    def image_array(self, picture: Image.Image) -> Tensor:
        """A picture as uint8 [3, S, S]."""
        if not isinstance(picture, Image.Image):
            raise TypeError(
                f"image_array takes a PIL image, got {type(picture).__name__}; load it with unimodal.data.load_image"
            )
        size = (self.image_size, self.image_size)
        picture = picture.convert("RGB")
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 with mean subtracted and scale divided."""
        mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def pixels(self, arrays: Sequence[Tensor]) -> Any:
        """What `image_array` made of some pictures -> float32 [B, 3, S, S]."""
        return self.normalise(torch.stack(list(arrays)))

    def images(self, pictures: Sequence[Image.Image]) -> Any:
        """Pictures -> float32 [B, 3, S, S]."""
        if len(pictures) == 0:
            raise ValueError("images: got an empty list; give at least one picture")
        return self.pixels([self.image_array(picture) for picture in pictures])

    # Texts.

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> token ids [B, L] and their mask [B, L] (True = real token), padded to the longest.

        A text of more than `max_length` tokens is cut at its end, under one `TruncationWarning` that counts them.

        Raises:
            TypeError: for a single string in place of a list, or an entry that is no string.
            ValueError: for an empty list, or an empty text.
        """
        require_texts(texts)
        rows = self.tokenizer(list(texts), add_special_tokens=True, truncation=False)["input_ids"]
        longer = [i for i, row in enumerate(rows) if len(row) > self.max_length]
        if longer:
            warnings.warn(
                f"{len(longer)} of {len(rows)} texts are longer than {self.max_length} tokens and were cut, "
                f"first {texts[longer[0]][:60]!r}",
                TruncationWarning,
                stacklevel=2,
            )
            for i in longer:
                rows[i] = [*rows[i][: self.max_length - 1], rows[i][-1]]  # the end token stays
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Token ids of a caption -> text, without special tokens."""
        if self.writer is not None:
            return self.writer.decode(ids)
        text = str(self.tokenizer.decode(torch.as_tensor(ids, dtype=torch.long), skip_special_tokens=True))
        return re.sub(r" ([,.;!?])", r"\1", text).strip()

    # Files.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and `preprocessor_config.json`."""
        self.tokenizer.save_pretrained(str(folder))
        if self.writer is not None:
            self.writer.save_pretrained(folder)
        write_json(Path(folder) / SETTINGS_FILE, self.settings())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """Read what `save_pretrained` wrote; nothing is downloaded.

        Raises:
            FileNotFoundError: when the folder holds no processor.
            TypeError, ValueError: its settings are none.
        """
        settings = read_settings(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return cls(tokenizer, **settings)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What `preprocessor_config.json` says.

    Raises:
        FileNotFoundError: the folder has none.
        OSError: it cannot be read.
        ValueError: it is no JSON object.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {folder} holds no processor written by save_pretrained")
    require_readable(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    require_finite(values, SETTINGS_FILE)
    return values


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word or punctuation mark, lower case; ids 0-5 are the special tokens, then `words` in order."""
    tokens = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w]"), behavior="isolated")]
    )
    tokenizer.decoder = decoders.WordPiece()  # joins with spaces, and none before punctuation
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", tokens["[CLS]"]), ("[SEP]", tokens["[SEP]"])]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=["[DEC]"])


def scenes_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the embedded scenes."""
    return word_tokenizer(vocabulary())
