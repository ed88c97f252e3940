"""Weights as safetensors, read strictly: every tensor is accounted for before the first one is copied.

Names are those of the model's `state_dict`. Large models are split into shards with an index
(https://huggingface.co/docs/safetensors). No pickle is read, whatever its name.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimodal.hub.precision import SCALE, restore

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What the trainers of transformers and sentence-transformers leave beside the weights; nothing here opens them.
TRAINER_STATES = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")


class CheckpointError(ValueError):
    """A folder that is not a checkpoint we can read; the message says what was found, expected, and what to do."""


class CheckpointMismatch(CheckpointError):
    """Weights that do not fit the model: `missing`, `unexpected` and `mismatched` name every tensor."""

    def __init__(self, folder: Path, missing: list[str], unexpected: list[str], mismatched: list[str]) -> None:
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched
        parts = [
            f"  {len(lines)} {title}:\n    " + "\n    ".join(lines)
            for title, lines in (
                ("missing (the model has them, the files do not)", missing),
                ("unexpected (the files have them, the model does not)", unexpected),
                ("mismatched", mismatched),
            )
            if lines
        ]
        super().__init__(
            f"the weights in {folder} are not those of the model in its config.json\n" + "\n".join(parts) + "\n"
            "Nothing was loaded. Take weights and config.json from the same checkpoint"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if it holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); get the checkpoint again") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(values).__name__}, expected an object; get the checkpoint again"
        )
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: for a pickle, a missing shard, or an index that names anything but shards of this folder.
    """
    pickles = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in PICKLES and not any(path.match(state) for state in TRAINER_STATES)
    )
    if pickles:
        raise CheckpointError(
            f"{folder} holds {', '.join(pickles)}: pickles, which can run code when loaded, so a checkpoint has "
            "none. Expected model.safetensors; convert the weights with safetensors where you trust their source, or "
            "delete the file if it is not part of the checkpoint"
        )
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{folder / INDEX} has no weight_map of tensors to files; get the checkpoint again")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if not re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name):
                raise CheckpointError(
                    f"{folder / INDEX} points to {name!r}, expected names like model-00001-of-00002.safetensors "
                    "in the same folder; do not use this checkpoint unless you know who wrote it"
                )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}; the checkpoint is incomplete, get it again")
    return [folder / name for name in names]


def open_weights(path: Path) -> Any:
    """An open safetensors file.

    Raises:
        CheckpointError: if it is cut short or not safetensors at all.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is corrupt or cut short: {error}; expected safetensors, get the file again"
        ) from error


def load_weights(
    expected: dict[str, Tensor],
    folder: Path,
    *,
    ignored: Sequence[str] = (),
    renamed: Callable[[str], str] = lambda name: name,
) -> list[str]:
    """Copy a checkpoint's weights into a model's tensors, all or none.

    Args:
        expected: the tensors to fill, by name.
        folder: the checkpoint.
        ignored: prefixes of tensors in the files that are not wanted.
        renamed: the model's name of what the files name otherwise.

    Returns:
        The names of the ignored tensors.

    Raises:
        CheckpointMismatch: unless names and shapes agree on both sides.
    """
    files = [open_weights(path) for path in weight_files(folder)]
    holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    scales = {name for name in holder if name.endswith(SCALE) and name.removesuffix(SCALE) in holder}
    shapes = {renamed(name): file.get_slice(name) for name, file in holder.items() if name not in scales}
    small = {renamed(name.removesuffix(SCALE)) for name in scales}
    skipped = [name for name in shapes if name.startswith(tuple(ignored))]
    shapes = {name: part for name, part in shapes.items() if name not in skipped}

    stored = {tensor.data_ptr() for name, tensor in expected.items() if name in shapes and tensor.numel()}
    missing = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name not in shapes and tensor.data_ptr() not in stored  # weights that two layers share are stored once
    ]
    unexpected = [f"{name} {part.get_shape()}" for name, part in shapes.items() if name not in expected]
    mismatched = []
    for name, tensor in expected.items():
        if name in shapes:
            shape, dtype = shapes[name].get_shape(), shapes[name].get_dtype()
            # Any float precision may be stored, and int8 with scales; integers stay integers.
            real = dtype.startswith(("F", "BF")) or (dtype == "I8" and name in small)
            if shape != list(tensor.shape) or real != tensor.is_floating_point():
                kinds = (dtype, str(tensor.dtype).removeprefix("torch."))
                mismatched.append(f"{name}: file {shape} {kinds[0]}, model {list(tensor.shape)} {kinds[1]}")
    if missing or unexpected or mismatched:
        raise CheckpointMismatch(folder, sorted(missing), sorted(unexpected), sorted(mismatched))
    with torch.no_grad():
        for name, file in holder.items():
            if renamed(name) in expected:
                scale = holder[name + SCALE].get_tensor(name + SCALE) if name + SCALE in scales else None
                expected[renamed(name)].copy_(restore(file.get_tensor(name), scale))
    return skipped
