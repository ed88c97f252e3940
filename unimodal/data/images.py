"""One function that turns whatever a user calls an image into an RGB picture, or says exactly why it cannot.

Nothing is executed, guessed or replaced: a file that is missing, broken, too large or no picture at all is an error that
names it. Only http and https are fetched, with a time and a size limit, and a redirect cannot leave them.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile

from unimodal import arguments
from unimodal.arguments import described
from unimodal.data.addresses import TIMEOUT, fetched
from unimodal.data.decoding import (
    ImageError,
    as_rgb,
    corrupt,
    keeps_upper_half,
    opened,
    pixel_limit,
    read_picture,
    require_size,
)
from unimodal.data.endings import CONVERT, UNREAD, address_of, ending, is_data, is_remote, shown
from unimodal.files import in_words

FORMS = "a path, URL, data URL, bytes, open binary file, PIL image, array or tensor"


def load_image(item: Any, *, max_pixels: int | None = None, timeout: float = TIMEOUT) -> Image.Image:
    """A picture in RGB, turned upright if its EXIF data say how, transparent parts on white.

    Args:
        item: path; http, https or `file:` URL; data URL; the bytes of an image file; one that is open for reading in binary; PIL
            image; array [H, W] or [H, W, 1 | 3 | 4] or tensor [H, W] or [1 | 3 | 4, H, W], uint8 or float in [0, 1].
        max_pixels: width times height up to which a picture is decoded; by default the environment variable UNIMODAL_MAX_PIXELS, or 64
            million. A JPEG or JPEG 2000 of up to four times as many is read at half its scale.
        timeout: seconds that a web server may stay silent.

    Raises:
        FileNotFoundError: the path names nothing.
        ImageError: a folder, a file that is no image, a broken or truncated one, too many pixels, values or a shape that
            make no picture, a malformed data URL, a download that fails or is too large, a picture or file that was closed.
        TypeError: none of the kinds above, or an array of another type.
    """
    limit = pixel_limit() if max_pixels is None else arguments.integer(max_pixels, "max_pixels")
    timeout = arguments.number(timeout, "timeout", above=0, most=86_400)
    if isinstance(item, Image.Image):
        return _from_pil(item, limit)
    if isinstance(item, np.ndarray):
        return _from_array(item, "an array", "[H, W] or [H, W, 1 | 3 | 4]")
    if isinstance(item, torch.Tensor):
        array = arguments.tensor(item, "image", "a picture as a tensor [H, W] or [1 | 3 | 4, H, W]").cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has no bfloat16
        return _from_array(_channels_last(array).numpy(), "a tensor", "[H, W] or [1 | 3 | 4, H, W]")
    if isinstance(item, bytes | bytearray | memoryview):
        return read_picture(io.BytesIO(item), f"the {len(item)} bytes given as an image", limit)
    if hasattr(item, "read"):
        return _from_open_file(item, limit)
    if isinstance(item, str):
        item = address_of(item)
        if is_data(item) or is_remote(item):
            return read_picture(io.BytesIO(fetched(item, timeout)), shown(item), limit)
    if isinstance(item, str | os.PathLike):
        return _from_path(Path(item) if isinstance(item, str) else arguments.path(item, "image"), limit)
    raise TypeError(f"an image is {FORMS}, got {described(item)}")


def load_images(items: Sequence[Any]) -> list[Image.Image]:
    """Several pictures as `load_image` opens them, files and downloads side by side: decoding and waiting leave Python's lock.

    Raises:
        As `load_image`, for the first that cannot be opened.
    """
    if len(items) < 2 or not all(isinstance(item, str | Path | bytes) for item in items):
        return [load_image(item) for item in items]  # a PIL image that two threads open at once would break
    with ThreadPoolExecutor() as pool:
        return list(pool.map(load_image, items))


def picture_area(item: Any) -> int:
    """Width times height as far as it is known without decoding; 0 where it is not, as for a URL or a file that is no image."""
    if isinstance(item, Image.Image):
        return item.width * item.height
    if isinstance(item, np.ndarray | torch.Tensor):
        sides = [side for side in item.shape if side > 4]
        return int(np.prod(sides[:2])) if sides else 0
    try:
        with io.BytesIO(item) if isinstance(item, bytes) else open(item, "rb") as file:
            width, height = opened(file).size
            return width * height
    except Exception:  # opening it in earnest will say what is wrong
        return 0


def _from_path(path: Path, limit: int) -> Image.Image:
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no image file {shown(str(path))}; check the path") from None
    except PermissionError as error:
        raise ImageError(in_words(error)) from None
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        why = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{shown(str(path))} cannot be the path of an image: {why}") from None
    if not stat.S_ISREG(kind):
        raise ImageError(f"{str(path)!r} is not a file; name one image in it")
    if ending(path) in UNREAD:
        raise ImageError(f"{str(path)!r} is in a format that is not read ({ending(path)}); {CONVERT}")
    with path.open("rb") as file:
        return read_picture(file, repr(str(path)), limit)


def _from_open_file(file: Any, limit: int) -> Image.Image:
    """The picture in a file that the user has opened, from its start, as Pillow reads it."""
    if getattr(file, "closed", False):
        raise ImageError("the file given as an image is closed; pass it while it is open, or its path")
    if getattr(file, "seekable", bool)():
        file.seek(0)
    content = None if isinstance(file, io.TextIOBase) else file.read()  # what is no text would fail to be decoded
    if not isinstance(content, bytes):
        raise TypeError("the file given as an image was opened as text; open it with mode 'rb'")
    return read_picture(io.BytesIO(content), f"the open file {getattr(file, 'name', '')!r} given as an image", limit)


def _from_pil(picture: Image.Image, limit: int) -> Image.Image:
    name = "the PIL image"
    file: Any = picture.fp if isinstance(picture, ImageFile.ImageFile) else None
    is_open = file is not None and not file.closed
    if is_open and picture.format in ("JPEG", "MPO") and picture.tell() == 0 and picture.width * picture.height > limit:
        return read_picture(file, name, limit)  # at half its scale
    require_size(picture.size, name, limit)
    deep = keeps_upper_half(picture)
    try:
        picture.load()
    except Exception as error:  # every file format has its own way to fail
        if not is_open:
            raise ImageError(
                f"{name} was closed before its pixels were read; open it again, or call its load() before it is closed"
            ) from error
        if picture.format in ("JPEG", "MPO") and picture.tell() == 0:
            return read_picture(file, name, limit)  # as far as it goes
        raise corrupt(name, error) from error
    return as_rgb(picture, name, deep=deep)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(0, -1) if tensor.ndim == 3 else tensor


def _from_array(array: np.ndarray, name: str, shapes: str) -> Image.Image:
    """`array` has its channels last; `name` and `shapes` are how messages call what the user gave."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise TypeError(f"{name} of type {array.dtype} is no image; expected uint8, or float in [0, 1]")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or array.size == 0:
        given = list(array.shape if name == "an array" or array.ndim != 3 else np.moveaxis(array, -1, 0).shape)
        raise ImageError(f"{name} of shape {given} is no image; expected {shapes}")
    if array.dtype != np.uint8:
        if not (array.min() >= 0 and array.max() <= 1):  # so that NaN is refused too
            raise ImageError(
                f"{name} of floats from {array.min():.3g} to {array.max():.3g} is no image; expected 0 to 1"
            )
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return as_rgb(Image.fromarray(np.ascontiguousarray(array)), name)
