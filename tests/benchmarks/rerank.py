"""Reranking 100 candidates of one query: from cached tokens, against transformers' BLIP-2 scoring the same 100 pairs.

    python tests/benchmarks/rerank.py [--model FOLDER] [--runs 5]

Both have random weights, a ViT of the same width, depth, patch and picture size, and a Q-Former of the same width, depth and queries.
Theirs reads the 100 pictures and the text together in each call, as its interface must; ours has read the pictures when the index was
built, and scores by each of its two matching heads: `cached` (a small transformer on bridged tokens) and `bridge` (BLIP-2's own, through
the whole bridge, on cached image tokens). With --model, a checkpoint of one's own is timed too. Ratios hold within one run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval

import unimodal
from unimodal.config import ModelConfig, from_dict
from unimodal.data import Processor, scenes_tokenizer
from unimodal.inference import Unimodal
from unimodal.model import UnimodalModel

CANDIDATES, LENGTH, QUERIES = 100, 16, 32
TEXT = "a big cyan solid square is over a little blue solid triangle"


def theirs(width: int, depth: int, heads: int, size: int, vocabulary: int) -> Callable[[], object]:
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    config = Blip2Config(
        vision_config={**tower, "image_size": size, "patch_size": 16},
        qformer_config={**tower, "encoder_hidden_size": width, "vocab_size": vocabulary, "cross_attention_frequency": 2,
                        "use_qformer_text_input": True},
        num_query_tokens=QUERIES, image_text_hidden_size=width,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config).eval()
    pixels = torch.randn(CANDIDATES, 3, size, size)
    ids = torch.randint(1, vocabulary, (1, LENGTH)).expand(CANDIDATES, LENGTH)

    @torch.inference_mode()
    def score() -> object:
        out = [
            model(p, i, attention_mask=torch.ones_like(i), use_image_text_matching_head=True).logits_per_image
            for p, i in zip(pixels.split(25), ids.split(25))  # 100 at once need more memory and are no faster
        ]
        return torch.cat(out)

    return score


def ours(kind: str, width: int, depth: int, heads: int, size: int) -> Unimodal:
    tokenizer = scenes_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": heads}
    text |= {"intermediate_size": 4 * width, "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
    kwargs = {"embed_dim": width, "depth": depth, "num_heads": heads}
    parts = {
        "backbone": {
            "width": width,
            "vision": {"name": "vit_small_patch16_224", "kwargs": kwargs, "image_size": size},
            "text": {"name": "bert", "kwargs": text, "max_length": 64},
        },
        "bridge": {
            "width": width, "layers": depth, "heads": heads, "intermediate": 4 * width, "cross_attention_every": 2,
            "queries": {"image": QUERIES, "text": QUERIES, "generate": QUERIES}, "text_branch": True,
        },
        "embedding": {"dim": 256},
        "matching": {"kind": kind, "hidden": width, "layers": 2, "heads": heads},
    }  # fmt: skip
    config = from_dict(ModelConfig, parts)
    vision = config.backbone.vision
    return Unimodal(
        UnimodalModel(config),
        Processor(tokenizer, image_size=size, mean=vision.mean, std=vision.std, max_length=64),
    )


def searching(model: Unimodal, size: int) -> Callable[[], object]:
    """A whole search of one text among 100 pictures: reading the text, first stage, reranking all of them."""
    random = np.random.default_rng(0)
    index = model.build_index([random.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(CANDIDATES)])
    return lambda: index.search(TEXT, top_k=10, rerank_top_k=CANDIDATES)


def clock(work: Callable[[], object], runs: int) -> float:
    """Median milliseconds after one call that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a checkpoint to time as well, for example the quickstart's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (options.width, options.depth, options.heads, options.size)
    result = {"width": options.width, "depth": options.depth, "size": options.size, "threads": options.threads}
    if options.model:
        model = unimodal.from_pretrained(options.model)
        size = model.model.config.backbone.vision.image_size
        result["checkpoint_ms"] = clock(searching(model, size), 5 * options.runs)
    for kind in ("cached", "bridge"):
        result[f"{kind}_ms"] = clock(searching(ours(kind, *shape), options.size), options.runs)
    result["blip2_ms"] = clock(theirs(*shape, len(scenes_tokenizer())), max(1, options.runs // 2))
    for kind in ("cached", "bridge"):
        result[f"blip2_over_{kind}"] = result["blip2_ms"] / result[f"{kind}_ms"]
    print(json.dumps({name: round(value, 2) for name, value in result.items()}, indent=1))


if __name__ == "__main__":
    main()
