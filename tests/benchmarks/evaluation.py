"""Ranks and top 10 of 5,000 images x 25,000 captions of width 256, both ways, against a dense product and top-k.

    python tests/benchmarks/evaluation.py [threads]

The peer is what a script does without us: `torch.matmul` then `torch.topk`, once per direction, every score in memory at
once, and no ranks. Printed are seconds of processor time, which neighbours on the machine disturb little (best of three,
in turn), their ratio, and how far each raises the peak of resident memory above the embeddings.
"""

import subprocess
import sys
import time

import torch
from torch import Tensor

from unimodal.metrics import first_stage

IMAGES, EACH, WIDTH, K = 5_000, 5, 256, 10


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors whose captions lie near their image, as a trained model's do, and the image of each caption."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(IMAGES, WIDTH, generator=generator)
    text_image = torch.arange(IMAGES).repeat_interleave(EACH)
    text = image[text_image] + 2.5 * torch.randn(len(text_image), WIDTH, generator=generator)
    return (*(torch.nn.functional.normalize(x, dim=-1) for x in (image, text)), text_image)


def dense(image: Tensor, text: Tensor, text_image: Tensor) -> None:
    for query, gallery in ((text, image), (image, text)):
        torch.matmul(query, gallery.T).topk(K, dim=1)


def ours(image: Tensor, text: Tensor, text_image: Tensor) -> None:
    first_stage(image, text, text_image, k=K)


def peak_mb() -> float:
    """Highest resident memory of this process so far. (getrusage would count the parent's, from before the fork.)"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def main() -> None:
    threads = sys.argv[1] if len(sys.argv) > 1 else "1"
    torch.set_num_threads(int(threads))
    data = embeddings()
    ways = {"dense": dense, "ours": ours}
    if len(sys.argv) > 2:  # a process of its own, since a peak never falls
        before = peak_mb()
        ways[sys.argv[2]](*data)
        print(peak_mb() - before)
        return
    first_stage(*(x[:100] for x in data[:1]), *(x[: 100 * EACH] for x in data[1:]))  # the libraries wake up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            start = time.process_time()
            way(*data)
            seconds[name].append(time.process_time() - start)
    for name in ways:
        memory = subprocess.run([sys.executable, __file__, threads, name], capture_output=True, text=True, check=True)
        print(f"{name:<6} {min(seconds[name]):6.2f} s  {float(memory.stdout):7.0f} MB beyond the embeddings")
    print(f"ratio of seconds {min(seconds['ours']) / min(seconds['dense']):.2f} with {threads} threads")


if __name__ == "__main__":
    main()
