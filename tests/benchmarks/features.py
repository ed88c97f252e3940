"""Training from a feature cache beside training through the frozen towers.

    python tests/benchmarks/features.py [--images 128] [--batch 32] [--runs 3] [--threads 2]

A frozen ViT-S/14 (timm's vit_small_patch14_dinov2 at 224 pixels, 257 tokens) and a frozen BERT of 6 x 384, random weights; above them
train both projections, a bridge of 4 x 384 with 16 + 4 queries and the embedding heads: one step is loading a batch, InfoNCE, backward
and AdamW. Pictures are decoded once and kept, so that the live run pays for its towers alone.

Each run times one epoch live, then one from the cache in half precision, then one in int8, in one process; the ratio of a run is between
its own epochs, by the clock and, for a machine that others use, by processor time. The aim is a ratio of at least 5.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unimodal.config import ModelConfig, from_dict
from unimodal.data import Scenes, scenes_tokenizer
from unimodal.data.module import PairData
from unimodal.tasks import ITC, Joint

AIM = 5.0


def model_config() -> ModelConfig:
    text = {
        "vocab_size": len(scenes_tokenizer()),
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    }
    text |= {"intermediate_size": 1536, "max_position_embeddings": 64}
    bridge = {"width": 384, "layers": 4, "heads": 12, "intermediate": 1536, "queries": {"image": 16, "text": 4}}
    parts = {
        "backbone": {
            "width": 384,
            "vision": {"name": "vit_small_patch14_dinov2", "kwargs": {"img_size": 224}, "image_size": 224},
            "text": {"name": "bert", "kwargs": text, "max_length": 64},
        },
        "bridge": {**bridge, "text_branch": False},
        "embedding": {"dim": 256},
    }
    return from_dict(ModelConfig, parts)


def epoch(task: Joint, loader: Any, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Seconds of one epoch, by the clock and of processors."""
    started = time.perf_counter(), time.process_time()
    for batch in loader:
        losses, _ = task.training_forward(batch)
        losses["itc"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    frozen = {"*": 1.0, "backbone.vision.*": 0.0, "backbone.text.*": 0.0}
    task = Joint(model_config(), {"itc": ITC()}, frozen, pretrained=False)
    task.train()
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    pairs = Scenes("train", count=options.images)
    loaders: dict[str, Any] = {}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("live", "half", "int8"):
            settings: dict[str, Any] = {"cached_features": ("image", "text"), "feature_precision": name}
            settings |= {"feature_cache": str(Path(folder))}
            data = PairData(pairs, batch_size=options.batch, **({} if name == "live" else settings))
            data.bind(task.config, task.model.backbone)
            loaders[name] = data.train_dataloader()
            for images in [cache.images for cache in data.caches.values() if cache.images is not None]:
                size = sum(path.stat().st_size for path in images.store.folder.glob("*.bin"))
                result[f"bytes an image, {name}"] = round(size / images.store.done)
        epoch(task, loaders["live"], optimizer)  # decodes the pictures
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _ in range(options.runs):
            for name, loader in loaders.items():
                seconds[name].append(epoch(task, loader, optimizer))
    for name in loaders:
        result[f"images a second, {name}"] = round(
            options.images / statistics.median(clock for clock, _ in seconds[name]), 1
        )
    for which, measure in enumerate(("clock", "processor")):
        for name in ("half", "int8"):
            pairs_of = zip(seconds["live"], seconds[name], strict=True)
            result[f"ratio by {measure}, {name}"] = [round(live[which] / cached[which], 1) for live, cached in pairs_of]
    print(json.dumps({**result, "aim": AIM}))
    return int(statistics.median(result["ratio by processor, half"]) < AIM)


if __name__ == "__main__":
    sys.exit(main())
