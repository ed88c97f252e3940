"""Weights out of a trainer's checkpoint: one file, or a folder in which every process of a sharded run wrote its part.

What is read: the file, and each part, by torch's restricted loader (`weights_only`), which makes tensors and plain
containers and nothing else; and the folder's index, `.metadata`, a pickle of torch's own making, only after its
instructions were looked through and found to name nothing but descriptions of tensors.
"""

import pickletools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from unimodal.hub.weights import CheckpointError

INDEX = ".metadata"
WEIGHTS = "state_dict.model."  # where a task keeps its model, in the flat names of an index
DESCRIBES = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
    *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
)
KNOWN = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in DESCRIBES),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "pathlib.PosixPath",
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
# Instructions that import by other ways, or move what was remembered; torch's pickles have none.
REFUSED = {"GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "PUT", "BINPUT", "LONG_BINPUT"}


def read_training_weights(path: str | Path) -> dict[str, Tensor]:
    """The model's weights, whole and on the CPU, by the model's own names.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is no checkpoint of a task, or one that would run code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give the file or folder that a run left, such as resume.ckpt"
        )
    if path.is_dir():
        state = _read_parts(path)
    else:
        state = {f"state_dict.{name}": tensor for name, tensor in _read_file(path).items()}
    weights = {name.removeprefix(WEIGHTS): tensor for name, tensor in state.items() if name.startswith(WEIGHTS)}
    if not weights:
        raise CheckpointError(
            f"{path} holds no weights of a model in training; give a checkpoint that `unimodal fit` left"
        )
    return weights


def refuse_code(folder: Path) -> None:
    """Look through the index of a sharded checkpoint before anyone loads it.

    Raises:
        CheckpointError: there is none, or it names anything but descriptions of tensors.
    """
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has no {INDEX}, the index of a sharded checkpoint; give the folder that a sharded run left, whole"
        )
    try:
        foreign = set(_imports(index.read_bytes())) - KNOWN
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{index} is cut short or no index at all: {error}; get the checkpoint again") from error
    if foreign:
        raise CheckpointError(
            f"{index} asks for {', '.join(sorted(foreign))} where an index has only descriptions of tensors: loading it could "
            "run code. Do not use this checkpoint"
        )


def _imports(pickle: bytes) -> Iterator[str]:
    """What a pickle would import, read off its instructions; none is carried out."""
    remembered: list[str | None] = []
    below, top = None, None  # the two uppermost values of the stack where they are strings just put there
    for code, argument, _ in pickletools.genops(pickle):
        if code.name in REFUSED:
            yield f"{code.name} {argument}"
        elif code.name == "MEMOIZE":
            remembered.append(top)
        elif code.name == "STACK_GLOBAL":
            yield f"{below}.{top}"
            below, top = None, None
        elif code.name in ("BINGET", "LONG_BINGET"):
            below, top = top, remembered[argument]  # type: ignore[index]
        else:
            below, top = top, argument if isinstance(argument, str) else None


def _read_parts(folder: Path) -> dict[str, Tensor]:
    refuse_code(folder)
    reader = FileSystemReader(folder)
    index = reader.read_metadata()
    outside = {
        part.relative_path
        for part in index.storage_data.values()
        if Path(part.relative_path).name != part.relative_path
    }
    if outside:
        raise CheckpointError(
            f"{folder / INDEX} points out of its folder, to {sorted(outside)}; do not use this checkpoint"
        )
    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in index.state_dict_metadata.items()
        if name.startswith(WEIGHTS) and isinstance(tensor, TensorStorageMetadata)
    }
    if state:
        load(state, storage_reader=reader, no_dist=True)
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what its restricted loader happens to meet
        raise CheckpointError(f"{path} is no checkpoint that can be read without running code: {error}") from error
    return content.get("state_dict", {}) if isinstance(content, dict) else {}
