"""Proves that photographs of every kind are shown as a careful viewer shows them, or refused with the reason."""

import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from unimodal.data import load_image
from unimodal.data.decoding import pixel_limit
from unimodal.data.images import ImageError, picture_area

# Written for this test: 32 x 16, red on the left and blue on the right, stored turned by a quarter.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAcdtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRp"
    "bG9jAAAAAERAAAIAAQAAAAAB6wABAAAAAAAAADYAAgAAAAACIQABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABo"
    "dmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABBmlwcnAAAADlaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA"
    "/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyA"
    "AAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAIAAAAAEAAAAQAAAA"
    "Af///+AAAAAC////0AAAAAIAAAAQcGl4aQAAAAADCAgIAAAACWlyb3QDAAAAGWlwbWEAAAAAAAAAAQABBoECAwWEhgAAABppcmVmAAAA"
    "AAAAAA5jZHNjAAIAAQABAAAAYm1kYXQAAAAyKAGvGSFyUkDvXaW//4jK/5iBf67ZO//cGuvrVC/4agVK2rXyot9mgKt2Z/Qopu1urYAA"
    "AAAGRXhpZgAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAA="
)

# 80 x 40, darker on the left; turned, it lies as a camera stores a portrait.
UPRIGHT = Image.fromarray(np.dstack([np.tile(np.arange(0, 240, 3, dtype=np.uint8), (40, 1))] * 3))
TURNED = UPRIGHT.transpose(Image.Transpose.ROTATE_90)
TURN = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
BEHIND = 8 + 2 + 2 * 12 + 4  # where data behind a table of two entries stand
ODD = {
    "negative rational": (struct.pack("<HHII", 0x011A, 10, 1, BEHIND), struct.pack("<ii", -1, 0)),
    "text for a number": (struct.pack("<HHI4s", 0x0128, 2, 4, b"abc\0"), b""),
    "bytes for a number": (struct.pack("<HHI4s", 0x011A, 7, 3, b"\1\2\3\0"), b""),
    "NaN": (struct.pack("<HHIf", 0x011A, 11, 1, float("nan")), b""),
    "behind the end": (struct.pack("<HHII", 0x011A, 5, 1, 999_999), b""),
    "no such type": (struct.pack("<HHII", 0x011A, 77, 1, 5), b""),
    "two thousand million values": (struct.pack("<HHII", 0x011A, 5, 2**31 - 1, 8), b""),
    "no such table": (struct.pack("<HHII", 0x8769, 4, 1, 999_999), b""),
    "a text as user comment": (struct.pack("<HHI4s", 0x9286, 2, 4, b"\xff\xfe\0\0"), b""),
}


def encoded(picture: Image.Image, form: str, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def exif(entry: bytes, data: bytes) -> bytes:
    return b"II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted([TURN, entry])) + bytes(4) + data


def in_jpeg(content: bytes) -> bytes:
    jpeg = encoded(TURNED, "JPEG", quality=95)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 8) + b"Exif\0\0" + content + jpeg[2:]


def in_png(content: bytes) -> bytes:
    png, chunk = encoded(TURNED, "PNG"), b"eXIf" + content
    return png[:33] + struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def in_webp(content: bytes) -> bytes:
    return encoded(TURNED, "WEBP", exif=content, quality=95)


def tiff(pixels: np.ndarray, *entries: tuple[int, int, int, bytes]) -> bytes:
    """An uncompressed TIFF of pixels [H, W] or [H, W, 3], with further entries (tag, type, count, value)."""
    bands, bits = pixels.shape[2] if pixels.ndim == 3 else 1, pixels.dtype.itemsize * 8
    values = {
        256: pixels.shape[1],
        257: pixels.shape[0],
        259: 1,
        262: 2 if bands == 3 else 1,
        277: bands,
        278: pixels.shape[0],
    }
    table = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in values.items()] + list(entries)
    start = 8 + 2 + (len(table) + 3) * 12 + 4
    table.append((258, 3, bands, struct.pack("<I", start) if bands == 3 else struct.pack("<HH", bits, 0)))
    table += [(273, 4, 1, struct.pack("<I", start + 6)), (279, 4, 1, struct.pack("<I", pixels.nbytes))]
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in sorted(table))
    return (
        b"II*\0"
        + struct.pack("<IH", 8, len(table))
        + packed
        + bytes(4)
        + struct.pack("<HHH", *[bits] * 3)
        + pixels.tobytes()
    )


