"""An index as it was at one moment: what every search reads.

A state does not change while others write: its catalogue is a copy, its backend stays as it was opened, its parts are mapped. It is taken
without a lock and without writing a byte. While it is taken a writer may go on, so it is taken again until it is whole: every visible
document has its part and its vectors. What stays incomplete though nobody changes anything is damage.

Legend: N vectors per document, E embedding width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimodal.files import InUseError, restore
from unimodal.search.backends import VectorIndex, open_backend
from unimodal.search.catalogue import PATIENCE, Catalogue, generation
from unimodal.search.encoder import Encoder
from unimodal.search.filters import Filter
from unimodal.search.first import FirstStage
from unimodal.search.store import LostPartsError, Manifest, Parts, address, part_file, read_manifest


@dataclass(frozen=True)
class State:
    """What an index holds at one moment.

    Attributes:
        manifest: what `index.json` says.
        catalogue: the documents.
        parts: their embeddings and tokens.
        first: what finds candidates; None where the backend's files cannot be opened.
        sound: whether the backend has a vector for every document.
        stamp: tells this state from those after it.
    """

    manifest: Manifest
    catalogue: Catalogue
    parts: Parts
    first: FirstStage | None
    sound: bool
    stamp: tuple[object, ...]

    @property
    def backend(self) -> VectorIndex:
        return self.stage.backend

    @property
    def stage(self) -> FirstStage:
        """`first` of a state that is sound."""
        assert self.first is not None
        return self.first

    def keys(self, where: Filter) -> np.ndarray:
        """Keys of the vectors of the documents that a filter lets through."""
        return self.stage.keys(self.catalogue.rows(where))


def shape_of(encoder: Encoder, kind: str) -> tuple[int, ...]:
    """Of the embedding of one document, (E,) or (N, E)."""
    width, several = encoder.model.embedding.dim, encoder.model.image_vectors if kind == "image" else 0
    return (several, width) if several else (width,)


def stage_of(
    manifest: Manifest, backend: VectorIndex, parts: Parts, catalogue: Catalogue, rows: np.ndarray
) -> FirstStage:
    """The first stage of an index that finds these rows."""
    precision, width = manifest["first_precision"], manifest["first_width"]
    return FirstStage(
        backend,
        parts.embeddings,
        rows,
        precision=precision,
        width=width,
        each=parts.shape[0] if len(parts.shape) == 2 else 1,
        ranks=catalogue.ranks,
    )


def backend_of(folder: Path, manifest: Manifest) -> VectorIndex:
    """Open the backend of an index."""
    name, width, precision = manifest["backend"], manifest["first_width"], manifest["first_precision"]
    return open_backend(name, folder / name, width, precision, manifest["uri"])


def require_asked(folder: Path, manifest: Manifest, uri: str | None) -> None:
    """Raises:
    ValueError: the index names a server that was not asked for.
    """
    named = address(manifest["uri"])
    if named is not None and named != uri:
        raise ValueError(
            f"{folder} keeps its vectors on the server {named}, which its index.json names, got uri={uri!r}; give uri={named!r} to "
            "connect to it, where you trust it"
        )
    if named is None and uri is not None:
        raise ValueError(f"{folder} keeps its vectors in its folder, got uri={uri!r}; leave uri out")


def stamp_of(folder: Path) -> tuple[object, ...]:
    """What differs after every change of what is visible in a folder, and after another index took its place."""
    try:
        file = (folder / "index.json").stat()
    except FileNotFoundError:
        return (None,)
    return (file.st_ino, file.st_mtime_ns, generation(folder / "documents.sqlite"))


def newest(folder: Path, encoder: Encoder, uri: str | None, shared: VectorIndex | None = None) -> State:
    """The newest whole state of an index. Where its backend is damaged, the state is not `sound`.

    Args:
        folder: of the index.
        encoder: the model that made it.
        uri: the server that it may use.
        shared: its backend, where that shows by itself what others change.

    Raises:
        FileNotFoundError: no index there.
        ValueError: the index is incomplete, damaged, of another format, or names a server that was not asked for.
        InUseError: others change it all the time.
    """
    end = time.monotonic() + PATIENCE
    while True:
        restore(folder)
        stamp, problem, state = stamp_of(folder), None, None
        try:
            state = _read(folder, encoder, uri, shared, stamp)
        except (FileNotFoundError, ValueError) as error:
            problem = error
        now = stamp_of(folder)
        if state is not None and (state.sound if now[:2] == stamp[:2] else now == stamp):
            return state
        if now == stamp:
            if problem is not None:
                raise problem
            assert state is not None
            return state
        if time.monotonic() > end:
            raise InUseError(f"the index {folder} is being written all the time; try again later") from problem


def _read(
    folder: Path, encoder: Encoder, uri: str | None, shared: VectorIndex | None, stamp: tuple[object, ...]
) -> State:
    manifest = read_manifest(folder)
    require_asked(folder, manifest, uri)
    try:
        catalogue = Catalogue.of(folder / "documents.sqlite", manifest["part"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has lost documents.sqlite, which names its documents; copy it back from a backup, or build the index again in "
            "another folder"
        ) from error
    require_built(folder, catalogue)
    parts = Parts(folder, manifest["part"], shape_of(encoder, manifest["kind"]))
    rows = catalogue.rows()
    try:
        parts.map(np.unique(rows // manifest["part"]).tolist())
    except LostPartsError as error:
        raise ValueError(_lost(folder, catalogue, error.numbers)) from error
    try:
        backend = backend_of(folder, manifest) if shared is None else shared
        first = stage_of(manifest, backend, parts, catalogue, rows)
        sound = not first.lacks(rows)
    except (ImportError, PermissionError, InUseError):
        raise
    except Exception:  # each library has its own for files that are cut or gone
        first, sound = None, False
    return State(manifest, catalogue, parts, first, sound, stamp)


def require_built(folder: Path, catalogue: Catalogue) -> None:
    """Raises:
    ValueError: the first documents of the index are not all there.
    """
    if not catalogue.built:
        parts = {row // catalogue.part for row, _ in catalogue.pending()}
        missing = sorted({row // catalogue.part for row in catalogue.unread()})
        first = part_file(folder, missing[0] if missing else 0).name
        raise ValueError(
            f"{folder} is incomplete: {len(missing)} of {len(parts)} parts are missing, first {first}; build it "
            "again with the same documents and this folder, and it continues there"
        )


def _lost(folder: Path, catalogue: Catalogue, numbers: Sequence[int]) -> str:
    gone = [document.id for row, document in catalogue.documents().items() if row // catalogue.part in set(numbers)]
    some = ", ".join(repr(one) for one in gone[:5]) + (", ..." if len(gone) > 5 else "")
    return (
        f"{folder} has lost {part_file(folder, numbers[0]).name}"
        + (f" and {len(numbers) - 1} other parts" if len(numbers) > 1 else "")
        + f" (not there, or cut), which held {len(gone)} of its {len(catalogue)} documents ({some}); copy it back from a backup, or build "
        "the index again with the same documents and this folder, and what is lost is read again"
    )
