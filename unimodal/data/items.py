"""What an item is: images, a video, a text, or several of these together, in any of the forms in which users pass them.

    {"image": x}, {"text": s}, {"image": x, "text": s}    as it says; removes all doubt
    {"image": [x, y]}, {"video": v}                       several images; a video: its frames in order, or its file
    pathlib.Path, PIL image, array, tensor, bytes         an image; so is a file that is open for reading in binary
    "photo.jpg", "https://host/photo.jpg"                 an image: the string is written like one
    any other string                                      a text

How a string is told apart, `unimodal.data.endings` says.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from unimodal import arguments
from unimodal.arguments import described
from unimodal.data.endings import address_of, is_data, is_remote, names_picture, shown
from unimodal.data.images import load_image
from unimodal.data.video import read_video, sample_frames

IMAGE_FORMS = "path, URL, PIL image, array, tensor, bytes, open file"
FORMS = f"a text, an image ({IMAGE_FORMS}), or a dict with one or more of the keys 'image', 'video', 'text'"
KEYS = ("image", "video", "text", "fps")
FPS = 2.0  # of a list of frames whose rate is not given, as Qwen's own tools take it


@dataclass(frozen=True)
class Item:
    """An image in any form that `load_image` takes, a text, or both; for models that read them several images or a video, too.

    Args:
        image: one, or a tuple of several.
        text: words.
        video: a tuple of frames in order, each in any form that `load_image` takes, or the path of a file.
        fps: frames per second of a tuple of frames.
    """

    image: Any = None
    text: str | None = None
    video: Any = None
    fps: float = FPS

    @property
    def parts(self) -> tuple[str, ...]:
        """What a model must read for it: of `image`, `images` (several), `video` and `text` those that are there."""
        several = "images" if isinstance(self.image, tuple) else "image"
        given = {several: self.image, "video": self.video, "text": self.text}
        return tuple(part for part, value in given.items() if value is not None)

    @property
    def kind(self) -> Literal["image", "images", "video", "text", "both", "empty"]:
        """Its one part; `both` for several parts together, `empty` for none."""
        kind: Any = self.parts[0] if len(self.parts) == 1 else "both" if self.parts else "empty"
        return kind

    @property
    def images(self) -> tuple[Any, ...]:
        """Its images, one or several; without the frames of its video."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def document(self) -> Any:
        """The item in words, for an index or a message: text, absolute path or URL; None for an image that has no name."""
        if self.kind in ("image", "text"):
            return _name(self.image) if self.kind == "image" else self.text
        named = {"image": self.image, "video": self.video}
        words = {key: _name(value) for key, value in named.items() if value is not None}
        if isinstance(self.video, tuple):
            words["fps"] = self.fps
        return words if self.text is None else {**words, "text": self.text}

    @property
    def told(self) -> str:
        """The document as a message shows it, never a whole data URL."""
        document = self.document
        return shown(document) if isinstance(document, str) else f"{document!r:.200}"

    def opened(self, where: str = "") -> "Item":
        """The item with its pictures loaded (`load_image`), a video as at most 64 of its frames; `where` opens the message of an error.

        Raises:
            OSError, ValueError, TypeError, ImportError: one of its pictures or its video cannot be read; the message says which.
        """
        image, video, fps = self.image, self.video, self.fps
        if isinstance(image, tuple):
            image = tuple(_loaded(one, f"{where}image {i}: ") for i, one in enumerate(image))
        elif image is not None:
            image = _loaded(image, where)
        if isinstance(video, tuple):
            frames, fps = sample_frames(list(enumerate(video)), fps)
            video = tuple(_loaded(frame, f"{where}frame {i}: ") for i, frame in frames)
        elif video is not None:
            video, fps = read_video(video)
        return replace(self, image=image, video=video, fps=fps)


def picture_key(picture: Any) -> Any:
    """Equal for pictures, or videos, that are the same one: by path or URL, otherwise the same object in memory."""
    if isinstance(picture, tuple):
        return tuple(map(picture_key, picture))
    return str(picture) if isinstance(picture, str | Path) else _Held(picture)