def off(picture: Image.Image) -> float:
    """How far a picture is from the upright one, in grey levels."""
    assert picture.size == UPRIGHT.size
    return float(np.abs(np.asarray(picture).astype(int) - np.asarray(UPRIGHT)).mean())


# Orientation.


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("write", [in_jpeg, in_png, in_webp])
def test_an_odd_entry_of_exif_does_not_keep_a_picture_from_being_turned(write, odd: str) -> None:
    assert off(load_image(write(exif(*ODD[odd])))) < 8


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "odd", [(0x011A, 7, 3, b"\1\2\3"), (0x011A, 11, 1, struct.pack("<f", float("nan"))), (0x0128, 2, 4, b"abc")]
)
def test_a_tiff_is_turned_too(odd: tuple[int, int, int, bytes]) -> None:
    assert off(load_image(tiff(np.asarray(TURNED), (274, 3, 1, b"\6\0\0\0"), odd))) == 0


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_all_eight_orientations(form: str, turn: int) -> None:
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions
    stored = UPRIGHT if turn == 1 else UPRIGHT.transpose(Image.Transpose(inverse[turn]))
    data = Image.Exif()
    data[0x0112] = turn
    assert off(load_image(encoded(stored, form, exif=data))) < 8


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_there_is_none_of_turns_nothing(value: int) -> None:
    data = Image.Exif()
    data[0x0112] = value
    assert off(load_image(encoded(UPRIGHT, "PNG", exif=data))) == 0


def test_exif_that_is_no_exif_is_told_and_the_picture_shown() -> None:
    broken = in_png(b"no exif at all")
    with pytest.warns(UserWarning, match="its EXIF data cannot be read"):
        assert load_image(broken).size == TURNED.size


# Formats.


def test_photographs_of_phones_are_read() -> None:
    picture = load_image(HEIC)
    assert picture.size == (16, 32) and picture.mode == "RGB"
    (top, bottom) = (np.array(picture.getpixel((8, row))) for row in (3, 28))
    assert np.abs(top - (255, 0, 0)).max() < 12 and np.abs(bottom - (0, 0, 255)).max() < 12


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000", "MPO", "WEBP", "PPM", "GIF", "BMP"])
def test_every_format_shows_what_was_written(form: str) -> None:
    assert off(load_image(encoded(UPRIGHT, form))) < 4


