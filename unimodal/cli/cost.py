"""What a schedule and the model that it leaves take, for the card: time, memory, size and speed, on the machine of the run."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.hub.precision import Precision, shrink
from unimodal.inference import Unimodal
from unimodal.model import UnimodalModel

PICTURES, TEXTS, CAPTIONS = 64, 256, 32  # read or written for the measurement


def machine(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{threads} processor thread{'s' if threads > 1 else ''}"


def training_cost(history: Mapping[str, Mapping[str, Any]], device: torch.device) -> str:
    """How long the stages took on a device, and the most memory, in a sentence."""
    minutes = {name: row["seconds"] / 60 for name, row in history.items()}
    memory = max(row["peak_memory_mb"] for row in history.values()) / 1024
    each = ", ".join(f"{name} {spent:.0f}" for name, spent in minutes.items())
    return (
        f"Training took {sum(minutes.values()):.0f} minutes on {machine(device)} ({each}; feature caches and scores after each stage "
        f"are in it) and at most {memory:.1f} GiB of memory."
    )


def running_cost(model: UnimodalModel, processor: Processor, pairs: Pairs, precision: Precision, num_beams: int) -> str:
    """How large the weights are and how fast the model reads and writes, as far as it can, in a sentence or two."""
    user = Unimodal(model, processor)
    pictures = [pairs.image(i) for i in range(min(PICTURES, len(pairs)))]
    captions = [text for i in range(len(pictures)) for text in pairs.captions(i)][:TEXTS]
    speeds = []
    if "embedding" in model.jobs:
        speeds.append(f"embeds {_per_second(user.encode, pictures):.0f} pictures")
        if captions and "text" in model.modalities:
            speeds.append(f"{_per_second(user.encode, captions):.0f} texts")
    if "captioning" in model.jobs:
        speed = _per_second(lambda items: user.caption(items, num_beams=num_beams), pictures[:CAPTIONS])
        speeds.append(f"writes {speed:.0f} captions ({f'{num_beams} beams' if num_beams > 1 else 'greedy'})")
    count = sum(p.numel() for p in model.parameters())
    stored = sum(x.numel() * x.element_size() for x in shrink(model.own_state(), precision).values())
    size = f"{count / 1e6:.1f} million parameters are {stored / 1e6:.1f} MB in {precision}."
    if not speeds:
        return size
    *most, last = speeds
    return f"{size} On {machine(user.device)} it {', '.join(most)}{' and ' if most else ''}{last} a second, pictures as they are opened."


def _per_second(work: Callable[[list[Any]], Any], items: list[Any]) -> float:
    work(items[:2])  # what is prepared once is not counted
    start = time.perf_counter()
    work(items)
    return len(items) / (time.perf_counter() - start)
