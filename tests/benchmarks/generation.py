"""Pictures from a U-Net head, guided, against diffusers' own pipeline around the same network.

    python tests/benchmarks/generation.py [--checkpoint checkpoints/demo/model] [--steps 20] [--runs 9]

Without a checkpoint the network has the quick start's size and random weights. Both start at the same noise and must draw the same picture.
Times are medians of alternating runs in one process, on as many threads as torch takes.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import unimodal
from unimodal.heads.generation import GenerationHead

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pipeline import pipeline_of, pipeline_pictures  # noqa: E402  (tests are no package)

GUIDANCE = 2.0


def compare(head: GenerationHead, count: int, steps: int, runs: int) -> None:
    """Draw `count` pictures both ways, by turns, and print how long each takes."""
    pipeline = pipeline_of(head)
    condition = torch.randn(count, 12, head.condition_width)
    noise = torch.stack(
        [torch.randn(head.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    )

    def ours() -> torch.Tensor:
        sources = [torch.Generator().manual_seed(i) for i in range(count)]
        return head.sample(condition, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=sources)

    def theirs() -> torch.Tensor:
        return pipeline_pictures(pipeline, head, condition, noise, steps, GUIDANCE)

    difference = float((ours() - theirs()).abs().max())
    assert difference < 1e-4, f"the pictures differ by {difference}"
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(runs):
        for name, draw in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            draw()
            seconds[name].append(time.perf_counter() - started)
    mine, peer = (statistics.median(times) for times in seconds.values())
    print(
        f"{count} pictures, {steps} steps: {1000 * mine:.0f} ms against {1000 * peer:.0f} ms, {peer / mine:.2f} times as fast"
    )
    print(f"    largest difference of a pixel {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.checkpoint:
        head = unimodal.from_pretrained(options.checkpoint).model.head("generation")
    else:
        kwargs = {"block_out_channels": [64, 128], "num_attention_heads": 4}
        head = GenerationHead(condition_width=128, size=32, transformer="unet", transformer_kwargs=kwargs)
        torch.nn.init.normal_(head.transformer.proj_out.weight, std=0.02)  # zeros would draw nothing
    head.eval()
    for count in (1, 4, 16):
        compare(head, count, options.steps, options.runs)


if __name__ == "__main__":
    main()
