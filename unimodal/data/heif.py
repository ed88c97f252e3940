"""HEIC and HEIF, the photographs of phones, decoded by pi-heif.

pi-heif ends the whole process at a broken file whose table of items gives one a type that is no text. Such a file is refused before
pi-heif reads it.
"""

import re
from typing import IO

from pi_heif import HeifImageFile, register_heif_opener
from PIL import Image, ImageFile

# An entry of the table (ISO 14496-12, `infe`): its version, flags, number, protection and then its type and names, up to the next entry.
_ENTRY = re.compile(rb"infe(?:\x02.{7}|\x03.{9})(.{4}[^\0]*\0[^\0]*\0)", re.DOTALL)


def register() -> None:
    """Have Pillow open HEIC and HEIF."""
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    Image.register_open(HeifImageFile.format, _open, Image.OPEN[HeifImageFile.format][1])


def _open(file: IO[bytes], name: str | bytes) -> ImageFile.ImageFile:
    for words in _ENTRY.findall(file.read()):
        try:
            words.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"its table of items is broken ({error})") from None
    file.seek(0)
    return HeifImageFile(file, name)
