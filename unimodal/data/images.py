"""One function that turns whatever a user calls an image into an RGB picture, or says exactly why it cannot.

Nothing is executed, guessed or replaced: a file that is missing, broken, too large or no picture at all is an error that
names it. Only http and https are fetched, with a time and a size limit, and a redirect cannot leave them.
"""

from __future__ import annotations

import io
import stat
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow knows others that run external programs, PostScript first of all.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
TIFF_MARKS = (b"II*\0", b"MM\0*")
MAX_BYTES = 64 * 2**20  # of a download
TIMEOUT = 20.0  # seconds without an answer

# urllib's default opener would also follow a redirect to ftp; this one knows the web only.
_WEB = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.UnknownHandler,
):
    _WEB.add_handler(_handler())


class ImageError(ValueError):
    """Something that was given as an image is none, or none that may be opened."""


def load_image(item: Any, *, max_pixels: int = 64_000_000, timeout: float = TIMEOUT) -> Image.Image:
    """A picture in RGB, turned upright if its EXIF data say how, transparent parts on white.

    Args:
        item: path; http or https URL; the bytes of an image file; PIL image; array [H, W] or [H, W, 1 | 3 | 4] or tensor
            [H, W] or [1 | 3 | 4, H, W], uint8 or float in [0, 1].
        max_pixels: width times height from which a picture is refused before it is decoded.
        timeout: seconds that a web server may stay silent.

    Raises:
        FileNotFoundError: the path names nothing.
        ImageError: a folder, a file that is no image, a broken or truncated one, too many pixels, values or a shape that
            make no picture, a download that fails or is too large.
        TypeError: none of the kinds above, or an array of another type.
    """
    if isinstance(item, Image.Image):
        return _decode(item, "the PIL image", max_pixels)
    if isinstance(item, np.ndarray):
        return _from_array(item, "an array", "[H, W] or [H, W, 1 | 3 | 4]")
    if isinstance(item, torch.Tensor):
        array = item.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has no bfloat16
        return _from_array(_channels_last(array).numpy(), "a tensor", "[H, W] or [1 | 3 | 4, H, W]")
    if isinstance(item, bytes):
        return _open(io.BytesIO(item), f"the {len(item)} bytes given as an image", max_pixels)
    if isinstance(item, str) and "://" in item:
        return _open(io.BytesIO(_download(item, timeout)), repr(item), max_pixels)
    if isinstance(item, str | Path):
        return _from_path(Path(item), max_pixels)
    raise TypeError(
        f"an image is a path, URL, bytes, PIL image, array or tensor, got {type(item).__name__}: {item!r:.80}"
    )


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
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=FORMATS) as picture:
            return picture.width * picture.height
    except Exception:  # opening it in earnest will say what is wrong
        return 0


def _from_path(path: Path, max_pixels: int) -> Image.Image:
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no image file {str(path)!r}; check the path") from None
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise ImageError(f"{str(path)[:80]!r} cannot be the path of an image: {error}") from None
    if not stat.S_ISREG(kind):
        raise ImageError(f"{str(path)!r} is not a file; name one image in it")
    with path.open("rb") as file:
        return _open(file, repr(str(path)), max_pixels)


def _download(url: str, timeout: float) -> bytes:
    if not url.lower().startswith(("http://", "https://")):
        raise ImageError(f"{url!r} is neither http nor https; download it yourself and pass the file")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "unimodal"})
        with _WEB.open(request, timeout=timeout) as response:
            data = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(f"the server of {url!r} answered {error.code} {error.reason}; check the address") from error
    except Exception as error:  # urllib, http.client and ssl raise kinds of their own; none of them says which address
        raise ImageError(f"{url!r} could not be fetched: {error}; check the address and the network") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{url!r} is larger than {MAX_BYTES} bytes; download it yourself and pass the file")
    return data


def _open(file: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        if file.read(4) in TIFF_MARKS:
            raise ImageError(
                f"{name} is a TIFF with more bands or another depth than Pillow reads; write three bands of 8 bits, for "
                "example with gdal_translate -ot Byte -scale -b 1 -b 2 -b 3"
            ) from error
        raise ImageError(f"{name} is no image; expected one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels: {error}") from error
    except Exception as error:  # every file format has its own way to fail
        raise ImageError(f"{name} is no image that can be read, or is broken from its start: {error}") from error
    return _decode(picture, name, max_pixels)


def _decode(picture: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than max_pixels={max_pixels}; shrink it or raise the limit"
        )
    if width * height == 0:
        raise ImageError(f"{name} has {width} x {height} pixels; expected at least one")
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:
        raise ImageError(f"{name} is truncated or corrupt: {error}; make the file again") from error
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ImageError(
            f"{name} has pixels of type {picture.mode!r}, of unknown range; expected 8 or 16 bits per channel"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


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
    return _decode(Image.fromarray(np.ascontiguousarray(array)), name, array.size)
