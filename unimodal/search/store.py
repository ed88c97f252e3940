"""The folder of an index.

    index.json               what never changes: format, model fingerprint, what is kept in which precision, backend
    documents.sqlite         the documents: ids, names, metadata, which are read (`unimodal.search.catalogue`)
    part-00000.safetensors   embeddings (float32) and tokens of the matching head (int8, one scale per token) of up to 1024 documents
    exact/, faiss/, ...      the backend's own files
    .unimodal.lock           held by the one who writes

A document's row number says where it lies: part `row // size`, place `row % size`. A part appears only when it is whole and on the disk,
and is memory-mapped: a search touches the pages of the rows that it scores, and a part that a writer removes meanwhile can still be read.

Legend: n rows, N vectors per row, E embedding width, W token width.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from unimodal.files import BOOKKEEPING, replacing, write_json
from unimodal.search.backends import Backend, FirstPrecision

FORMAT = 2
PART = 1024  # documents: what an interruption can cost
DTYPES: dict[str, Any] = {"F32": np.float32, "I8": np.int8, "I32": np.int32, "I64": np.int64}
OURS = ("index.json", "documents.sqlite*", "part-*.safetensors", ".unfinished-*", *get_args(Backend))

Manifest = dict[str, Any]
Arrays = dict[str, np.ndarray]


class LostPartsError(ValueError):
    """Parts are not there, or not whole; `numbers` says which."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(f"lost parts: {numbers}")
        self.numbers = numbers


def part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.safetensors"


def write_part(path: Path, arrays: Arrays) -> None:
    """The file appears only when it is whole and on the disk."""
    with replacing(path) as unfinished:
        save_file(arrays, unfinished)


def map_part(path: Path) -> Arrays:
    """The arrays of a part, memory-mapped: nothing but the header is read.

    Raises:
        ValueError: the file is not whole.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise ValueError(f"{path} is cut")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    if start + max(entry["data_offsets"][1] for entry in header.values()) != size:
        raise ValueError(f"{path} is cut")
    # torch keeps no descriptor of a file that it has mapped, numpy does: an index may have more parts than a process may open files.
    storage: Any = torch.UntypedStorage.from_file(str(path), False, size)
    raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    data = raw[start:]
    return {
        name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


class Parts:
    """The parts of an index, each mapped when it is first asked for and kept.

    Args:
        folder: of the index.
        size: rows per part.
        shape: of the embedding of one row, (E,) or (N, E).
    """

    def __init__(self, folder: Path, size: int, shape: tuple[int, ...]) -> None:
        self.folder, self.size, self.shape = folder, size, shape
        self._mapped: dict[int, Arrays] = {}

    @property
    def numbers(self) -> list[int]:
        """Numbers of the parts that are mapped."""
        return list(self._mapped)

    def __getitem__(self, number: int) -> Arrays:
        if number not in self._mapped:
            self._mapped[number] = map_part(part_file(self.folder, number))
        return self._mapped[number]

    def map(self, numbers: Iterable[int]) -> None:
        """Map these parts now.

        Raises:
            LostPartsError: some are not there, or not whole.
            PermissionError: one may not be read.
        """
        lost = []
        for number in numbers:
            try:
                self[number]  # noqa: B018
            except (FileNotFoundError, ValueError):
                lost.append(number)
        if lost:
            raise LostPartsError(lost)

    def forget(self, number: int) -> None:
        """Let go of a part that was written again or removed."""
        self._mapped.pop(number, None)

    def embeddings(self, rows: np.ndarray) -> Tensor:
        """Embeddings of rows [n] in order, [n, E] or [n, N, E]."""
        out = np.empty((len(rows), *self.shape), np.float32)
        numbers = rows // self.size
        for number in np.unique(numbers):
            here = numbers == number
            out[here] = self[int(number)]["embedding"][rows[here] % self.size]
        return torch.from_numpy(out)

    def tokens(self, row: int) -> Tensor:
        """What the matching head reads of a document: [length, W] float32, or ids [length]."""
        number, place = divmod(row, self.size)
        part = self[number]
        where = slice(part["end"][place - 1] if place else 0, part["end"][place])
        if len(part["scale"]):
            return torch.from_numpy(part["tokens"][where] * part["scale"][where, None])
        return torch.from_numpy(np.array(part["tokens"][where]))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / "index.json", manifest)


def read_manifest(folder: Path) -> Manifest:
    """Raises:
    FileNotFoundError: no index there.
    ValueError: the index is of another format, or its `index.json` is damaged.
    """
    path = folder / "index.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no index.json; save an index there, or build it with folder=...")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged; copy it back from a backup, or build the index again in another folder")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has index format {manifest.get('format')}, this version reads {FORMAT}; build it again"
        )
    if wrong := [name for name, is_right in CHECKS.items() if not is_right(manifest.get(name))]:
        raise ValueError(
            f"{path} is damaged: {wrong[0]} is {manifest.get(wrong[0])!r}; copy it back from a backup, or build the index again in "
            "another folder"
        )
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


CHECKS: dict[str, Any] = {
    "model": lambda value: isinstance(value, str),
    "precision": lambda value: value in ("int8", "float32"),
    "kind": lambda value: value in ("image", "text", "mixed"),
    "backend": lambda value: value in get_args(Backend),
    "first_precision": lambda value: value in get_args(FirstPrecision),
    "first_width": _is_count,
    "uri": lambda value: value is None or isinstance(value, str),
    "part": _is_count,
    "prompt": lambda value: value is None or isinstance(value, str),
}


def address(uri: str | None) -> str | None:
    """The address of the server in what `index.json` keeps, without the collection's name."""
    return None if uri is None else uri.partition("#")[0]


def require_place(folder: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of the index that was begun in a folder like this one; None where the folder is new or empty.

    Raises:
        ValueError: the folder holds something else.
    """
    if (folder / "index.json").exists():
        there = read_manifest(folder)
        differ = [name for name in manifest if name not in ("part", "uri") and there.get(name) != manifest[name]]
        if address(there["uri"]) != address(manifest["uri"]):
            differ.append("uri")
        if differ:
            raise ValueError(
                f"{folder} holds another index: other {', '.join(differ)}; choose another folder, or delete it"
            )
        return there
    if folder.exists() and any(not _may_be_left(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no index; choose another folder")
    return None


def _may_be_left(name: str) -> bool:
    """Whether a kill before the first write of an index may have left a file of this name."""
    return name in BOOKKEEPING or name == ".index.json" or name.startswith(".unfinished-")


def is_ours(name: str) -> bool:
    """Whether a file or folder of this name belongs to an index."""
    return any(Path(name).match(pattern) for pattern in OURS)


def require_replaceable(folder: Path) -> None:
    """Raises:
    ValueError: the folder holds files that are not an index's.
    NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder for the index")
    if folder.is_dir() and (
        foreign := sorted(path.name for path in folder.iterdir() if not (is_ours(path.name) or _may_be_left(path.name)))
    ):
        raise ValueError(f"{folder} holds other files ({foreign[0]}); choose another folder for the index")
