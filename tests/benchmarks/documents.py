"""What an index of many documents costs: opening, searching, adding, deleting and saving one of 100,000 texts.

    python tests/benchmarks/documents.py --model checkpoints/demo/model [--count 100000]

Texts are eight words each, drawn from the model's vocabulary. Each number is the least of several tries, in milliseconds: of wall time,
which waits for the disk, and of processor time, one thread.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import unimodal
from unimodal.search import Index


def least(work: Callable[[], object], tries: int) -> dict[str, float]:
    wall, processor = [], []
    for _ in range(tries):
        began, spent = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - spent)
    return {"wall": round(1000 * min(wall), 1), "processor": round(1000 * min(processor), 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = unimodal.from_pretrained(options.model)
    draw = random.Random(0)
    words = sorted(word for word in model.encoder.processor.tokenizer.get_vocab() if word.isalpha())

    def texts(count: int) -> list[str]:
        return [" ".join(draw.choice(words) for _ in range(8)) for _ in range(count)]

    with tempfile.TemporaryDirectory() as name:
        folder, query = Path(name, "index"), texts(1)[0]
        metadata = [{"number": i} for i in range(options.count)]
        model.build_index(texts(options.count), metadata=metadata, folder=folder, batch_size=256)
        index = Index.load(folder, model.encoder)
        half, first = f"number >= {options.count // 2}", iter(range(options.count))

        def search(**settings: object) -> object:
            return index.search(query, top_k=10, **settings)

        def add_and_search() -> None:
            index.add(texts(1))
            search(rerank_top_k=0)

        work: dict[str, Callable[[], object]] = {
            "open": lambda: Index.load(folder, model.encoder),
            "search": lambda: search(rerank_top_k=0),
            "search half of it": lambda: search(rerank_top_k=0, filter=half),
            "add one": lambda: index.add(texts(1)),
            "add 256": lambda: index.add(texts(256), batch_size=256),
            "add one and search": add_and_search,
            "delete one": lambda: index.delete([next(first)]),
            "save": lambda: index.save(Path(name, "copy")),
        }
        for what, do in work.items():
            do()
            print(json.dumps({"what": what, **least(do, 7)}), flush=True)


if __name__ == "__main__":
    main()
