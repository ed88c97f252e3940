"""One joint step (contrast, matching, captions) of the bridge at BLIP-2's size, against the straightforward form.

    python tests/benchmarks/bridge.py [--dtype float32|bfloat16] [--device cpu|cuda] [--runs 3]

12 layers, width 768, 32 queries, image features 257 x 1408, texts of 32 tokens, batch 16; forward and backward. The straightforward
form runs transformers' `Blip2QFormerModel` three times (queries and texts apart, matching pairs together, queries before a causal text)
and projects an image's keys and values anew in every pass and for every pair. Both have the same weights, the same negatives and no
dropout. Times are medians of alternating steps in one process; peaks are those of a process of its own each, on the CPU the growth of
its largest resident size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from unimodal.bridge import QFormer
from unimodal.layers import HIDDEN, KeyValues
from unimodal.losses import caption_loss, matching_loss

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
WIDTH, LAYERS, HEADS, QUERIES, VOCABULARY, LENGTH = 768, 12, 12, 32, 30523, 32
TOKENS, MEMORY_WIDTH = 257, 1408

Losses = tuple[Tensor, Tensor, Tensor]


def contrast(queries: Tensor, texts: Tensor) -> Tensor:
    """Queries [B, N, W] and texts [B, W]: cross-entropy both ways over the best query's cosine / 0.07."""
    scores = torch.einsum("bnw,cw->bcn", F.normalize(queries, dim=-1), F.normalize(texts, dim=-1)).amax(-1) / 0.07
    rows = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)) / 2


def bridge() -> QFormer:
    torch.manual_seed(0)
    return QFormer(
        width=WIDTH, layers=LAYERS, heads=HEADS, intermediate=4 * WIDTH, memory_width=MEMORY_WIDTH,
        cross_attention_every=2, dropout=0.0, queries={"image": QUERIES}, vocab_size=VOCABULARY,
    )  # fmt: skip


def ours(model: QFormer) -> Callable[[dict[str, Tensor]], Losses]:
    def losses(batch: dict[str, Tensor]) -> Losses:
        ids, mask, wrong = batch["ids"], batch["mask"], batch["wrong"]
        rows = torch.arange(len(ids), device=ids.device)
        memory, cache = model.project_memory(batch["image"]), KeyValues()
        queries = model.read("image", memory, cache=cache)
        texts = model.text(ids, mask)[:, 0]
        image_index, text_index = torch.cat([rows, rows, wrong]), torch.cat([rows, wrong, rows])
        joint = model.match("image", ids[text_index], mask[text_index], memory.shared(image_index))
        logits = joint.mean(1) @ batch["head"]
        words = model.lm_logits(model.caption("image", ids, cache=cache, text_mask=mask))
        return contrast(queries, texts), matching_loss(logits, batch["labels"]), caption_loss(words, ids, mask)

    return losses