class _Held:
    """An object, equal to itself alone. It is held, so that no other can come to lie at its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _loaded(picture: Any, where: str) -> Image.Image:
    try:
        return load_image(picture)
    except (OSError, ValueError, TypeError) as error:
        raise type(error)(f"{where}{error}") from error


def _name(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_name(one) for one in value]
    if not isinstance(value, str | Path):
        return None
    name = str(value)
    return (
        name if is_data(name) or is_remote(name) else os.path.abspath(name)
    )  # an index is opened from other folders too


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one item rather than several."""
    one = str | bytes | bytearray | memoryview | dict | os.PathLike | Image.Image | np.ndarray | torch.Tensor | Item
    return isinstance(inputs, one) or hasattr(inputs, "read")


def as_items(inputs: Any, *, check_files: bool = True) -> list[Item]:
    """One item or several, as a list. `check_files=False` leaves missing files to whoever opens them.

    Raises:
        TypeError: an item has none of the known forms.
        ValueError: an empty text, a dict with other keys, a URL that could be meant either way.
        FileNotFoundError: the path of an image names no file.
    """
    if is_single(inputs):
        return [as_item(inputs, check_files=check_files)]
    given = arguments.listed(inputs, "items", f"items, each of them {FORMS}")
    return [as_item(value, f"item {i}: ", check_files=check_files) for i, value in enumerate(given)]


def as_item(value: Any, where: str = "", *, check_files: bool = True) -> Item:
    """One item; `where` opens the message of an error. See `as_items`."""
    if isinstance(value, Item):
        return value
    if isinstance(value, dict):
        if value.keys() - set(KEYS) or not value.keys() - {"fps"}:
            raise ValueError(
                f"{where}a dict has one or more of the keys 'image', 'video', 'text', got [{', '.join(shown(str(key)) for key in value)}]"
            )
        image = _images(value["image"], where, check_files) if "image" in value else None
        text = _text(value["text"], where) if "text" in value else None
        video = _video(value["video"], where, check_files) if "video" in value else None
        return Item(image, text, video, _rate(value, where))
    if not is_single(value):
        raise TypeError(f"{where}expected {FORMS}, got {described(value)}")
    if isinstance(value, str) and not names_picture(value, where):
        return Item(text=_text(value, where))
    return Item(_image(value, where, check_files))


def _images(value: Any, where: str, check_files: bool) -> Any:
    if not isinstance(value, list | tuple):
        return _image(value, where, check_files)
    if not value:
        raise ValueError(f"{where}'image' is an empty list; leave it out, or give it images")
    images = tuple(_image(one, f"{where}image {i}: ", check_files) for i, one in enumerate(value))
    return images if len(images) > 1 else images[0]


def _video(value: Any, where: str, check_files: bool) -> Any:
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{where}'video' is an empty list; give its frames in order")
        return tuple(_image(one, f"{where}frame {i}: ", check_files) for i, one in enumerate(value))
    if not isinstance(value, str | Path):
        raise TypeError(f"{where}expected a video as a list of frames or the path of a file, got {described(value)}")
    if isinstance(value, str):
        value = address_of(value)
        if is_data(value) or is_remote(value):
            raise ValueError(
                f"{where}{shown(value)}: videos are not downloaded; fetch the file yourself and pass its path"
            )
    if check_files and not os.path.isfile(value):
        raise FileNotFoundError(f"{where}there is no video file {shown(str(value))}; check the path")
    return value


def _rate(value: dict[str, Any], where: str) -> float:
    fps = value.get("fps", FPS)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise ValueError(f"{where}'fps' is the number of frames per second, expected one above 0, got {described(fps)}")
    if "fps" in value and not isinstance(value.get("video"), list | tuple):
        raise ValueError(f"{where}'fps' belongs to a video that is given as a list of frames; leave it out")
    return float(fps)


def _image(value: Any, where: str, check_files: bool) -> Any:
    if not is_single(value) or isinstance(value, dict | Item):
        raise TypeError(f"{where}expected an image ({IMAGE_FORMS}), got {described(value)}")
    if isinstance(value, str):
        value = address_of(value)
        if is_data(value) or is_remote(value):
            return value
    elif isinstance(value, os.PathLike):
        value = arguments.path(value, where.removesuffix(": ") or "an image")
    if check_files and isinstance(value, str | Path) and not os.path.isfile(value):
        raise FileNotFoundError(
            f"{where}there is no image file {shown(str(value))}; check the path, or pass {{'text': ...}} to mean these words"
        )
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where}expected a text as str, got {described(value)}")
    if not value.strip():
        raise ValueError(f"{where}the text is empty; leave it out, or give it words")
    return arguments.text(value, where.removesuffix(": ") or "a text")
