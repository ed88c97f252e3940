"""Proves that a picture gives the same pixels in whatever form it comes, and that every bad one is refused by name."""

import io
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.data import addresses, load_image
from unimodal.data.images import ImageError, load_images
from unimodal.data.module import PairData, cropped

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


WHOLE = encoded(Image.fromarray(PIXELS))


def claimed(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tiff(bands: int) -> bytes:
    """A TIFF of 4 x 4 pixels with bands of 16 bits, as satellites have them."""
    rows = [(256, 4), (257, 4), (259, 1), (262, 1), (273, 8), (277, bands), (278, 4), (279, 32 * bands), (284, 1)]
    start = 10 + 12 * (len(rows) + 1) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, start + 2 * bands if tag == 273 else value) for tag, value in rows]
    entries.insert(2, struct.pack("<HHII", 258, 3, bands, start))  # bits of each band stand after the table
    depths = struct.pack("<H", 16) * bands
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4) + depths + bytes(32 * bands)


# Forms.


def test_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "ein Bild.png"
    path.write_bytes(WHOLE)
    channels_first = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    for source in (path, str(path), WHOLE, Image.open(path), PIXELS, channels_first, channels_first / 255):
        picture = load_image(source)
        assert picture.mode == "RGB"
        assert (np.asarray(picture) == PIXELS).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_tensors_of_any_precision(dtype: torch.dtype) -> None:
    assert np.asarray(load_image(torch.tensor([[0, 0.5], [1, 1]], dtype=dtype)))[..., 0].tolist() == [
        [0, 128],
        [255, 255],
    ]


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    grey = PIXELS[..., 0].reshape(shape)
    assert (np.asarray(load_image(grey)) == PIXELS[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    picture = Image.new("RGB", (4, 3), "white").convert(mode)
    assert (np.asarray(load_image(picture)) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.array([[0, 256 * 7], [256 * 128, 65535]], np.uint16)
    assert np.asarray(load_image(encoded(Image.fromarray(grey))))[..., 0].tolist() == [[0, 7], [128, 255]]


def test_transparency_is_laid_on_white() -> None:
    clear = np.zeros((1, 2, 4), np.uint8)
    clear[0, 1] = (10, 20, 30, 255)
    assert np.asarray(load_image(clear)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_pictures_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    assert load_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


def test_the_first_of_several_frames_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(animation).getpixel((0, 0)) == (255, 0, 0)


# Bad files.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no image; expected one of JPEG, PNG, WEBP"),
        (tiff(8), "is a TIFF with more bands or another depth than Pillow reads; write three bands of 8 bits"),
        (b"no picture", "is no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),  # would be run, not decoded
        (WHOLE[: len(WHOLE) // 2], "is truncated or corrupt: .*; make the file again"),
        (
            encoded(Image.fromarray(PIXELS), "JPEG")[:-80],
            "is no image that can be read, or is broken from its start: Truncated",
        ),
        (WHOLE[:50] + bytes(30) + WHOLE[80:], "is truncated or corrupt"),
        (
            claimed(9000, 9000),
            "has 9000 x 9000 pixels, more than max_pixels=64000000; shrink it, or set .*UNIMODAL_MAX_PIXELS",
        ),
        (claimed(50_000, 50_000), "has 50000 x 50000 pixels, more than max_pixels=64000000"),
        (claimed(0, 5), "is no image"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "has pixels of type 'F', of unknown range; expected 8 or 16 bits"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"^'{path}' {message}"):
        load_image(path)
    with pytest.raises(ImageError, match=f"^the {len(content)} bytes given as an image {message}"):
        load_image(content)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(WHOLE)
    for path in (tmp_path / "gone.png", tmp_path / "file" / "a.png"):
        with pytest.raises(FileNotFoundError, match=f"there is no image file '{path}'; check the path"):
            load_image(path)
    with pytest.raises(ImageError, match=f"'{tmp_path}' is not a file; name one image in it"):
        load_image(tmp_path)
    for name in ("a\0.png", "a" * 5000):
        with pytest.raises(ImageError, match="cannot be the path of an image"):
            load_image(name)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    for source in (WHOLE, Image.fromarray(PIXELS)):
        assert load_image(source, max_pixels=48).size == (8, 6)
        with pytest.raises(ValueError, match="has 8 x 6 pixels, more than max_pixels=47"):
            load_image(source, max_pixels=47)


# Bad values.


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            3,
            TypeError,
            "an image is a path, URL, data URL, bytes, open binary file, PIL image, array or tensor, got 3",
        ),
        (None, TypeError, "got None"),
        ([1, 2], TypeError, r"got list \[1, 2\]"),
        (np.zeros((4, 4), np.int64), TypeError, "an array of type int64 is no image; expected uint8, or float"),
        (np.zeros((4, 4), bool), TypeError, "an array of type bool"),
        (np.array([["a"]]), TypeError, "an array of type <U1"),
        (torch.full((3, 4, 4), 300), TypeError, "a tensor of type int64 is no image"),
        (
            np.zeros(4, np.uint8),
            ImageError,
            r"an array of shape \[4\] is no image; expected \[H, W\] or \[H, W, 1 \| 3 \| 4\]",
        ),
        (np.zeros((3, 4, 8), np.uint8), ImageError, r"of shape \[3, 4, 8\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), ImageError, r"of shape \[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ImageError, r"of shape \[0, 4, 3\]"),
        (
            torch.zeros(5, 4, 3),
            ImageError,
            r"a tensor of shape \[5, 4, 3\] is no image; expected \[H, W\] or \[1 \| 3 \| 4, H, W\]",
        ),
        (torch.tensor(1.0), ImageError, r"of shape \[\]"),
        (np.full((2, 2), 255.0), ImageError, "an array of floats from 255 to 255 is no image; expected 0 to 1"),
        (torch.tensor([[0.0, float("nan")]]), ImageError, "a tensor of floats from nan to nan"),
        (Image.new("RGB", (0, 4)), ImageError, "has 0 x 4 pixels"),
        ("file:///nowhere/a%20b.png", FileNotFoundError, "there is no image file '/nowhere/a b.png'"),
        ("file://server/a.png", ValueError, "names a file of the machine 'server'; copy it here and pass its path"),
        ("ftp://127.0.0.1/a.png", ImageError, "is neither http nor https; download it yourself"),
        ("http://[1/a.png", ImageError, "could not be fetched: Invalid IPv6 URL"),
        ("http://127.0.0.1/a b.png", ImageError, "could not be fetched: URL can't contain control characters"),
    ],
)
def test_bad_values_are_named(source, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_image(source)


# URLs.


class Answers(BaseHTTPRequestHandler):
    """A server of pictures, good and bad."""

    def do_GET(self) -> None:
        redirections = {
            "/moved.png": "/cat.png",
            "/to-file.png": "file:///etc/hostname",
            "/to-ftp.png": "ftp://127.0.0.1/",
        }
        bodies = {"/cat.png": WHOLE, "/page.png": b"<html>", "/half.png": WHOLE[:90], "/big.png": bytes(2000)}
        if self.path == "/slow.png":
            time.sleep(1)
        elif self.path in redirections:
            self.send_response(302)
            self.send_header("Location", redirections[self.path])
            self.end_headers()
        elif self.path in bodies:
            self.send_response(200)
            self.send_header("Content-Length", str(len(WHOLE if self.path == "/half.png" else bodies[self.path])))
            self.end_headers()
            self.wfile.write(bodies[self.path])
        else:
            self.send_error(404)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("page", ["cat.png", "moved.png"])
def test_urls_are_read(server: str, page: str) -> None:
    assert (np.asarray(load_image(f"{server}/{page}")) == PIXELS).all()


@pytest.mark.parametrize(
    ("page", "error", "message"),
    [
        ("gone.png", ImageError, "the server of .*gone.png' answered 404 Not Found; check the address"),
        ("slow.png", ImageError, "slow.png' could not be fetched: .*timed out"),
        ("to-file.png", ImageError, "the server of .*to-file.png' answered 302 .*not allowed"),
        ("to-ftp.png", ImageError, "to-ftp.png' could not be fetched: .*unknown url type: ftp"),
        ("big.png", ImageError, "big.png' is larger than 1000 bytes; download it yourself"),
        ("page.png", ImageError, "page.png' is no image"),
        ("half.png", ImageError, "half.png' is truncated or corrupt"),
    ],
)
def test_bad_urls_are_named(monkeypatch, server: str, page: str, error: type[Exception], message: str) -> None:
    monkeypatch.setattr(addresses, "MAX_BYTES", 1000)
    with pytest.raises(error, match=message):
        load_image(f"{server}/{page}", timeout=0.3)


def test_a_silent_network_is_named() -> None:
    with pytest.raises(ImageError, match="cat.png' could not be fetched: .*refused"):
        load_image("http://127.0.0.1:1/cat.png")


def test_a_crop_keeps_its_share_of_the_area_and_the_size() -> None:
    """A picture whose colours are its coordinates shows which part was kept."""
    side = 64
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    picture = torch.stack([rows * 2, columns * 2, rows]).to(torch.uint8)
    shares = []
    for seed in range(40):
        found = cropped(picture, 0.25, random.Random(seed))
        assert found.shape == picture.shape and found.dtype == torch.uint8
        high, wide = ((found[i].max().item() - found[i].min().item()) / 2 / side for i in (0, 1))
        assert 0.6 < high / wide < 1.67
        shares.append(high * wide)
    assert 0.15 < min(shares) < 0.4 and 0.85 < max(shares) <= 1.0
    assert torch.equal(cropped(picture, 0.25, random.Random(1)), cropped(picture, 0.25, random.Random(1)))
    for data, message in (
        ({"crop": 0.0}, "above 0 and at most 1, got 0"),
        ({"crop": 0.5, "feature_cache": "x"}, "which would be shown whole"),
    ):
        with pytest.raises(ValueError, match=message):
            PairData(**data)


def test_several_files_are_opened_side_by_side_in_their_order(tmp_path: Path) -> None:
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4 + i, 3), (10 * i, 0, 0)).save(paths[-1])
    opened = load_images(paths)
    assert [picture.size for picture in opened] == [(4 + i, 3) for i in range(20)]
    assert [picture.getpixel((0, 0)) for picture in opened] == [(10 * i, 0, 0) for i in range(20)]
    same = Image.open(paths[3])
    assert [picture.size for picture in load_images([same, same, paths[5]])] == [(7, 3), (7, 3), (9, 3)]
    for i in (15, 7):
        paths[i].write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"7\.png"):  # the first, whichever thread is faster
        load_images(paths)
