"""Exact search: every vector is looked at. No library beyond numpy and torch.

    keys.bin    int64, one per vector; -1 where it was deleted
    codes.bin   float32 [n, E], int8 [n, E], or sign bits uint8 [n, E / 8]
    scale.bin   float32 [n], of int8 codes

Sign bits are scored by the query's own values, not by its signs: the product of a query and eight signs is looked up by their byte. That
finds far more of what is near than counting the signs that differ (Gordo et al., TPAMI 2014) and takes no more memory.

The files are memory-mapped and only ever appended to: a query reads them through the page cache, a block at a time, and opening an index
reads none of them. The number of keys says how many vectors there are: keys are written last, and what a kill left beyond them is cut off.

Legend: n vectors, Q queries, E width, k candidates.
"""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unimodal.search.filters import Selection
from unimodal.search.quantise import int8_rows, quantise

BLOCK = 16384  # vectors scored at a time
SIGNS = (
    2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) - 1
)  # [256, 8], of each byte
DTYPES: dict[str, Any] = {"float32": np.float32, "int8": np.int8, "binary": np.uint8}


class ExactIndex:
    """Arguments as in `unimodal.search.backends.open_backend`; methods as in `VectorIndex`."""

    def __init__(self, folder: Path, width: int, precision: str) -> None:
        self.folder, self.precision = folder, precision
        bytes_wide = width // 8 if precision == "binary" else width
        self.files: dict[str, tuple[Any, tuple[int, ...]]] = {"codes": (DTYPES[precision], (bytes_wide,))}
        if precision == "int8":
            self.files["scale"] = (np.float32, ())
        self.files["keys"] = (np.int64, ())  # last: it says that the others are whole
        self._map()

    def _map(self) -> None:
        count = self._size("keys") // 8
        self.arrays: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in self.files.items():
            path = self.folder / f"{name}.bin"
            whole = count * int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
            if path.exists() and self._size(name) > whole:
                os.truncate(path, whole)
            mode: Literal["r", "r+"] = "r+" if name == "keys" else "r"
            empty = np.empty((0, *shape), dtype)
            self.arrays[name] = np.memmap(path, dtype, mode, shape=(count, *shape)) if count else empty
        self.live = int((self.arrays["keys"] >= 0).sum())

    def _size(self, name: str) -> int:
        path = self.folder / f"{name}.bin"
        return path.stat().st_size if path.exists() else 0

    def __len__(self) -> int:
        return self.live

    def keys(self) -> np.ndarray:
        keys = np.asarray(self.arrays["keys"])
        return keys[keys >= 0]

    def add(self, keys: np.ndarray, vectors: np.ndarray, payload: list[dict[str, Any]]) -> None:
        new = {"keys": keys.astype(np.int64)}
        if self.precision == "int8":
            new["codes"], new["scale"] = int8_rows(vectors)
        else:
            new["codes"] = quantise(vectors, "ubinary" if self.precision == "binary" else "float32")
        for name, (dtype, _) in self.files.items():
            with open(self.folder / f"{name}.bin", "ab") as file:
                file.write(np.ascontiguousarray(new[name], dtype).tobytes())
        self._map()

    def delete(self, keys: np.ndarray) -> None:
        here = self.arrays["keys"]
        here[np.isin(here, keys)] = -1
        if isinstance(here, np.memmap):
            here.flush()
        self.live = int((here >= 0).sum())

    def search(self, queries: np.ndarray, k: int, selection: Selection | None = None) -> tuple[np.ndarray, np.ndarray]:
        keys = np.asarray(self.arrays["keys"])
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