@pytest.mark.parametrize("form", ["GIF", "WEBP", "AVIF", "PNG", "MPO", "TIFF"])
def test_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    red = np.array(load_image(encoded(frames[0], form, save_all=True, append_images=frames[1:])).getpixel((8, 8)))
    assert np.abs(red - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("colour", [(255, 0, 0), (10, 200, 90)])
def test_four_inks_become_the_colours_that_they_print(colour: tuple[int, int, int]) -> None:
    ink = Image.new("RGB", (16, 16), colour).convert("CMYK")
    for form in ("JPEG", "TIFF"):
        assert np.abs(np.asarray(load_image(encoded(ink, form))).astype(int) - colour).max() < 12


def test_a_transparent_colour_of_a_palette_is_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    for clear in (1, bytes((255, 0))):
        shown = np.asarray(load_image(encoded(picture, "PNG", transparency=clear))).tolist()
        assert shown == [[[255, 0, 0], [255, 255, 255]]]


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    grey = Image.fromarray(np.array([[0, 40_000]], np.uint16))
    assert np.asarray(load_image(encoded(grey, "PNG", transparency=0)))[..., 0].tolist() == [[255, 40_000 >> 8]]


def test_a_bitmap_that_pillow_decodes_wrongly_is_refused() -> None:
    """Of four bits with run lengths; an odd run loses a pixel."""
    rows = b"\0\3\x12\x10" + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 3, 1, 1, 4, 2, len(rows), 0, 0, 16, 0) + bytes(64)
    content = b"BM" + struct.pack("<IHHI", 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows
    with pytest.raises(ImageError, match="is a BMP of 4 bits with run lengths, which is not read; save it as PNG"):
        load_image(content)


# Depth.


@pytest.mark.parametrize("bits", [6, 10, 12, 14])
def test_fewer_bits_in_sixteen_are_as_bright_as_they_are_meant(bits: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16).reshape(8, 8)
    expected = np.linspace(0, 255, 64).reshape(8, 8)
    for content in (tiff(ramp), encoded(Image.fromarray(ramp), "PNG"), encoded(Image.fromarray(ramp), "JPEG2000")):
        with pytest.warns(UserWarning, match=f"its 16 bits hold a picture of {bits} bits, and are read as such"):
            grey = np.asarray(load_image(content))[..., 0]
        assert np.abs(grey - expected).max() < 5


@pytest.mark.parametrize("bits", [10, 12])
def test_so_are_colours(bits: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8, 1).repeat(3, axis=2)
    with pytest.warns(UserWarning, match=f"a picture of {bits} bits"):
        shown = np.asarray(load_image(tiff(ramp)))
    assert np.abs(shown - np.linspace(0, 255, 64).reshape(8, 8, 1)).max() <= 2 ** (16 - bits)
    with pytest.warns(UserWarning, match="its 16-bit values are all below 256, so it is black; save it with 8 bits"):
        load_image(tiff(ramp // 2**bits * 0 + 200))


@pytest.mark.parametrize("brightest", [2**14, 40_000, 65_535])
def test_sixteen_bits_are_taken_as_they_are(brightest: int) -> None:
    ramp = np.linspace(0, brightest, 64).astype(np.uint16).reshape(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (tiff(ramp), encoded(Image.fromarray(ramp), "PNG"), encoded(Image.fromarray(ramp), "PPM")):
            assert (np.asarray(load_image(content))[..., 0] == ramp >> 8).all()


@pytest.mark.parametrize("brightest", [1023, 4095, 65_535])
def test_a_grey_map_says_itself_how_bright_its_brightest_is(brightest: int) -> None:
    ramp = np.linspace(0, brightest, 64).astype(np.uint16)
    content = f"P5 8 8 {brightest}\n".encode() + ramp.astype(">u2").tobytes()
    assert np.abs(np.asarray(load_image(content))[..., 0].ravel() - np.linspace(0, 255, 64)).max() < 2


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_no_negative(kind: type) -> None:
    ramp = np.linspace(0, np.iinfo(kind).max, 64).astype(kind).reshape(8, 8)
    content = tiff(ramp).replace(struct.pack("<HHII", 262, 4, 1, 1), struct.pack("<HHII", 262, 4, 1, 0))
    assert np.abs(np.asarray(load_image(content))[..., 0] - np.linspace(255, 0, 64).reshape(8, 8)).max() < 2


def test_black_stays_black() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.asarray(load_image(tiff(np.zeros((4, 4), np.uint16)))).any()


# Cut files.

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 120, 3), np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("lost", [1, 2, 40, 0.05])
def test_a_jpeg_without_its_end_is_shown_with_a_warning(mode: str, lost: float) -> None:
    jpeg = encoded(PHOTO.convert(mode), "JPEG", quality=90)
    whole = np.asarray(load_image(jpeg)).astype(int)
    with pytest.warns(UserWarning, match="bytes given as an image is cut short: .* missing; it is read as it is"):
        cut = np.asarray(load_image(jpeg[: -int(lost * len(jpeg) if lost < 1 else lost)]))
    assert cut.shape == whole.shape and (cut[:120] == whole[:120]).all()


def test_a_progressive_jpeg_that_is_cut_lacks_detail_only() -> None:
    jpeg = encoded(UPRIGHT, "JPEG", quality=95, progressive=True)
    with pytest.warns(UserWarning, match="fine detail"):
        assert off(load_image(jpeg[: int(len(jpeg) * 0.9)])) < 8


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.8])
def test_a_jpeg_that_lacks_more_is_refused(mode: str, kept: float) -> None:
    jpeg = encoded(PHOTO.convert(mode), "JPEG", quality=90)
    with pytest.raises(
        ImageError, match="is truncated or corrupt: more than 10% of its rows are missing; make the file"
    ):
        load_image(jpeg[: int(len(jpeg) * kept)])


def test_a_picture_that_pillow_has_opened_is_read_as_its_file_would_be() -> None:
    jpeg = encoded(PHOTO, "JPEG", quality=90)
    with pytest.warns(UserWarning, match="the PIL image is cut short: its last bytes are missing"):
        assert load_image(Image.open(io.BytesIO(jpeg[:-2]))).size == PHOTO.size
    with pytest.raises(ImageError, match="the PIL image is truncated or corrupt: more than 10%"):
        load_image(Image.open(io.BytesIO(jpeg[: len(jpeg) // 2])))
    assert load_image(Image.open(io.BytesIO(jpeg)), max_pixels=PHOTO.width * PHOTO.height // 4).size == (60, 80)
    with pytest.warns(UserWarning, match="the PIL image: its 16 bits hold a picture of 12 bits"):
        load_image(Image.open(io.BytesIO(tiff(np.full((4, 4, 3), 4000, np.uint16)))))


def test_a_broken_table_of_a_heic_is_refused() -> None:
    """At which its decoder would end the process."""
    with pytest.raises(ImageError, match="is broken from its start: its table of items is broken"):
        load_image(HEIC.replace(b"Exif\0", b"\xffxif\0", 1))


# Size.


@pytest.mark.parametrize("form", ["JPEG", "MPO", "JPEG2000"])
@pytest.mark.parametrize("size", [(100, 60), (101, 61)])
def test_what_is_above_the_limit_is_read_at_half_its_scale(form: str, size: tuple[int, int]) -> None:
    picture = UPRIGHT.resize(size)
    content = encoded(picture, form)
    assert load_image(content, max_pixels=size[0] * size[1]).size == size
    half = load_image(content, max_pixels=size[0] * size[1] - 1)
    assert half.size in ((50, 30), (51, 31))
    assert np.abs(np.asarray(half).astype(int) - np.asarray(picture.resize(half.size))).mean() < 5
    with pytest.raises(
        ImageError, match=f"has {size[0]} x {size[1]} pixels, more than max_pixels=1000; shrink it, or set"
    ):
        load_image(content, max_pixels=1000)


def test_a_cut_jpeg_above_the_limit_is_read_too() -> None:
    jpeg = encoded(PHOTO.resize((121, 161)), "JPEG")
    with pytest.warns(UserWarning, match="is cut short"):
        assert load_image(jpeg[:-2], max_pixels=10_000).size == (61, 81)


def test_the_limit_of_every_call_is_set_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    png = encoded(UPRIGHT, "PNG")
    monkeypatch.setenv("UNIMODAL_MAX_PIXELS", "3199")
    for picture in (png, UPRIGHT):
        with pytest.raises(
            ImageError, match="more than max_pixels=3199; .* the environment variable UNIMODAL_MAX_PIXELS"
        ):
            load_image(picture)
    assert picture_area(png) == 3200
    monkeypatch.setenv("UNIMODAL_MAX_PIXELS", "3200")
    assert off(load_image(png)) == 0
    for wrong in ("many", "0", "-5", "1e6"):
        monkeypatch.setenv("UNIMODAL_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match=f"UNIMODAL_MAX_PIXELS: expected a number of pixels .*, got '{wrong}'"):
            pixel_limit()


def test_a_photograph_of_108_megapixels_is_opened_at_half_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header alone: nothing is decoded, and Pillow's own limit neither warns nor stands in the way."""
    small = bytearray(encoded(UPRIGHT, "JPEG"))
    at = small.index(b"\xff\xc0") + 5
    small[at : at + 4] = struct.pack(">HH", 12_240, 16_320)  # 200 megapixels
    seen = []
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda picture: seen.append(picture.size) or 1 / 0)
    with warnings.catch_warnings(), pytest.raises(ImageError):
        warnings.simplefilter("error")
        load_image(bytes(small))
    assert seen[0] == (8160, 6120)
