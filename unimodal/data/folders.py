"""The pictures in a folder and the folders in it, and what is left out of them and why.

A picture is told by its ending. Hidden files and folders are none, nor is what a system keeps beside one's pictures: thumbnails,
resource forks, deleted files. A linked folder is followed once: not where it leads to a folder that is read anyway, nor where it leads
back to one that holds it. A link that leads nowhere counts as a picture, so that whoever opens it says so.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from unimodal.data.endings import PICTURES, UNREAD, ending

# Beside those that begin with a dot: of macOS, Synology, QNAP, Windows.
SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "#recycle", "@Recycle", ".@__thumb", "$RECYCLE.BIN", "Thumbs"))
TOLD = 3  # links or folders that are named


@dataclass
class Found:
    """What lies in a folder.

    Attributes:
        folder: where it lies.
        pictures: their paths, in order.
        unread: the endings of pictures that are not read, as often as they occur.
        links: linked folders that are not followed.
        closed: folders that cannot be opened.
    """

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    closed: list[Path] = field(default_factory=list)

    @property
    def left_out(self) -> str:
        """What is not read of the folder, as a sentence; empty where everything is."""
        told = []
        if self.unread:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(self.unread).items()))
            told.append(f"not read: {counts}; convert these to JPEG")
        if self.links:
            told.append(
                f"not followed: {self._named(self.links)}, linked to a folder that is read already or holds this one"
            )
        if self.closed:
            told.append(f"not opened: {self._named(self.closed)}; ask for the right to read it")
        return "; ".join(told)

    def _named(self, paths: list[Path]) -> str:
        names = [repr(path.relative_to(self.folder).as_posix()) for path in paths[:TOLD]]
        return ", ".join(names) + (f" and {len(paths) - TOLD} more" if len(paths) > TOLD else "")


def find_pictures(folder: Path) -> Found:
    """The pictures of a folder, by their endings.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is a file.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder that holds the pictures")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the pictures")
    found = Found(folder)
    whole = folder.resolve()
    read: set[Path] = set()  # folders by their real path
    links = _walk(folder, found, read)
    while links:  # folders that are there come before those that are only linked
        link = links.pop(0)
        place = link.resolve()
        if place in read or whole.is_relative_to(place):
            found.links.append(link)
        else:
            links += _walk(link, found, read)
    found.pictures.sort()
    return found


def pictures_in(folder: Path) -> Found:
    """The same of a folder that holds at least one picture.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no picture in it, or it is a file.
    """
    found = find_pictures(folder)
    if not found.pictures:
        raise ValueError(
            f"{folder} holds no pictures; expected files that end in {', '.join(PICTURES)}"
            + (f"; {found.left_out}" if found.left_out else "")
        )
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not the user's own picture, or holds none."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """The files and folders in a folder that are not hidden, in order."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.name))


def require_unicode(path: Path) -> None:
    """Refuse a path that no file of results can hold.

    Raises:
        ValueError: its name is not UTF-8, as of a file from an old disk or archive.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} has a name that is not UTF-8; rename it") from None


def _walk(folder: Path, found: Found, read: set[Path]) -> list[Path]:
    """Put what lies in a folder and the folders in it into `found`; the links to folders that were met, in order."""
    read.add(folder.resolve())
    try:
        entries = sorted(
            (entry for entry in os.scandir(folder) if not is_hidden(entry.name)), key=lambda entry: entry.name
        )
    except OSError:
        found.closed.append(folder)
        return []
    links = []
    for entry in entries:
        path, ends = folder / entry.name, ending(entry.name)
        if _is_folder(entry):
            if entry.is_symlink():
                links.append(path)
            elif path.resolve() not in read:
                links += _walk(path, found, read)
        elif ends in PICTURES:
            found.pictures.append(path)
        elif ends in UNREAD:
            found.unread.append(ends)
    return links


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link in a circle, or to where one may not look, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False
