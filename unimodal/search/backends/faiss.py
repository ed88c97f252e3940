"""faiss: a navigable graph in memory (HNSW; Malkov and Yashunin, arXiv:1603.09320), written to one file.

`float32` keeps full vectors in the graph, `int8` eight bits per dimension, `binary` sign bits in a flat index, which at 1/32 of the size is
fast enough without a graph. A graph cannot forget: deleted keys are kept aside and left out of every search; the index is written again
without them once they are half of it.

Legend: n vectors, Q queries, E width, k candidates.
"""

from pathlib import Path
from typing import Any

import numpy as np

from unimodal.files import replacing
from unimodal.search.filters import Selection
from unimodal.search.quantise import quantise

LINKS = 32  # neighbours per vector in the graph
EFFORT = 64  # vectors kept in sight while searching, at least


class FaissIndex:
    """Arguments as in `unimodal.search.backends.open_backend`; methods as in `VectorIndex`."""

    shared = False

    def __init__(self, folder: Path, width: int, precision: str) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("the faiss backend needs faiss-cpu: pip install 'unimodal[faiss]'") from error
        self.faiss, self.width, self.precision = faiss, width, precision
        self.path, self.gone_path = folder / "vectors.faiss", folder / "deleted.npy"
        binary = precision == "binary"
        read: Any = faiss.read_index_binary if binary else faiss.read_index
        self._write: Any = faiss.write_index_binary if binary else faiss.write_index
        self.index: Any = read(str(self.path)) if self.path.exists() else self._empty()
        if self.index.d != width:
            raise ValueError(f"{self.path} holds vectors of the width {self.index.d}, expected {width}")
        self.gone = np.load(self.gone_path, allow_pickle=False) if self.gone_path.exists() else np.empty(0, np.int64)
        self.gone = self.gone[np.isin(self.gone, self._all())]

    def _empty(self) -> Any:
        faiss = self.faiss
        if self.precision == "binary":
            return faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(self.width))
        if self.precision == "float32":
            return faiss.IndexIDMap2(faiss.IndexHNSWFlat(self.width, LINKS, faiss.METRIC_INNER_PRODUCT))
        # Codes are values rounded to whole numbers, so nothing is trained and a code depends on its vector alone.
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
        return faiss.IndexIDMap2(faiss.IndexHNSWSQ(self.width, kind, LINKS, faiss.METRIC_INNER_PRODUCT))

    def _codes(self, vectors: np.ndarray) -> np.ndarray:
        if self.precision == "binary":
            return quantise(vectors, "ubinary")
        if self.precision == "float32":
            return np.ascontiguousarray(vectors, np.float32)
        # The values of a unit vector spread by 1 / sqrt(E); four times that becomes 127, what is beyond is cut.
        return np.clip(np.rint(vectors * (127 * self.width**0.5 / 4)), -127, 127).astype(np.float32)

    def _all(self) -> np.ndarray:
        return self.faiss.vector_to_array(self.index.id_map).astype(np.int64)

    def __len__(self) -> int:
        return self.index.ntotal - len(self.gone)

    def keys(self) -> np.ndarray:
        return np.setdiff1d(self._all(), self.gone)

    def add(self, keys: np.ndarray, vectors: np.ndarray, payload: list[dict[str, Any]]) -> None:
        if np.isin(keys, self.gone).any():  # else they would stay left out
            self._forget()
        self.index.add_with_ids(self._codes(vectors), keys.astype(np.int64))
        self._save()

    def delete(self, keys: np.ndarray) -> None:
        gone = np.union1d(self.gone, np.intersect1d(keys, self._all()))
        if len(gone) == len(self.gone):
            return
        self.gone = gone
        if 2 * len(self.gone) > self.index.ntotal:
            self._forget()
            self._save()
        with replacing(self.gone_path) as unfinished:
            np.save(unfinished, self.gone)

    def _forget(self) -> None:
        keys = self.keys()
        kept, codes = self._empty(), [self.index.reconstruct(int(key)) for key in keys]
        if codes:
            kept.add_with_ids(np.stack(codes), keys)
        self.index, self.gone = kept, np.empty(0, np.int64)

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as unfinished:
            self._write(self.index, str(unfinished))

    def search(self, queries: np.ndarray, k: int, selection: Selection | None = None) -> tuple[np.ndarray, np.ndarray]:
        faiss = self.faiss
        selector = None
        if selection is not None:
            selector = faiss.IDSelectorBatch(np.setdiff1d(selection.keys, self.gone))
        elif len(self.gone):
            selector = faiss.IDSelectorNot(gone := faiss.IDSelectorBatch(self.gone))
            selector.keep = gone  # faiss holds no reference of its own
        if self.precision == "binary":
            options = faiss.SearchParameters(sel=selector)
        else:
            options = faiss.SearchParametersHNSW(sel=selector, efSearch=max(EFFORT, 2 * k))
        scores, keys = self.index.search(self._codes(queries), k, params=options)
        scores = -scores.astype(np.float32) if self.precision == "binary" else scores
        return keys, np.where(keys >= 0, scores, -np.inf)

    def close(self) -> None:
        self.index = None
