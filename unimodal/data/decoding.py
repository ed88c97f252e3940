"""From the file of a picture to its pixels, upright and in RGB, as a careful viewer shows it.

- What a file is, its content says, not its name. Only `FORMATS` are tried: Pillow knows others that run external programs, PostScript
  first of all.
- Pixels are counted before any is decoded. A JPEG or JPEG 2000 of up to four times as many as the limit is decoded at half its scale.
- The first frame of an animation counts. It is turned by its orientation, whatever else its EXIF data hold.
- A JPEG whose end is missing is shown, with a warning, while nine tenths of its rows are there; a file that lacks more is refused.
- 16 bits a channel are scaled to 8. Where they hold a picture of fewer bits (12 bits of a camera, say, which would come out nearly
  black), the fewest bits that hold the brightest pixel count, and a warning says so.
- Transparent parts are laid on white.
"""

import io
import os
import struct
import warnings
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from unimodal.data import heif
from unimodal.data.endings import PICTURES

FORMATS = tuple(dict.fromkeys(PICTURES.values()))
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF and one of its values
TIFF_MARKS = (b"II*\0", b"MM\0*")
LIMIT_VARIABLE = "UNIMODAL_MAX_PIXELS"  # reaches every verb, call and worker process
MAX_PIXELS = 64_000_000
MISSING = 0.1  # of a cut picture's rows, at most
END_OF_JPEG = b"\xff\xd9"
SEGMENTS = (b"\xff\xc4", b"\xff\xda")  # a table, a scan: what a JPEG may have several of
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.init()  # Pillow's formats
heif.register()


class ImageError(ValueError):
    """Something that was given as an image is none, or none that may be opened."""


def pixel_limit() -> int:
    """The most pixels that are decoded: of the environment variable UNIMODAL_MAX_PIXELS, by default 64 million.

    Raises:
        ValueError: the variable holds no number above 0.
    """
    given = os.environ.get(LIMIT_VARIABLE, str(MAX_PIXELS))
    if not given.strip().isdecimal() or int(given) == 0:
        raise ValueError(f"{LIMIT_VARIABLE}: expected a number of pixels such as {MAX_PIXELS}, got {given!r}")
    return int(given)


def opened(file: IO[bytes]) -> ImageFile.ImageFile:
    """A picture whose size is known and whose pixels are not yet decoded. It is `Image.open` without that function's limit of pixels,
    which holds for a whole process.

    Raises:
        UnidentifiedImageError: none of the formats; its text says which ones failed that seemed to be right.
        Exception: whatever a broken header leads to.
    """
    file.seek(0)
    start = file.read(16)
    faults = []
    for form in FORMATS:
        factory, accepts = Image.OPEN[form]
        if accepts is None or accepts(start) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:  # another format may take it
                faults.append(f"{form}: {error}")
    raise UnidentifiedImageError(", ".join(faults))


def read_picture(file: IO[bytes], name: str, limit: int) -> Image.Image:
    """The picture in a file; `name` is how messages call it.

    Raises:
        ImageError: as of `load_image`.
    """
    picture = _prepared(file, name, limit)
    deep = keeps_upper_half(picture)
    try:
        picture.load()
    except Exception as error:  # every file format has its own way to fail
        if picture.format not in ("JPEG", "MPO"):
            raise corrupt(name, error) from error
        picture = _completed(file, name, limit, error)
    return as_rgb(picture, name, deep=deep)


def as_rgb(picture: Image.Image, name: str, *, deep: bool = False) -> Image.Image:
    """A copy of a decoded picture: upright, in RGB, on white.

    Args:
        picture: its pixels can be read.
        name: how messages call it.
        deep: of 16 bits a channel Pillow has kept the upper eight.

    Raises:
        ImageError: pixels of a type that no colours are known for.
    """
    negative = getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    picture = _upright(picture, name)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        picture = _eight_bits(picture, name)
        picture = ImageOps.invert(picture) if negative else picture  # Pillow does so with eight bits
    elif deep:
        picture = _brightened(picture, name)
    if picture.mode in ("I", "F"):
        raise ImageError(
            f"{name} has pixels of type {picture.mode!r}, of unknown range; expected 8 or 16 bits per channel"
        )
    try:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.copy() if picture.mode == "RGB" else picture.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} has colours of type {picture.mode!r}: {error}; save it in RGB") from error


def require_size(size: tuple[int, int], name: str, limit: int) -> None:
    """Refuse a picture of too many pixels, or of none."""
    width, height = size
    if width * height > limit:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than max_pixels={limit}; shrink it, or set the environment variable "
            f"{LIMIT_VARIABLE} to a higher number"
        )
    if width * height == 0:
        raise ImageError(f"{name} has {width} x {height} pixels; expected at least one")


