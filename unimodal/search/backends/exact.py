"""Exact search: every vector is looked at. No library beyond numpy and torch.

    keys.bin    int64, one per vector; -1 where it was deleted
    codes.bin   float32 [n, E], int8 [n, E], or sign bits uint8 [n, E / 8]
    scale.bin   float32 [n], of int8 codes

Sign bits are scored by the query's own values, not by its signs: the product of a query and eight signs is looked up by their byte. That
finds far more of what is near than counting the signs that differ (Gordo et al., TPAMI 2014) and takes no more memory.

Codes and scales are memory-mapped and only ever appended to: a query reads them through the page cache, a block at a time, and opening an
index reads none of them. Keys are read when the index is opened and say how many vectors there are: they are written last, when the others
are on the disk, and what a kill left beyond them is written over. A deletion replaces the file of the keys. So an index that is open
stays as it is, whatever another process adds and deletes.

Legend: n vectors, Q queries, E width, k candidates.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimodal.files import flush, replacing
from unimodal.search.filters import Selection
from unimodal.search.quantise import int8_rows, quantise

BLOCK = 16384  # vectors scored at a time
SIGNS = (
    2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) - 1
)  # [256, 8], of each byte
DTYPES: dict[str, Any] = {"float32": np.float32, "int8": np.int8, "binary": np.uint8}


class ExactIndex:
    """Arguments as in `unimodal.search.backends.open_backend`; methods as in `VectorIndex`."""

    shared = False

    def __init__(self, folder: Path, width: int, precision: str) -> None:
        self.folder, self.precision = folder, precision
        bytes_wide = width // 8 if precision == "binary" else width
        self.files: dict[str, tuple[Any, tuple[int, ...]]] = {"codes": (DTYPES[precision], (bytes_wide,))}
        if precision == "int8":
            self.files["scale"] = (np.float32, ())
        keys = self._path("keys")
        self.kept = np.fromfile(keys, np.int64) if keys.exists() else np.empty(0, np.int64)
        self._map()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _map(self) -> None:
        count = len(self.kept)
        self.arrays: dict[str, np.ndarray] = {
            name: np.memmap(self._path(name), dtype, "r", shape=(count, *shape))
            if count
            else np.empty((0, *shape), dtype)
            for name, (dtype, shape) in self.files.items()
        }

    def __len__(self) -> int:
        return int((self.kept >= 0).sum())

    def keys(self) -> np.ndarray:
        return self.kept[self.kept >= 0]

    def add(self, keys: np.ndarray, vectors: np.ndarray, payload: list[dict[str, Any]]) -> None:
        new: dict[str, np.ndarray] = {}
        if self.precision == "int8":
            new["codes"], new["scale"] = int8_rows(vectors)
        else:
            new["codes"] = quantise(vectors, "ubinary" if self.precision == "binary" else "float32")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (dtype, shape) in self.files.items():
            self._append(name, np.ascontiguousarray(new[name], dtype), int(np.prod(shape, dtype=int)))
        self._append("keys", keys.astype(np.int64), 1)
        flush(self.folder)
        self.kept = np.concatenate([self.kept, keys.astype(np.int64)])
        self._map()

    def _append(self, name: str, values: np.ndarray, wide: int) -> None:
        """Write values behind those of the vectors that are there; they are on the disk when this returns."""
        path = self._path(name)
        path.touch()
        with open(path, "r+b") as file:
            file.truncate(len(self.kept) * wide * values.itemsize)
            file.seek(0, 2)
            file.write(values.tobytes())
        flush(path)

    def delete(self, keys: np.ndarray) -> None:
        gone = np.isin(self.kept, keys) & (self.kept >= 0)
        if gone.any():
            self.kept = np.where(gone, -1, self.kept)
            with replacing(self._path("keys")) as unfinished:
                self.kept.tofile(unfinished)

    def search(self, queries: np.ndarray, k: int, selection: Selection | None = None) -> tuple[np.ndarray, np.ndarray]:
        keys = self.kept
        allowed = keys >= 0
        if selection is not None:
            allowed &= np.isin(keys, selection.keys)
        best = torch.full((len(queries), k), -torch.inf)
        found = torch.full((len(queries), k), -1)
        for start in range(0, len(keys), BLOCK):
            rows = slice(start, start + BLOCK)
            scores = torch.from_numpy(self._scores(queries, rows))  # [Q, block]
            scores[:, ~torch.from_numpy(allowed[rows])] = -torch.inf
            top = scores.topk(min(k, scores.shape[1]))
            merged = torch.cat([best, top.values], 1).topk(k)
            best, found = merged.values, torch.cat([found, top.indices + start], 1).gather(1, merged.indices)
        places = found.numpy()
        return np.where(np.isfinite(best.numpy()), keys[places] if len(keys) else -1, -1), best.numpy()

    def _scores(self, queries: np.ndarray, rows: slice) -> np.ndarray:
        """Products of the queries and the kept vectors, [Q, block] float32."""
        codes = self.arrays["codes"][rows]
        if self.precision == "binary":
            tables = queries.reshape(len(queries), -1, 8) @ SIGNS.T  # [Q, E / 8, 256]
            columns = np.ascontiguousarray(codes.T)  # [E / 8, block]
            return np.stack([sum(row.take(column) for row, column in zip(table, columns)) for table in tables])
        scores = queries @ codes.astype(np.float32, copy=False).T
        return scores * self.arrays["scale"][rows] if self.precision == "int8" else scores

    def close(self) -> None:
        self.arrays = {}
