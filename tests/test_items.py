"""Proves that a string is told apart by how it is written: a picture is read or refused with the reason, never embedded as words."""

import base64
import io
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from unimodal.data import load_image
from unimodal.data.endings import PICTURES, UNREAD, names_picture
from unimodal.data.items import Item, as_item, as_items, is_single

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def encoded(form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, form)
    return content.getvalue()


PNG = encoded()


def data_url(content: bytes = PNG, head: str = "image/png;base64") -> str:
    return f"data:{head},{base64.b64encode(content).decode()}"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a dog.png"
    path.write_bytes(PNG)
    return path


# Which strings are pictures.


@pytest.mark.parametrize("ending", sorted({*PICTURES, *UNREAD}))
def test_every_ending_of_a_picture_is_one_in_capitals_or_not(ending: str) -> None:
    for text in (f"IMG_1{ending}", f"/no/IMG 1{ending.upper()}", f"  C:\\a\\IMG{ending.title()}\r\n", f'"IMG{ending}"'):
        assert names_picture(text), text
        with pytest.raises(FileNotFoundError, match=r"there is no image file .*; check the path, or pass \{'text'"):
            as_item(text)
        assert as_item({"text": text}) == Item(text=text)


@pytest.mark.parametrize(
    "text",
    [
        "photo.jpg is nice",
        "a dog.",
        "photo.jpg.",
        "the logo of node.js",
        "a jpg",
        ".jpg",
        "see https://host/photo for more",
        "data: the new oil",
        "data is a word, image is another",
        "file under: cats",
        "and/or",
        "1/2 of a cake",
        "He said: C: is a drive",
        "~5 dogs",
        "...",
        "'quoted'",
        "iVBORw0KGgo",
        "a\nb",
    ],
)
def test_sentences_stay_texts(text: str) -> None:
    assert as_item(text) == Item(text=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://host/photo", r"'https://host/photo' is a URL without a picture's suffix; pass \{'image': url\}"),
        ("s3://bucket/key", "is a URL without a picture's suffix"),
        ("/photos/2023/IMG_0001", r"is a path without a picture's suffix; pass \{'image': path\} or pathlib.Path"),
        ("~/IMG_0001", "is a path without"),
        ("./IMG_0001\n", "'./IMG_0001' is a path without"),
        ("C:\\My Pictures\\IMG_0001", "is a path without"),
        ("\\\\nas\\photos\\IMG_0001", "is a path without"),
        ("clip.MP4", r"'clip.MP4' ends like the file of a video; pass \{'video': path\}"),
        (
            base64.b64encode(PNG).decode(),
            r"^item 1: 'iVBORw0KGgo.{29}'\.\.\. \(\d+ characters\) is a picture in base64; pass the bytes",
        ),
    ],
)
def test_what_could_be_meant_either_way_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_items(["words", text])
    assert as_item({"text": text}).text == text


def test_a_path_is_read_in_every_form_in_which_users_write_it(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(photo.parent))
    for text in (
        str(photo),
        f"{photo}\n",
        f"\t{photo} \r\n",
        f'"{photo}"',
        f"'{photo}'",
        "~/a dog.png",
        photo.as_uri(),
        f"FILE://localhost{quote(str(photo))}",
    ):
        for item in (as_item(text), as_item({"image": text})):
            assert item.kind == "image" and item.document == str(photo), text
        assert (np.asarray(load_image(text)) == PIXELS).all()


def test_what_is_in_a_data_url_is_read() -> None:
    text = base64.b64encode(PNG).decode()
    for url in (
        data_url(),
        f" {data_url()}\n",
        f"DATA:image/PNG;charset=utf-8;Base64,{text}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{text[:40]}\n{text[40:]}",
        f"data:image/png,{quote(PNG)}",
    ):
        item = as_item(url)
        assert item.kind == "image" and (np.asarray(load_image(item.image)) == PIXELS).all()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "has no comma between its head and its content"),
        ("data:image/png;base64,", "is empty; expected the bytes of a picture"),
        ("data:text/plain;base64,aGFsbG8=", "is of the type 'text/plain'; expected a picture"),
        ("data:,words", "is of the type 'text/plain'"),
        ("data:image/png;base64,@@@@" + "A" * 4000, "is no base64"),
        ("data:image/png;base64," + "A" * 4000, "is no image"),
        (data_url(PNG[:60]), "is truncated or corrupt"),
    ],
)
def test_malformed_data_urls_are_refused_and_never_printed_whole(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_image(as_item(url).image)
    assert len(str(error.value)) < 400


def test_messages_never_print_a_whole_value() -> None:
    url, content = data_url(bytes(9000)), bytes(9000)
    for value in (
        {"text": content},
        {"image": [url, 3]},
        {"image": {"url": url}},
        {"video": content},
        {url: 1},
        [[url]],
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            as_items(value)
        assert len(str(error.value)) < 500


# Bytes and open files.


def test_bytes_and_open_files_are_one_picture(photo: Path) -> None:
    buffer = io.BytesIO(PNG)
    buffer.seek(0, io.SEEK_END)  # as after writing it
    with open(photo, "rb") as file:
        for value in (PNG, bytearray(PNG), memoryview(PNG), buffer, file):
            assert is_single(value) and as_item(value).kind == "image"
            for _ in range(2):
                assert (np.asarray(load_image(value)) == PIXELS).all()
        assert [item.kind for item in as_items([buffer, file, "words"])] == ["image", "image", "text"]


def test_files_that_cannot_be_read_say_why(photo: Path) -> None:
    with open(photo, "rb") as file:
        pass
    with pytest.raises(ValueError, match="the file given as an image is closed; pass it while it is open"):
        load_image(file)
    for encoding in ("latin-1", "utf-8"):  # in UTF-8 the bytes of a picture are no text
        with (
            open(photo, encoding=encoding) as file,
            pytest.raises(TypeError, match="was opened as text; open it with mode 'rb'"),
        ):
            load_image(file)
    with pytest.raises(ValueError, match="the open file '' given as an image is no image"):
        load_image(io.BytesIO(b"words"))


def test_a_picture_that_was_closed_is_not_called_corrupt(photo: Path) -> None:
    with Image.open(photo) as left:
        pass
    closed = Image.open(photo)
    closed.close()
    file = open(photo, "rb")  # noqa: SIM115
    without = Image.open(file)
    file.close()
    for picture in (left, closed, without):
        with pytest.raises(ValueError, match="was closed before its pixels were read; open it again, or call its load"):
            load_image(picture)
    with Image.open(photo) as read:
        read.load()
    assert (np.asarray(load_image(read)) == PIXELS).all()
