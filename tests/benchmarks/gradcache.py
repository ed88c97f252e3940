"""Peak memory of one training step: a batch of 4,096 in chunks of 64 beside a plain batch of 64.

    python tests/benchmarks/gradcache.py [--batch 4096] [--chunk 64]

Each case runs in a process of its own on the CPU: a small vision transformer and a small text transformer under the
`Retrieval` task, InfoNCE, one backward. Counted is the growth of the process's largest resident size over that of the
same process with the model and its gradients but no batch, so that it holds activations, inputs, embeddings and the
rows of the similarity matrix. glibc is told to map every block above 64 KiB by itself, so that freed memory leaves the
process and the peak counts what is held, not what fragments. The aim is a ratio of at most 1.3.
Measured: 255.8 MiB for 64 rows at once, 313.6 MiB for 4,096 in chunks of 64, a ratio of 1.23.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

import torch

from unimodal.config import ModelConfig, from_dict
from unimodal.tasks import Retrieval

AIM = 1.3
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
LENGTH, SIDE = 16, 16


def model_config() -> ModelConfig:
    vision = {"img_size": SIDE, "patch_size": 2, "embed_dim": 192, "depth": 4, "num_heads": 3}
    text = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"intermediate_size": 512, "max_position_embeddings": LENGTH}
    bridge = {"width": 128, "layers": 2, "heads": 4, "intermediate": 256, "queries": {"image": 8, "text": 4}}
    parts = {
        "backbone": {
            "width": 128,
            "vision": {"name": "vit_tiny_patch16_224", "kwargs": vision, "image_size": SIDE},
            "text": {"name": "bert", "kwargs": text, "max_length": LENGTH},
        },
        "bridge": {**bridge, "text_branch": False},
        "embedding": {"dim": 128},
    }
    return from_dict(ModelConfig, parts)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(task: Retrieval, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randn(rows, 3, SIDE, SIDE, generator=generator),
        "text": torch.randint(6, 64, (rows, LENGTH), generator=generator),
        "text_mask": torch.ones(rows, LENGTH, dtype=torch.bool),
        "image_id": torch.arange(rows),
    }
    losses, _ = task.training_forward(batch)
    losses["itc"].backward()


def measure(rows: int, chunk: int | None) -> float:
    """Growth of the peak by one step, MiB. A step of four rows comes first: gradients, threads, kernels."""
    torch.set_num_threads(1)
    task = Retrieval(model_config(), pretrained=False, mini_batch_size=chunk)
    task.train()
    step(task, 4)
    before = peak_mib()
    step(task, rows)
    return peak_mib() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--case", choices=["plain", "chunks"], help="measure one case, in this process")
    options = parser.parse_args()
    if options.case:
        print(measure(options.chunk, None) if options.case == "plain" else measure(options.batch, options.chunk))
        return 0
    command = [sys.executable, __file__, "--batch", str(options.batch), "--chunk", str(options.chunk), "--case"]
    environment = {**os.environ, **ALLOCATOR}
    plain, chunks = (float(subprocess.check_output([*command, case], env=environment)) for case in ("plain", "chunks"))
    result = {
        f"batch {options.chunk}, MiB": round(plain, 1),
        f"batch {options.batch} in chunks of {options.chunk}, MiB": round(chunks, 1),
        "ratio": round(chunks / plain, 3),
    }
    print(json.dumps({**result, "aim": AIM}))
    return int(chunks / plain > AIM)


if __name__ == "__main__":
    sys.exit(main())
