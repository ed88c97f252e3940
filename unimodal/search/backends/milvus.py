"""Milvus: one client from a file in the index's folder (milvus-lite) to a server or a cluster.

`float32` and `int8` are graphs over full and over scalar-quantised vectors. `binary` keeps packed sign bits on a server. milvus-lite has no
such column: in a file it keeps the signs as numbers, without the saving, and asks with full queries as the exact backend does;
`milvus-lite server`, which serves a file to others, refuses `binary`. milvus-lite keeps its file for one process at a time.

A server is named by its address, a user by the environment variable MILVUS_TOKEN, which is never written anywhere. The collection is named
by the address of the index, which `index.json` keeps.

Legend: n vectors, Q queries, E width, k candidates.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from unimodal.files import flush, locked
from unimodal.search.filters import Selection, column
from unimodal.search.quantise import quantise

BATCH = 1000  # rows per request


class MilvusIndex:
    """Arguments as in `unimodal.search.backends.open_backend`; methods as in `VectorIndex`.

    Args:
        folder: where the file is kept; on a server its place names the collection.
        width: of the vectors.
        precision: in which they are kept.
        uri: address of a server, with the collection's name after a `#`; None keeps a file.

    Raises:
        InUseError: another process has the file.
    """

    shared = True

    def __init__(self, folder: Path, width: int, precision: str, uri: str | None) -> None:
        try:
            from pymilvus import DataType, MilvusClient, MilvusException
        except ImportError as error:
            raise ImportError("the milvus backend needs pymilvus: pip install 'unimodal[milvus]'") from error
        self.error = MilvusException
        address, _, name = (uri or "").partition("#")
        self.name = name or "vectors"
        self.file = None if address else folder / "milvus.db"
        if self.file is not None:
            folder.mkdir(parents=True, exist_ok=True)
        access = {"token": os.environ.get("MILVUS_TOKEN", "")} if address else {}
        try:
            self.client: Any = MilvusClient(address or str(self.file), **access)
        except Exception:
            if self.file is not None and (self.file / "LOCK").exists():
                with locked(self.file / "LOCK", f"{self.file}, which milvus-lite keeps for one process at a time,"):
                    pass  # nobody else has it
            raise
        self.signs = precision == "binary"
        self.packed = self.signs and bool(address)
        if not self.client.has_collection(self.name):
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
            schema.add_field("key", DataType.INT64, is_primary=True)
            schema.add_field("vector", DataType.BINARY_VECTOR if self.packed else DataType.FLOAT_VECTOR, dim=width)
            kind = {"float32": "HNSW", "int8": "HNSW_SQ", "binary": "BIN_FLAT" if self.packed else "FLAT"}[precision]
            settings: dict[str, Any] = {"M": 32, "efConstruction": 200} if "HNSW" in kind else {}
            settings |= {"sq_type": "SQ8"} if kind == "HNSW_SQ" else {}
            index = self.client.prepare_index_params()
            index.add_index("vector", index_type=kind, metric_type="HAMMING" if self.packed else "IP", params=settings)
            self.client.create_collection(
                self.name, schema=schema, index_params=index, consistency_level="Strong"
            )  # a search sees what was added before it
        self.client.load_collection(self.name)

    def __len__(self) -> int:
        return int(self.client.query(self.name, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def keys(self) -> np.ndarray:
        pages = self.client.query_iterator(self.name, batch_size=BATCH, filter="key >= 0", output_fields=["key"])
        keys: list[int] = []
        while page := pages.next():
            keys += [row["key"] for row in page]
        pages.close()
        return np.array(keys, np.int64)

    def _codes(self, vectors: np.ndarray) -> list[Any]:
        if self.packed:
            return [row.tobytes() for row in quantise(vectors, "ubinary")]
        kept = np.where(vectors > 0, 1, -1) / vectors.shape[1] ** 0.5 if self.signs else vectors
        return kept.astype(np.float32).tolist()

    def add(self, keys: np.ndarray, vectors: np.ndarray, payload: list[dict[str, Any]]) -> None:
        rows = [
            {"key": key, "vector": code, **{column(name): value for name, value in one.items()}}
            for key, code, one in zip(keys.tolist(), self._codes(vectors), payload)
        ]
        for start in range(0, len(rows), BATCH):
            self.client.upsert(self.name, rows[start : start + BATCH])
        self._flush()

    def _flush(self) -> None:
        self.client.flush(self.name)
        if self.file is not None:
            for path in self.file.rglob("*"):
                with suppress(FileNotFoundError):  # milvus-lite tidies its files meanwhile
                    flush(path)

    def delete(self, keys: np.ndarray) -> None:
        for start in range(0, len(keys), BATCH):
            self.client.delete(self.name, ids=keys[start : start + BATCH].tolist())
        if len(keys):
            self._flush()

    def search(self, queries: np.ndarray, k: int, selection: Selection | None = None) -> tuple[np.ndarray, np.ndarray]:
        keys = np.full((len(queries), k), -1)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        try:
            found = self.client.search(
                self.name,
                self._codes(queries) if self.packed else queries.astype(np.float32).tolist(),
                limit=k,
                filter="" if selection is None else selection.filter.milvus(),
                search_params={"params": {"ef": max(64, 2 * k)}},
                output_fields=[],
            )
        except self.error as error:
            if selection is None:
                raise
            raise ValueError(f"Milvus cannot evaluate this filter ({str(error)[:200]}); make it simpler") from error
        for i, hits in enumerate(found):
            keys[i, : len(hits)] = [hit["key"] if "key" in hit else hit["id"] for hit in hits]
            scores[i, : len(hits)] = [-hit["distance"] if self.packed else hit["distance"] for hit in hits]
        return keys, scores

    def close(self) -> None:
        self.client.close()


def release_file(folder: Path) -> None:
    """Let go of the file of milvus-lite in a folder, which it otherwise keeps open until the process ends."""
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(str(folder / "milvus.db"))
