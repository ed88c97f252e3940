"""What an item is: an image, a text, or both together, in any of the forms in which users pass them.

A `str` is told apart by how it is written, never by what happens to lie on the disk:

    {"image": x}, {"text": s}, {"image": x, "text": s}    as it says; removes all doubt
    pathlib.Path, PIL image, array, tensor, bytes         an image
    "photo.jpg", "https://host/photo.jpg"                 an image: the string ends in a picture's suffix
    any other string                                      a text

A string with a picture's suffix that names no file is an error, not a text, so that a mistyped path cannot slip through
as words; so is a URL without such a suffix, which could be meant either way.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
FORMS = "a text, an image (path, URL, PIL image, array, tensor, bytes), or a dict with the keys 'image', 'text' or both"


@dataclass(frozen=True)
class Item:
    """An image in any form that `load_image` takes, a text, or both."""

    image: Any = None
    text: str | None = None

    @property
    def kind(self) -> Literal["image", "text", "both"]:
        if self.image is None:
            return "text"
        return "image" if self.text is None else "both"

    @property
    def document(self) -> str | dict[str, str | None] | None:
        """The item in words, for an index or a message: text, path or URL; None for an image that has no name."""
        name = str(self.image) if isinstance(self.image, str | Path) else None
        if self.kind == "both":
            return {"image": name, "text": self.text}
        return name if self.kind == "image" else self.text


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one item rather than several."""
    return isinstance(inputs, str | bytes | dict | Path | Image.Image | np.ndarray | torch.Tensor)


def as_items(inputs: Any, *, check_files: bool = True) -> list[Item]:
    """One item or several, as a list. `check_files=False` leaves missing files to whoever opens them.

    Raises:
        TypeError: an item has none of the known forms.
        ValueError: an empty text, a dict with other keys, a URL that could be meant either way.
        FileNotFoundError: the path of an image names no file.
    """
    if is_single(inputs):
        return [as_item(inputs, check_files=check_files)]
    if not isinstance(inputs, Iterable):
        raise TypeError(f"expected {FORMS}, or a list of these, got {type(inputs).__name__} {inputs!r}")
    return [as_item(value, f"item {i}: ", check_files=check_files) for i, value in enumerate(inputs)]


def as_item(value: Any, where: str = "", *, check_files: bool = True) -> Item:
    """One item; `where` opens the message of an error. See `as_items`."""
    if isinstance(value, dict):
        unknown = value.keys() - {"image", "text"}
        if unknown or not value:
            raise ValueError(f"{where}a dict has the keys 'image', 'text' or both, got {sorted(map(str, value))}")
        image = _image(value["image"], where, check_files) if "image" in value else None
        return Item(image, _text(value["text"], where) if "text" in value else None)
    if not is_single(value):
        raise TypeError(f"{where}expected {FORMS}, got {type(value).__name__} {value!r}")
    if not isinstance(value, str) or value.lower().endswith(SUFFIXES):
        return Item(_image(value, where, check_files))
    if value.startswith(("http://", "https://")) and len(value.split()) == 1:
        if not urlsplit(value).path.lower().endswith(SUFFIXES):
            raise ValueError(
                f"{where}{value!r} is a URL without a picture's suffix; pass {{'image': url}} for the picture behind "
                "it, or {'text': url} for these characters"
            )
        return Item(value)
    return Item(text=_text(value, where))


def _image(value: Any, where: str, check_files: bool) -> Any:
    if not is_single(value) or isinstance(value, dict):
        raise TypeError(
            f"{where}expected an image (path, URL, PIL image, array, tensor, bytes), "
            f"got {type(value).__name__} {value!r}"
        )
    is_path = isinstance(value, str | Path) and not str(value).startswith(("http://", "https://"))
    if check_files and is_path and not os.path.isfile(value):
        raise FileNotFoundError(
            f"{where}there is no image file {str(value)!r}; check the path, or pass {{'text': ...}} to mean these words"
        )
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where}expected a text as str, got {type(value).__name__} {value!r}")
    if not value.strip():
        raise ValueError(f"{where}the text is empty; leave it out, or give it words")
    return value
