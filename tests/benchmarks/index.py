"""Recall and memory of the first pass on 100,000 vectors of width 256, against exact search in float32, on the same queries.

    python tests/benchmarks/index.py [--data clustered] [--count 100000] [--width 256] [--seeds 3] [--backends exact faiss]

Vectors are clustered (2000 centres, spread 0.6 of their distance), queries are drawn from the same clusters: easy. Harder are `far`, whose
queries lie 1.5 from a centre; `spread`, where all vectors do; `spectrum`, Gaussian with the standard deviations 1, 1/2, 1/3, ... on random
axes, as trained embeddings have a few wide directions and many narrow ones; and `gaussian`, where no vector is near another.

Candidates are scored again by the float32 vectors, which lie memory-mapped on the disk. Memory is what a query looks through: the backend's
own files, per vector. Pages of the candidates' own vectors come on top: the kernel maps them generously (the resident set may grow by the
whole file) and drops them when memory is wanted. `anonymous` is the growth of what it cannot drop, in a process that opens the index and
searches.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from unimodal.search.backends import open_backend
from unimodal.search.first import FirstStage

QUERIES, K, CENTRES = 500, 10, 2000
DATA = ("clustered", "far", "spread", "spectrum", "gaussian")


def drawn(kind: str, count: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [count, width] and queries [QUERIES, width]."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count + QUERIES, width)).astype(np.float32)
    if kind == "spectrum":
        axes = np.linalg.qr(random.normal(size=(width, width)))[0].astype(np.float32)
        x = x / np.arange(1, width + 1, dtype=np.float32) @ axes
    elif kind != "gaussian":
        spread = np.full((len(x), 1), 1.5 if kind == "spread" else 0.6, np.float32)
        spread[count:] = 0.6 if kind == "clustered" else 1.5
        centres = random.normal(size=(CENTRES, width)).astype(np.float32)
        x = centres[random.integers(0, CENTRES, len(x))] + spread * x
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:count], x[count:]


def open_stage(folder: Path, backend: str, precision: str, width: int, full: int) -> FirstStage:
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    opened = open_backend(backend, folder / f"{backend}-{precision}-{width}", width, precision)
    rows = np.arange(len(vectors))
    return FirstStage(
        opened, lambda rows: torch.from_numpy(np.asarray(vectors[rows])), rows, precision=precision, width=width
    )


def resident() -> int:
    """Bytes of this process that the kernel cannot drop."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def child(folder: Path, backend: str, precision: str, width: int, full: int) -> None:
    """Growth of the anonymous memory, in a process of its own."""
    queries = torch.from_numpy(np.load(folder / "queries.npy"))
    if backend != "exact":
        __import__(backend)
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    before = resident()
    stage = open_stage(folder, backend, precision, width, full)
    for query in queries[:20]:
        stage.candidates(query[None], K)
    print(resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=DATA, default="clustered")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backends", nargs="+", default=["exact", "faiss"])
    parser.add_argument("--child", nargs=5)
    options = parser.parse_args()
    if options.child:
        folder, backend, precision, width, full = options.child
        return child(Path(folder), backend, precision, int(width), int(full))
    results = []
    for seed in range(options.seeds):
        vectors, queries = drawn(options.data, options.count, options.width, seed)
        truth = torch.from_numpy(queries) @ torch.from_numpy(vectors).T
        best = truth.topk(K).indices.numpy()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.save(folder / "vectors.npy", vectors)
            np.save(folder / "queries.npy", queries)
            for backend in options.backends:
                for precision, width in (
                    ("float32", options.width),
                    ("int8", options.width),
                    ("binary", options.width),
                    ("float32", options.width // 4),
                ):
                    stage = open_stage(folder, backend, precision, width, options.width)
                    start = time.perf_counter()
                    stage.backend.add(
                        np.arange(len(vectors)), stage.narrow(torch.from_numpy(vectors)), [{}] * len(vectors)
                    )
                    built = time.perf_counter() - start
                    bare = stage.backend.search(stage.narrow(torch.from_numpy(queries)), K)[0]
                    start = time.perf_counter()
                    found = [stage.candidates(query[None], K)[0] for query in torch.from_numpy(queries)]
                    milliseconds = 1000 * (time.perf_counter() - start) / len(queries)
                    rows = [[row for row, _ in some] for some in found]
                    ask = [
                        sys.executable,
                        __file__,
                        "--child",
                        name,
                        backend,
                        precision,
                        str(width),
                        str(options.width),
                    ]
                    grown = math.nan  # milvus-lite locks its file to this process
                    if backend != "milvus":
                        grown = int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)
                    kept = (folder / f"{backend}-{precision}-{width}").rglob("*")
                    files = sum(path.stat().st_size for path in kept if path.is_file())
                    result = {
                        "data": options.data,
                        "seed": seed,
                        "backend": backend,
                        "precision": precision,
                        "width": width,
                        "recall_at_10": _recall(best, rows),
                        "without_rescoring": _recall(best, bare.tolist()),
                        "bytes_per_vector": files / len(vectors),
                        "share_of_float32": files / (4 * options.width * len(vectors)),
                        "anonymous_share_of_float32": grown / (4 * options.width * len(vectors)),
                        "milliseconds": milliseconds,
                        "build_seconds": built,
                    }
                    results.append(result)
                    print(
                        json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in result.items()}),
                        flush=True,
                    )
                    stage.backend.close()


def _recall(best: np.ndarray, rows: list[list[int]]) -> float:
    return float(np.mean([len(set(a.tolist()) & set(b)) / K for a, b in zip(best, rows)]))


if __name__ == "__main__":
    main()
