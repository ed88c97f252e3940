"""The pictures of a folder in an index that is kept: what has not changed is not read again.

The index lies outside the folder, which may be read-only or synchronised with other machines, in the user's cache:
`$XDG_CACHE_HOME/unimodal/NAME-HASH/FINGERPRINT`, or under `~/.cache` where the variable is not set. NAME-HASH tells folders apart by
their full path, FINGERPRINT models by their weights. All of it may be deleted at any time, and is made again. The index names its folder
(`root` in `index.json`): documents that are not in the folder are forgotten, so no index of other documents is taken for it.
"""

import hashlib
import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from unimodal import arguments
from unimodal.data.folders import pictures_in, require_unicode
from unimodal.files import LOCK, InUseError, locked, restore
from unimodal.search.build import build_index
from unimodal.search.catalogue import Document, Id
from unimodal.search.encoder import Encoder
from unimodal.search.index import Index

WAIT = 600  # seconds to wait for another search that reads the same folder
SILENT = 2  # seconds of them without a word


@dataclass(frozen=True)
class FolderIndex:
    """The index of a folder, and what was done to it.

    Attributes:
        index: hits have the path within the folder as `id`, the full path as `document`.
        fresh: how many pictures are new or have changed.
        stale: how many that it held are gone or have changed.
        skipped: path within the folder -> why the picture cannot be read.
        others: which formats and which linked or closed folders in it are not read, as a sentence; empty where everything is.
    """

    index: Index
    fresh: int
    stale: int
    skipped: dict[str, str]
    others: str


def cache_folder(folder: str | Path) -> Path:
    """Where the user's cache keeps what belongs to a folder of pictures."""
    place = Path(folder).resolve()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "unimodal", f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:12]}")


def index_folder(
    encoder: Encoder,
    folder: str | Path,
    kept_in: str | Path | None = None,
    *,
    batch_size: int = 8,
    show_progress_bar: bool | None = None,
) -> FolderIndex:
    """The index of the pictures in a folder and the folders in it, brought up to date: new and changed pictures are read, those that
    are gone are dropped, those that cannot be read are left out and named. A picture has changed when its size or its time of change has.
    Where another model made the index, a warning says so, and it is made again.

    Args:
        encoder: the model and its processor.
        folder: where the pictures are.
        kept_in: a folder for the index; by default one in the user's cache, for this folder and this model.
        batch_size: pictures at a time.
        show_progress_bar: None shows one for several batches on a terminal.

    Raises:
        FileNotFoundError: no such folder of pictures.
        PermissionError: the index cannot be written.
        InUseError: another search has been bringing the index up to date for ten minutes.
        ValueError: no picture is there, none can be read, or `kept_in` holds something else, which stays as it is.
    """
    folder = arguments.path(folder, "folder")
    kept_in = arguments.optional(arguments.path, kept_in, "kept_in")
    batch_size = arguments.integer(batch_size, "batch_size")
    root = folder.resolve()
    require_unicode(root)
    place = cache_folder(root) / encoder.fingerprint() if kept_in is None else kept_in
    end = time.monotonic() + WAIT
    while True:
        try:
            return _up_to_date(encoder, folder, root, place, batch_size, show_progress_bar)
        except InUseError:  # what the other one does is what is wanted here
            _wait_for_another(root, place, end)


def _wait_for_another(root: Path, place: Path, end: float) -> None:
    """Wait until another search is done with a folder's index, and say so where that takes long.

    Raises:
        InUseError: it is not done at `end`.
    """
    name = f"the index {place}"
    try:
        with locked(place / LOCK, name, SILENT):
            return
    except InUseError:
        warnings.warn(f"another search reads the pictures in {root} just now; this one waits for it", stacklevel=4)
    with locked(place / LOCK, name, max(0, end - time.monotonic())):
        pass


def _up_to_date(
    encoder: Encoder, folder: Path, root: Path, place: Path, batch_size: int, show: bool | None
) -> FolderIndex:
    found = pictures_in(folder)
    wanted: dict[Id, Document] = {}
    unnamed: dict[str, str] = {}
    for path in found.pictures:
        name = path.relative_to(folder).as_posix()
        try:
            require_unicode(root / name)
            stat = path.stat()
        except (OSError, ValueError) as error:
            unnamed[name] = str(error)
            continue
        wanted[name] = Document(name, str(root / name), {"version": f"{stat.st_size} {stat.st_mtime_ns}"})
    index = _open(encoder, place, root)
    fresh, changed, gone = _differences(index, wanted)
    if fresh or gone:
        _require_writable(place)
        with index.writing():
            fresh, changed, gone = _differences(index, wanted)  # another search may have been here meanwhile
            if gone:
                index.delete(gone)
            if fresh:
                index.add(
                    [Path(one.document) for one in fresh],
                    [one.id for one in fresh],
                    [one.metadata for one in fresh],
                    replace=True,
                    batch_size=batch_size,
                    on_error="skip",
                    show_progress_bar=show,
                )
    skipped = unnamed | {str(name): why for name, why in index.catalogue.skipped().items()}
    if not len(index):
        raise ValueError(
            f"none of the {len(found.pictures)} pictures in {folder} can be read: {next(iter(skipped.values()))}"
        )
    return FolderIndex(index, len(fresh), len(gone) + changed, skipped, found.left_out)


def _differences(index: Index, wanted: dict[Id, Document]) -> tuple[list[Document], int, list[Id]]:
    """Documents that are new or have changed, how many of them have changed, and ids of those that are gone."""
    held = {document.id: document for document in index.catalogue.listed()}
    fresh = [document for name, document in wanted.items() if held.get(name) != document]
    return fresh, sum(one.id in held for one in fresh), [name for name in held if name not in wanted]


def _open(encoder: Encoder, place: Path, root: Path) -> Index:
    """The index of a folder at a place, begun where there is none, begun anew where it is of no use.

    Raises:
        ValueError: the place holds something else.
    """
    restore(place)
    if not (place / "index.json").exists():
        _require_writable(place)
        try:
            return build_index(encoder, [], folder=place, root=root)
        except ValueError:
            if not (place / "index.json").exists():
                raise
            # another search has begun the index meanwhile, and filled it
    _require_index_of(place, root)
    try:
        return Index.load(place, encoder)
    except ValueError as error:  # another model's, another format's, damaged, or its beginning was interrupted
        _require_writable(place)
        warnings.warn(f"{error}. All pictures in {root} are read again", stacklevel=4)
        build_index(encoder, [], root=root).save(place)
        return Index.load(place, encoder)


def _require_index_of(place: Path, root: Path) -> None:
    """Raises:
    ValueError: what is kept at a place is not the index of this folder.
    """
    try:
        owner = json.loads((place / "index.json").read_text(encoding="utf-8")).get("root")
    except (ValueError, AttributeError):  # the index.json of something else
        owner = None
    if owner != str(root):
        held = "something that is not the index of a folder" if owner is None else f"the index of {owner}"
        raise ValueError(
            f"{place} holds {held}, expected the index of {root}; choose another folder for the index, or delete it if "
            "nobody needs it"
        )


def _require_writable(place: Path) -> None:
    """Make the folder of an index.

    Raises:
        PermissionError: it cannot be made, or not be written.
    """
    advice = "give another folder for the index, or set XDG_CACHE_HOME to one that you may write"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"{place}: the index cannot be kept there ({error.strerror}); {advice}") from error
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{place}: the index cannot be kept there (it is read-only); {advice}")
