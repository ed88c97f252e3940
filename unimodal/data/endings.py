"""How the names of pictures end, and whether a string names a picture or is words. The only table of endings, and the only rule.

A string is told apart by how it is written, never by what happens to lie on the disk. Spaces and line breaks around it, and quotation
marks around the whole of it, do not count. In this order:

    "data:image/png;base64,..."             a picture, whose bytes are in the string
    "file:///home/me/a%20dog.jpg"           a picture; other addresses that begin with `file:` likewise, whatever their ending
    "https://host/photo.jpg?size=2"         a picture: the address has a picture's ending
    "https://host/photo", "s3://host/key"   could be meant either way: an error
    "photo.JPG", "~/IMG 1.heic", "C:\\a.tif" a picture: the string ends like one, in capitals or not
    "/photos/IMG_0001", "C:\\IMG_0001"       a path without an ending could be meant either way: an error
    "clip.mp4"                              a video, which a dict names: an error
    any other string                        a text: "a dog.", "photo.jpg is nice", "the logo of node.js"

So a sentence that happens to end in "photo.jpg" is taken for a picture, and where no such file is there, an error says so and how to pass
it as words: a mistyped path is never embedded as words. `{"text": ...}` is always words; `{"image": ...}`, `pathlib.Path` and bytes
are always a picture.
"""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

# Ending -> Pillow's name of the format.
PICTURES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    ".webp": "WEBP",
    ".gif": "GIF",
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "JPEG2000"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "HEIF"),
}
# Pictures that nothing here decodes: cameras' raw files (of some of which Pillow would show a thumbnail), drawings and others.
RAW = (
    ".dng",
    ".cr2",
    ".cr3",
    ".crw",
    ".nef",
    ".nrw",
    ".arw",
    ".srf",
    ".sr2",
    ".raf",
    ".orf",
    ".rw2",
    ".pef",
    ".srw",
    ".x3f",
    ".3fr",
    ".iiq",
)
UNREAD = frozenset(
    (
        *RAW,
        ".jxl",
        ".jxr",
        ".psd",
        ".psb",
        ".xcf",
        ".exr",
        ".hdr",
        ".tga",
        ".ico",
        ".icns",
        ".pcx",
        ".dds",
        ".svg",
        ".svgz",
        ".eps",
        ".wmf",
        ".emf",
        ".pdf",
    )
)
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".3gp"))
LONGEST = 200  # characters of an address in a message
CONVERT = "convert it to JPEG or PNG"

_DATA = re.compile(r"data:(image|base64|[^\s,]*[/;]|,)", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://\S", re.IGNORECASE)
_FILE = re.compile(r"file:/", re.IGNORECASE)
# The first bytes of a PNG, JPEG, GIF or WebP, in base64.
_BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{30,}")
_PATH = re.compile(r"([a-z]:\\.|\\\\\w|[a-z]:/\S*$|~[\\/]\S*$|\.\.?[\\/]\S*$|/[^/\s]+/\S*$)", re.IGNORECASE)


def ending(name: str | Path) -> str:
    """The ending of a name in small letters with its dot; empty where it has none, as of a hidden file called `.jpg`."""
    return os.path.splitext(str(name))[1].lower()


def shown(address: str) -> str:
    """An address or a path as a message shows it: enough to know it again, never a whole data URL. Of a long path its end counts most."""
    most = 40 if is_data(address) or _BASE64.match(address) else LONGEST
    if len(address) <= most:
        return repr(address)
    if most < LONGEST:
        return f"{address[:most]!r}... ({len(address)} characters)"
    return f"{address[: LONGEST // 2]!r}...{address[-LONGEST // 2 :]!r} ({len(address)} characters)"


def names_picture(text: str, where: str = "") -> bool:
    """Whether a string names a picture, by the rule above; `where` opens the message of an error.

    Raises:
        ValueError: the string could be meant either way, names a video, or is a picture in base64 without the head of a data URL.
    """
    name = _bare(text)
    ends = ending(re.split("[?#]", name)[0] if is_remote(name) else name)
    if is_data(name) or _FILE.match(name) or ends in PICTURES or ends in UNREAD:
        return True
    if is_remote(name) and len(name.split()) == 1:
        raise ValueError(
            f"{where}{shown(name)} is a URL without a picture's suffix; pass {{'image': url}} for the picture behind it, or "
            "{'text': url} for these characters"
        )
    if ends in VIDEOS:
        raise ValueError(
            f"{where}{shown(name)} ends like the file of a video; pass {{'video': path}} for the video, or {{'text': ...}} for "
            "these words"
        )
    if _BASE64.fullmatch(name):
        raise ValueError(
            f"{where}{shown(name)} is a picture in base64; pass the bytes of the file, or a data URL ('data:image/png;base64,...')"
        )
    if _PATH.match(name):
        raise ValueError(
            f"{where}{shown(name)} is a path without a picture's suffix; pass {{'image': path}} or pathlib.Path for the picture "
            "that lies there, or {'text': ...} for these characters"
        )
    return False


def address_of(text: str) -> str:
    """The path, URL or data URL in a string that names a picture or a video: without what stands around it, a `file:` URL as a path,
    `~` as the user's folder.

    Raises:
        ValueError: a `file:` URL of another machine.
    """
    name = _bare(text)
    if _FILE.match(name):
        parts = urlsplit(name)
        if parts.netloc.lower() not in ("", "localhost"):
            raise ValueError(
                f"{shown(name)} names a file of the machine {parts.netloc!r}; copy it here and pass its path"
            )
        return url2pathname(parts.path)
    return os.path.expanduser(name) if name.startswith("~") else name


def is_data(name: str) -> bool:
    """Whether a string is, or was meant as, a data URL (RFC 2397)."""
    return _DATA.match(name) is not None


def is_remote(name: str) -> bool:
    """Whether a string is the address of something on another machine."""
    return _ADDRESS.match(name) is not None


def _bare(text: str) -> str:
    name = text.strip()
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "\"'"  # as a file manager copies a path
    return name[1:-1].strip() if quoted else name
