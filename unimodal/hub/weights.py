"""Weights as safetensors, read strictly: every tensor is accounted for before the first one is copied.

Names are those of the model's `state_dict`. Large models are split into shards with an index
(https://huggingface.co/docs/safetensors). No pickle is read, whatever its name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimodal.files import require_readable
from unimodal.hub.precision import SCALE, restore

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What the trainers of transformers and sentence-transformers leave beside the weights; nothing here opens them.
TRAINER_STATES = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
MARK = "unimodal"  # in the header of a file: the mark of the checkpoint that it was saved with
LARGEST_CONFIG, LARGEST_INDEX = 4 << 20, 64 << 20  # bytes; what is larger lists no parts of a model


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


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """A JSON object from a file of at most so many bytes.

    Raises:
        CheckpointError: if it holds anything else.
        OSError: it cannot be read.
    """
    require_readable(path)
    try:
        if (size := path.stat().st_size) > largest:
            raise ValueError(f"it has {size} bytes, {largest} at most are read")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
        OSError: the index cannot be read.
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
        shards = read_json(folder / INDEX, LARGEST_INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{folder / INDEX} has no weight_map of tensors to files; get the checkpoint again")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if not re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name):
                raise CheckpointError(
                    f"{folder / INDEX} points to {name!r}, expected names like model-00001-of-00002.safetensors "
                    "in the same folder; do not use this checkpoint unless you know who wrote it"
                )
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}; the checkpoint is incomplete, get it again")
    return [folder / name for name in names]


def open_weights(path: Path) -> Any:
    """An open safetensors file.

    Raises:
        CheckpointError: if it is cut short or not safetensors at all.
        OSError: if it cannot be read.
    """
    require_readable(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is corrupt or cut short: {error}; expected safetensors, get the file again"
        ) from error


def require_mark(path: Path, file: Any, mark: str | None) -> None:
    """Refuse an open safetensors file that was saved with another checkpoint; one without a mark may be of any.

    Raises:
        CheckpointError: it was.
    """
    own = (file.metadata() or {}).get(MARK)
    if None not in (own, mark) and own != mark:
        raise CheckpointError(
            f"{path} belongs to another checkpoint (it is marked {own}, the config.json beside it {mark}); take all files from the same "
            "checkpoint"
        )


def require_finite(tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        CheckpointError: names every tensor that has NaN or infinite values.
    """
    if broken := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        raise CheckpointError(
            f"{where}: weights that are not finite (NaN or infinite): {', '.join(broken)}; the model would compute nothing. "
            "Its training diverged, or the file is damaged: take an earlier checkpoint, or get it again"
        )


def _is_finite(tensor: Tensor) -> bool:
    # A sum reads the tensor once and allocates nothing; only where it is not finite, every value is looked at.
    return not tensor.is_floating_point() or bool(tensor.float().sum().isfinite()) or bool(tensor.isfinite().all())


class StoredWeights:
    """The tensors in a checkpoint's files. The headers are read at once, each tensor when it is loaded.

    Args:
        folder: the checkpoint.
        mark: the mark in its config.json; None where it has none.
        ignored: prefixes of tensors in the files that are not wanted.
        renamed: the model's name of what the files name otherwise.

    Attributes:
        shapes: by the model's names the slices of all tensors that are wanted, which know shape and dtype.
        skipped: the names of those that are not.

    Raises:
        CheckpointError, OSError: as `weight_files`, `open_weights` and `require_mark`.
    """

    def __init__(
        self,
        folder: Path,
        mark: str | None = None,
        *,
        ignored: Sequence[str] = (),
        renamed: Callable[[str], str] = lambda name: name,
    ) -> None:
        self.folder, self.renamed = folder, renamed
        files = []
        for path in weight_files(folder):
            files.append(open_weights(path))
            require_mark(path, files[-1], mark)
        self.holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self.scales = {name for name in self.holder if name.endswith(SCALE) and name.removesuffix(SCALE) in self.holder}
        shapes = {renamed(name): file.get_slice(name) for name, file in self.holder.items() if name not in self.scales}
        self.skipped = [name for name in shapes if name.startswith(tuple(ignored))]
        self.shapes = {name: part for name, part in shapes.items() if name not in self.skipped}

    def require_fit(self, expected: dict[str, Tensor]) -> None:
        """Compare names, shapes and kinds with those of a model's tensors, which may be on the `meta` device.

        Raises:
            CheckpointMismatch: unless both sides agree.
        """
        small = {self.renamed(name.removesuffix(SCALE)) for name in self.scales}
        stored = {_place(tensor) for name, tensor in expected.items() if name in self.shapes and tensor.numel()}
        missing = [
            f"{name} {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name not in self.shapes and _place(tensor) not in stored  # weights that two layers share are stored once
        ]
        unexpected = [f"{name} {part.get_shape()}" for name, part in self.shapes.items() if name not in expected]
        mismatched = []
        for name, tensor in expected.items():
            if name in self.shapes:
                shape, dtype = self.shapes[name].get_shape(), self.shapes[name].get_dtype()
                # Any float precision may be stored, and int8 with scales; integers stay integers.
                real = dtype.startswith(("F", "BF")) or (dtype == "I8" and name in small)
                if shape != list(tensor.shape) or real != tensor.is_floating_point():
                    kinds = (dtype, str(tensor.dtype).removeprefix("torch."))
                    mismatched.append(f"{name}: file {shape} {kinds[0]}, model {list(tensor.shape)} {kinds[1]}")
        if missing or unexpected or mismatched:
            raise CheckpointMismatch(self.folder, sorted(missing), sorted(unexpected), sorted(mismatched))

    @torch.no_grad()
    def load(self, expected: dict[str, Tensor]) -> None:
        """Copy the tensors into those of a model.

        Raises:
            CheckpointMismatch: as `require_fit`; nothing was copied.
            CheckpointError: a tensor has NaN or infinite values; the model is of no use then.
        """
        self.require_fit(expected)
        broken: dict[str, Tensor] = {}
        for name, file in self.holder.items():
            if (own := self.renamed(name)) in expected:
                value, scales = file.get_tensor(name), name + SCALE
                scale = self.holder[scales].get_tensor(scales) if scales in self.scales else None
                read = {name: value} if scale is None else {scales: scale}
                broken |= {key: tensor for key, tensor in read.items() if not _is_finite(tensor)}
                expected[own].copy_(restore(value, scale))
        require_finite(broken, self.folder)


def _place(tensor: Tensor) -> int:
    """Which memory a tensor has, also one on the `meta` device, where all addresses are 0."""
    return tensor.untyped_storage()._cdata
