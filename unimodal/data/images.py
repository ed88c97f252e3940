"""Pictures in, whatever form they come in: path, URL, bytes, PIL image, array or tensor -> PIL image in RGB.

Everything that can be wrong with a picture is found here and told by name, so that no batch meets a half-read file.
Only the formats in `FORMATS` are decoded: Pillow knows others that call external programs.
"""

from __future__ import annotations

import io
import os
from http.client import HTTPException
from pathlib import Path
from urllib import request

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
MAX_DOWNLOAD = 64 * 2**20  # bytes
TIMEOUT = 20.0  # seconds that a server may stay silent

Source = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor


def load_image(source: Source, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """The picture, in RGB, turned upright as its EXIF data say, transparency laid on white, first frame of several.

    Args:
        source: a path; an http or https URL; the bytes of a file; a PIL image; an array [H, W] or [H, W, C]; a tensor
            [H, W] or [C, H, W]. C is 1, 3 or 4; values are uint8, or floats between 0 and 1.
        max_pixels: larger pictures are refused before they are decoded.
        name: what messages call the picture; by default its path or URL, or its kind.

    Raises:
        TypeError: for anything else, or an array of another dtype.
        FileNotFoundError: when a path names no file.
        OSError: when a file or URL cannot be read.
        ValueError: for a corrupt or truncated picture, a file that is none, too many pixels, a wrong shape or value.
    """
    if not isinstance(source, Source):
        raise TypeError(
            "expected an image as path, URL, bytes, PIL image, array or tensor, "
            f"got {type(source).__name__} {source!r:.80}"
        )
    if isinstance(source, str | Path):
        name = name or str(source)
        source = _fetch(source) if isinstance(source, str) and "://" in source else _read(source)
    name = name or f"the given {type(source).__name__}"
    if isinstance(source, np.ndarray | torch.Tensor):
        source = _from_array(source, name)
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=FORMATS)
        size = picture.size
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture; expected one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: {error}; shrink it or leave it out") from error
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        raise ValueError(f"{name} is corrupt: {error}; repair it or leave it out") from error
    if not 0 < size[0] * size[1] <= max_pixels:
        raise ValueError(
            f"{name} has {size[0]} x {size[1]} pixels; expected 1 to {max_pixels:,}; raise max_pixels or shrink it"
        )
    if picture.mode in ("I", "F"):
        raise ValueError(f"{name} has 32 bits per channel and no known range; save it with 8 or 16 bits")
    try:
        return _rgb(picture)
    except Exception as error:
        raise ValueError(f"{name} is corrupt or truncated: {error}; repair it or leave it out") from error


def _rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # Pillow would clip sixteen bits, not scale them
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _from_array(source: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    """Array [H, W] or [H, W, C], or tensor [H, W] or [C, H, W] -> PIL image."""
    shape, form = list(source.shape), "[H, W] or [H, W, C]"
    if isinstance(source, torch.Tensor):
        form = "[H, W] or [C, H, W]"
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
        source = np.moveaxis(source, 0, -1) if source.ndim == 3 else source
    if source.dtype != np.uint8 and not np.issubdtype(source.dtype, np.floating):
        raise TypeError(f"{name} has dtype {source.dtype}; expected uint8, or floats between 0 and 1")
    if source.ndim not in (2, 3) or source.size == 0 or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
        raise ValueError(f"{name} has shape {shape}; expected {form}, with 1, 3 or 4 channels C and at least one pixel")
    if source.dtype != np.uint8:
        low, high = float(source.min()), float(source.max())
        if not 0 <= low <= high <= 1:  # false for NaN too
            raise ValueError(f"{name} has float values from {low:g} to {high:g}; expected 0 to 1")
        source = np.round(source * 255).astype(np.uint8)
    return Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)


def _read(path: str | Path) -> bytes:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no image file {str(path)!r}; check the path")
    return Path(path).read_bytes()


def _fetch(url: str) -> bytes:
    """What lies behind an http or https URL; redirections to anything else are refused as well."""
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"{url} is no http or https address; download the picture and pass its path")
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        with opener.open(request.Request(url, headers={"User-Agent": "unimodal"}), timeout=TIMEOUT) as answer:
            content = answer.read(MAX_DOWNLOAD + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{url} could not be read: {error}; check the address and the network") from error
    if len(content) > MAX_DOWNLOAD:
        raise ValueError(f"{url} has more than {MAX_DOWNLOAD:,} bytes; download the picture and pass its path")
    return content