def theirs(model: QFormer) -> tuple[torch.nn.Module, Callable[[dict[str, Tensor]], Losses]]:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH, "encoder_hidden_size": MEMORY_WIDTH, "cross_attention_frequency": 2,
        "use_qformer_text_input": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = Blip2QFormerConfig(**settings)
    weights = model.to_blip2()
    network = torch.nn.Module()
    network.qformer, network.embeddings = Blip2QFormerModel(config), Blip2TextEmbeddings(config)
    network.query_tokens = torch.nn.Parameter(torch.empty(1, QUERIES, WIDTH))
    network.load_state_dict(weights, strict=False)
    qformer, embed, queries = network.qformer, network.embeddings, network.query_tokens

    def passes(ids: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Queries and text together: ids [P, L], image [P, T, D], mask [P, N + L] or [P, 1, N + L, N + L] -> [P, N + L, W]."""
        embedded = embed(input_ids=ids, query_embeds=queries.expand(len(ids), -1, -1))
        return qformer(
            query_embeds=embedded, query_length=QUERIES, attention_mask=mask, encoder_hidden_states=image
        ).last_hidden_state

    def losses(batch: dict[str, Tensor]) -> Losses:
        ids, mask, wrong, image = batch["ids"], batch["mask"], batch["wrong"], batch["image"]
        read = qformer(query_embeds=queries.expand(len(ids), -1, -1), encoder_hidden_states=image).last_hidden_state
        texts = qformer(query_embeds=embed(input_ids=ids), query_length=0, attention_mask=mask).last_hidden_state[:, 0]
        pair_ids, pair_mask = torch.cat([ids, ids[wrong], ids]), torch.cat([mask, mask[wrong], mask])
        seen = torch.cat([mask.new_ones(len(pair_ids), QUERIES), pair_mask], 1)
        joint = passes(pair_ids, torch.cat([image, image, image[wrong]]), seen)[:, :QUERIES]
        logits = joint.mean(1) @ batch["head"]
        total = QUERIES + LENGTH
        hidden = torch.zeros(total, total, device=ids.device, dtype=image.dtype)
        hidden[:QUERIES, QUERIES:] = HIDDEN
        hidden[QUERIES:, QUERIES:].fill_(HIDDEN).triu_(1)
        captioned = passes(ids, image, hidden.expand(len(ids), 1, -1, -1))[:, QUERIES:]
        return (
            contrast(read, texts),
            matching_loss(logits, batch["labels"]),
            caption_loss(model.lm_logits(captioned), ids, mask),
        )

    return network, losses


def batch_of(count: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTH // 4, LENGTH + 1, (count, 1), generator=generator)
    batch = {
        "image": torch.randn(count, TOKENS, MEMORY_WIDTH, generator=generator),
        "ids": torch.randint(1000, VOCABULARY, (count, LENGTH), generator=generator),
        "mask": torch.arange(LENGTH) < lengths,
        "wrong": torch.arange(count).roll(1),
        "labels": torch.arange(3 * count) < count,
        "head": torch.randn(WIDTH, generator=generator) / WIDTH**0.5,
    }
    return {name: part.to(device) for name, part in batch.items()}


def step(losses: Callable[[dict[str, Tensor]], Losses], batch: dict[str, Tensor], dtype: torch.dtype) -> list[float]:
    """Forward and backward; the three losses."""
    with torch.autocast(batch["ids"].device.type, dtype, enabled=dtype != torch.float32):
        parts = losses(batch)
    sum(parts).backward()  # type: ignore[union-attr]
    return [part.item() for part in parts]


def status_mib(line: str) -> float:
    """A line of this process's status, such as its resident size now (VmRSS) or at its largest (VmHWM)."""
    found = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(line))
    return int(found.split()[1]) / 1024


def peak_of(case: str, options: argparse.Namespace) -> float:
    """What one step adds to the memory at its peak, MiB. A step of two pairs comes first: gradients, threads, kernels."""
    model = bridge().to(options.device)
    network, losses = torch.nn.Module(), ours(model)
    if case == "theirs":
        network, losses = theirs(model)
    network.to(options.device)
    dtype = getattr(torch, options.dtype)
    step(losses, batch_of(2, options.device), dtype)
    batch = batch_of(options.batch, options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(losses, batch, dtype)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts anew
    before = status_mib("VmRSS")
    step(losses, batch, dtype)
    return status_mib("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=["ours", "theirs"], help="measure the peak of one form, in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(peak_of(options.case, options))
        return
    dtype = getattr(torch, options.dtype)
    model = bridge().to(options.device)
    network, straightforward = theirs(model)
    network.to(options.device)
    forms = {"ours": ours(model), "theirs": straightforward}
    batch = batch_of(options.batch, options.device)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    losses = {}
    for run in range(options.runs + 1):  # the first is not counted
        for form, work in forms.items():
            start = time.perf_counter()
            losses[form] = step(work, batch, dtype)
            if options.device == "cuda":
                torch.cuda.synchronize()
            if run:
                seconds[form].append(time.perf_counter() - start)
    times = {form: statistics.median(taken) for form, taken in seconds.items()}
    again = [sys.executable, *sys.argv, "--case"]
    peaks = {form: float(subprocess.check_output([*again, form], env={**os.environ, **ALLOCATOR})) for form in forms}
    result = {
        **{f"{form} s": round(value, 3) for form, value in times.items()},
        "faster": round(times["theirs"] / times["ours"], 2),
        **{f"{form} MiB": round(value) for form, value in peaks.items()},
        "memory ratio": round(peaks["ours"] / peaks["theirs"], 2),
        "largest difference of a loss": max(abs(a - b) for a, b in zip(losses["ours"], losses["theirs"], strict=True)),
    }
    print(
        json.dumps({"dtype": options.dtype, "device": options.device, "threads": options.threads, **result}, indent=1)
    )


if __name__ == "__main__":
    main()
