"""Recall and memory of the first pass on 100,000 vectors of width 256, against exact search in float32, on the same queries.

    python tests/benchmarks/index.py [--count 100000] [--width 256] [--seeds 3] [--backends exact faiss]

Vectors are clustered (2000 centres, spread 0.6 of their distance), queries are drawn from the same clusters. Candidates are scored again
by the float32 vectors, which lie memory-mapped on the disk. Memory is what a query looks through: the codes, and 8 bytes of key, per
vector. Pages of the candidates' own vectors come on top: the kernel maps them generously (the resident set may grow by the whole file)
and drops them when memory is wanted. `anonymous` is the growth of what it cannot drop, in a process that opens the index and searches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from unimodal.search.backends import open_backend
from unimodal.search.first import FirstStage

QUERIES, K, CENTRES, SPREAD = 500, 10, 2000, 0.6


def clustered(count: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [count, width] and queries [QUERIES, width]."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(CENTRES, width)).astype(np.float32)
    x = centres[random.integers(0, CENTRES, count + QUERIES)]
    x += SPREAD * random.normal(size=x.shape).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:count], x[count:]


def open_stage(folder: Path, backend: str, precision: str, width: int, full: int) -> FirstStage:
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    opened = open_backend(backend, folder / f"{backend}-{precision}-{width}", width, precision)
    return FirstStage(
        opened, lambda rows: torch.from_numpy(np.asarray(vectors[rows])), precision=precision, width=width
    )


def resident() -> int:
    """Bytes of this process that the kernel cannot drop."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def child(folder: Path, backend: str, precision: str, width: int, full: int) -> None:
    """Growth of the anonymous memory, in a process of its own."""
    queries = torch.from_numpy(np.load(folder / "queries.npy"))
    if backend == "faiss":
        __import__("faiss")
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    before = resident()
    stage = open_stage(folder, backend, precision, width, full)
    for query in queries[:20]:
        stage.candidates(query[None], K)
    print(resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser()
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
        vectors, queries = clustered(options.count, options.width, seed)
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
                    grown = int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)
                    files = sum(path.stat().st_size for path in (folder / f"{backend}-{precision}-{width}").iterdir())
                    result = {
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
