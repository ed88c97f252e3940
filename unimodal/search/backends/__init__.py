"""Where vectors are searched: one small protocol, four backends.

    exact     built in: every vector is looked at, from memory-mapped files
    faiss     a graph in memory (Malkov and Yashunin, arXiv:1603.09320), for more than about 50,000; `pip install 'unimodal[faiss]'`
    lancedb   columns on the disk or an object store, with metadata and SQL filters; `pip install 'unimodal[lancedb]'`
    milvus    one client from a file to a cluster; `pip install 'unimodal[milvus]'`

A backend finds candidates by the vectors it was given, in the precision it was asked for: `float32`, `int8`, or `binary` (one sign bit per
dimension). `Index` hands it truncated vectors where the first pass shall be narrow, and scores the candidates again by full vectors; so a
backend only has to find, and its scores need no common scale.

Legend: n vectors, Q queries, E width, k candidates.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from unimodal import arguments
from unimodal.config import nearest
from unimodal.search.backends.exact import ExactIndex
from unimodal.search.backends.faiss import FaissIndex
from unimodal.search.backends.lancedb import LanceIndex
from unimodal.search.backends.milvus import MilvusIndex, release_file
from unimodal.search.filters import Selection

Backend = Literal["exact", "faiss", "lancedb", "milvus"]
FirstPrecision = Literal["float32", "int8", "binary"]

__all__ = ["Backend", "ExactIndex", "FaissIndex", "FirstPrecision", "LanceIndex", "MilvusIndex", "VectorIndex"]


class VectorIndex(Protocol):
    """Unit vectors under keys, kept in a folder. What `add` and `delete` did is on the disk when they return.

    Attributes:
        shared: whether what another object adds or deletes in the same place shows at once; otherwise an object stays as it was opened.
    """

    shared: bool

    def __len__(self) -> int: ...

    def keys(self) -> np.ndarray:
        """Keys of all vectors, [n] int64, in any order."""

    def add(self, keys: np.ndarray, vectors: np.ndarray, payload: list[dict[str, Any]]) -> None:
        """Add unit vectors [n, E] float32 under new keys [n], each with its metadata for filters."""

    def delete(self, keys: np.ndarray) -> None:
        """Remove vectors by key; keys that are not there are left alone."""

    def search(self, queries: np.ndarray, k: int, selection: Selection | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The best k of each of the queries [Q, E]: keys [Q, k] int64, -1 where there are fewer, and scores [Q, k], higher is better."""

    def close(self) -> None:
        """Let go of files and connections."""


def check_backend(name: str, width: int, precision: str, uri: str | None = None) -> None:
    """Raises:
    ValueError: an unknown name or precision, a width that precision cannot hold, an address for a backend that has none.
    """
    if arguments.text(name, "backend") not in get_args(Backend):
        raise ValueError(f"backend: no {name!r:.80}; {nearest(name, get_args(Backend))}")
    arguments.choice(precision, "first_precision", get_args(FirstPrecision))
    arguments.optional(arguments.text, uri, "uri")
    if precision == "binary" and width % 8:
        raise ValueError(f"first_precision 'binary' packs eight dimensions to a byte, got the width {width}")
    if uri is not None and name != "milvus":
        raise ValueError(f"uri: only the milvus backend has a server, got {uri!r:.80} for {name}")


def open_backend(name: str, folder: Path, width: int, precision: str, uri: str | None = None) -> VectorIndex:
    """Open a backend's folder; where it is missing, it is empty, and made when vectors are added.

    Args:
        name: which one.
        folder: where it keeps its files.
        width: E, of the vectors it will be given.
        precision: in which it keeps them.
        uri: address of a Milvus server; None keeps a file.

    Raises:
        ValueError: an unknown name or precision, a width that precision cannot hold, an address for a backend that has none.
        ImportError: the backend's library is not installed.
        NotADirectoryError: the folder is a file.
        PermissionError: a file may not be read.
    """
    check_backend(name, width, precision, uri)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected the folder of the {name} backend")
    for path in folder.rglob("*"):
        if not os.access(path, os.R_OK) and path.exists():  # another process may have removed it
            raise PermissionError(f"{path} may not be read; let its owner change its mode")
    if name == "milvus":
        return MilvusIndex(folder, width, precision, uri)
    kinds: dict[str, Any] = {"exact": ExactIndex, "faiss": FaissIndex, "lancedb": LanceIndex}
    return kinds[name](folder, width, precision)


def release_backend(name: str, folder: Path) -> None:
    """Close what the library of a backend keeps open of a folder though all objects are closed."""
    if name == "milvus" and folder.exists():
        release_file(folder)


def discard_backend(name: str, folder: Path) -> None:
    """Remove the folder of a backend."""
    release_backend(name, folder)
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