def keeps_upper_half(picture: Any) -> bool:
    """Whether Pillow will keep the upper eight bits of sixteen of a picture that is not yet decoded, which may be too dark for it."""
    # PNG's colours fill their bits, whatever these are.
    tiles = picture.tile if picture.format == "TIFF" and picture.mode == "RGB" else ()
    return any(";16" in str(tile.args) for tile in tiles)


def corrupt(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} is truncated or corrupt: {error}; make the file again")


def _prepared(file: IO[bytes], name: str, limit: int) -> Any:
    """A picture that may be decoded, at half its scale where it is above the limit and its format can do that."""
    try:
        picture: Any = opened(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        if file.read(4) in TIFF_MARKS:
            raise ImageError(
                f"{name} is a TIFF with more bands or another depth than Pillow reads; write three bands of 8 bits, for "
                "example with gdal_translate -ot Byte -scale -b 1 -b 2 -b 3"
            ) from error
        told = f" that can be read ({error})" if str(error) else ""
        raise ImageError(f"{name} is no image{told}; expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # every file format has its own way to fail
        raise ImageError(f"{name} is no image that can be read, or is broken from its start: {error}") from error
    if any(tile.codec_name == "bmp_rle" and tile.args[1] for tile in picture.tile):  # Pillow loses pixels of it
        raise ImageError(f"{name} is a BMP of 4 bits with run lengths, which is not read; save it as PNG")
    width, height = picture.size
    if width * height > limit >= -(-width // 2) * -(-height // 2):
        if picture.format in ("JPEG", "MPO"):
            picture.draft(None, (width // 2, height // 2))
            return picture
        if picture.format == "JPEG2000":
            picture.reduce = 1  # halvings
            return picture
    require_size(picture.size, name, limit)
    return picture


def _completed(file: IO[bytes], name: str, limit: int, error: Exception) -> Image.Image:
    """A JPEG whose end is missing, with the rows that are there; a decoder leaves the others grey."""
    file.seek(0)
    content = file.read()
    last = max(content.rfind(marker) for marker in SEGMENTS)
    for end in (len(content), last):  # where the last segment is cut itself, the picture ends before it
        picture = _prepared(io.BytesIO(content[:end] + END_OF_JPEG), name, limit)
        try:
            picture.load()
            break
        except Exception:
            continue
    else:
        raise corrupt(name, error) from error
    height = picture.height
    bottom = np.asarray(picture)[-int(MISSING * height) - 1 :]
    grey = np.all((bottom == 127) | (bottom == 128), axis=tuple(range(1, bottom.ndim)))
    if grey.all():
        raise corrupt(name, ValueError(f"more than {MISSING:.0%} of its rows are missing")) from error
    missing = int(np.argmin(grey[::-1]))
    told = f"{missing} of its {height} rows are missing" if missing else "its last bytes are missing"
    detail = ", and fine detail everywhere" if "progressive" in picture.info else ""
    warnings.warn(f"{name} is cut short: {told}{detail}; it is read as it is", stacklevel=4)
    return picture


def _upright(picture: Image.Image, name: str) -> Image.Image:
    """The picture turned as its EXIF or XMP data say. Only this entry is read: others may be odd."""
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # a broken table of entries, in one of many ways
        warnings.warn(
            f"{name}: its EXIF data cannot be read ({error}); it is shown as it lies in the file", stacklevel=5
        )
        return picture
    return picture if turn is None else picture.transpose(turn)


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits as grey of 8, on white where it is transparent."""
    values = np.asarray(picture).astype(np.int32)
    clear = picture.info.get("transparency")
    seen = values if clear is None else values[values != clear]
    depth = _depth(int(seen.max(initial=0)))
    if depth < 16:
        warnings.warn(f"{name}: its 16 bits hold a picture of {depth} bits, and are read as such", stacklevel=5)
    grey = (values << 8 >> depth).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey if clear is None else np.where(values == clear, np.uint8(255), grey))


def _brightened(picture: Image.Image, name: str) -> Image.Image:
    """A TIFF in colours of fewer than 16 bits in 16, of which Pillow has kept the upper eight, as bright as it is meant."""
    brightest = int(np.asarray(picture).max())
    if brightest == 0:
        warnings.warn(f"{name}: its 16-bit values are all below 256, so it is black; save it with 8 bits", stacklevel=5)
    depth = _depth(brightest << 8)
    if depth == 16:
        return picture
    warnings.warn(f"{name}: its 16 bits hold a picture of {depth} bits, and are read as such", stacklevel=5)
    return picture.point(lambda value: min(value << 16 - depth, 255))


def _depth(brightest: int) -> int:
    """The bits of a picture by its brightest value, an even number, as cameras have them; 16 of a black one."""
    bits = brightest.bit_length()
    return bits + bits % 2 or 16
