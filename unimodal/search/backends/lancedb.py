"""LanceDB: a table on the disk with vectors and metadata as columns, filtered by SQL.

`float32` searches every vector of the table, `int8` a graph over scalar-quantised vectors (the full ones stay in the table, on the disk),
`binary` a column of packed sign bits by Hamming distance.

Legend: n vectors, Q queries, E width, k candidates.
"""

from pathlib import Path
from typing import Any

import numpy as np

from unimodal.files import flush
from unimodal.search.filters import Selection, column
from unimodal.search.quantise import quantise


class LanceIndex:
    """Arguments as in `unimodal.search.backends.open_backend`; methods as in `VectorIndex`."""

    shared = False

    def __init__(self, folder: Path, width: int, precision: str) -> None:
        try:
            import lancedb
            import pyarrow
        except ImportError as error:
            raise ImportError("the lancedb backend needs lancedb: pip install 'unimodal[lancedb]'") from error
        self.arrow, self.precision = pyarrow, precision
        self.metric = "hamming" if precision == "binary" else "dot"
        self.type = pyarrow.list_(
            pyarrow.uint8() if precision == "binary" else pyarrow.float32(),
            width // 8 if precision == "binary" else width,
        )
        self.folder, self._connect = folder, lancedb.connect
        there = (folder / "vectors.lance").exists()
        self.table: Any = lancedb.connect(str(folder)).open_table("vectors") if there else None

    def __len__(self) -> int:
        return 0 if self.table is None else self.table.count_rows()

    def keys(self) -> np.ndarray:
        if self.table is None:
            return np.empty(0, np.int64)
        found = self.table.search().select(["key"]).limit(max(1, len(self))).to_arrow()
        return found["key"].to_numpy().astype(np.int64)

    def _codes(self, vectors: np.ndarray) -> np.ndarray:
        return quantise(vectors, "ubinary") if self.precision == "binary" else vectors.astype(np.float32, copy=False)

    def add(self, keys: np.ndarray, vectors: np.ndarray, payload: list[dict[str, Any]]) -> None:
        if self.table is None:
            schema = self.arrow.schema({"key": self.arrow.int64(), "vector": self.type})
            self.table = self._connect(str(self.folder)).create_table("vectors", schema=schema)
        codes = self._codes(vectors)
        columns: dict[str, Any] = {
            "key": self.arrow.array(keys, self.arrow.int64()),
            "vector": self.arrow.FixedSizeListArray.from_arrays(self.arrow.array(codes.ravel()), type=self.type),
        }
        for field in dict.fromkeys(name for one in payload for name in one):
            values = [one.get(field) for one in payload]
            first = next((value for value in values if value is not None), "")
            kind = {str: "string", bool: "boolean"}.get(type(first), "double")
            if column(field) not in self.table.schema.names:
                self.table.add_columns({column(field): f"cast(NULL as {kind})"})
            columns[column(field)] = self.arrow.array(
                [float(v) if kind == "double" and v is not None else v for v in values]
            )
        # A column that none of these documents fills is null for them.
        columns |= {f.name: self.arrow.nulls(len(keys), f.type) for f in self.table.schema if f.name not in columns}
        schema = self.table.schema
        self.table.add(self.arrow.table({name: columns[name] for name in schema.names}, schema=schema))
        if self.precision == "int8":
            self._index()
        self._flush()

    def _flush(self) -> None:
        for path in self.folder.rglob("*"):
            flush(path)

    def _index(self) -> None:
        """Let the graph grow by what was added; made with the first vectors."""
        from lancedb.index import HnswSq

        if self.table.list_indices():
            self.table.optimize()
        else:
            self.table.create_index("vector", config=HnswSq(distance_type="dot", num_partitions=1))

    def delete(self, keys: np.ndarray) -> None:
        for start in range(0, len(keys), 1000):
            if self.table is not None:
                self.table.delete(f"key in ({', '.join(map(str, keys[start : start + 1000].tolist()))})")
        self._flush()

    def search(self, queries: np.ndarray, k: int, selection: Selection | None = None) -> tuple[np.ndarray, np.ndarray]:
        keys = np.full((len(queries), k), -1)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if self.table is None:
            return keys, scores
        for i, query in enumerate(self._codes(queries)):
            asked = self.table.search(query, vector_column_name="vector").distance_type(self.metric)
            if self.precision == "int8":
                asked = asked.ef(max(64, 2 * k))
            if selection is not None:
                asked = asked.where(selection.filter.sql(), prefilter=True)
            found = self._answer(asked.limit(k).select(["key", "_distance"]), selection)
            keys[i, : len(found)] = found["key"].to_numpy()
            scores[i, : len(found)] = -found["_distance"].to_numpy()
        return keys, scores

    def _answer(self, asked: Any, selection: Selection | None) -> Any:
        try:
            return asked.to_arrow()
        except (OSError, RuntimeError, ValueError) as error:
            if selection is None:
                raise
            raise ValueError(f"LanceDB cannot evaluate this filter ({str(error)[:200]}); make it simpler") from error

    def close(self) -> None:
        self.table = None
