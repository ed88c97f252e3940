"""Weights out of a trainer's checkpoint: one file, or a folder in which every process of a sharded run wrote its part.

What is read: the file, and each part, by torch's restricted loader (`weights_only`), which makes tensors and plain
containers and nothing else; and the folder's index, `.metadata`, a pickle of torch's own making, only after its
instructions were looked through and found to name nothing but descriptions of tensors.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from unimodal.hub.weights import CheckpointError

INDEX, META = ".metadata", "meta.pt"
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
    path = find_training_checkpoint(path)
    if path.is_dir():
        state = _read_parts(path)
    else:
        content = read_training_checkpoint(path, mapped=True)
        state = {f"state_dict.{name}": tensor for name, tensor in content.get("state_dict", {}).items()}
    weights = {name.removeprefix(WEIGHTS): tensor for name, tensor in state.items() if name.startswith(WEIGHTS)}
    if not weights:
        raise CheckpointError(
            f"{path} holds no weights of a model in training; give a checkpoint that `unimodal fit` left"
        )
    return weights


def is_address(path: str | Path) -> bool:
    """Whether what was given as a path names a place by a scheme, as http:// and s3:// do."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(path)) is not None and not Path(path).exists()


def find_training_checkpoint(path: str | Path) -> Path:
    """The file or folder of a training checkpoint on this machine.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: `path` is an address of another machine.
    """
    if is_address(path):
        raise CheckpointError(
            f"{path} is an address, expected the path of a training checkpoint on this machine; such files can hold code, so none is "
            "fetched from elsewhere. Weights from the Hub go into model.init_args.init_from"
        )
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give the file or folder that a run left, such as resume.ckpt"
        )
    return Path(path)


def check_training_checkpoint(path: str | Path) -> None:
    """Look whether a training checkpoint is whole, without loading its tensors.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is cut short, it would run code, or it is something else.
    """
    path = find_training_checkpoint(path)
    if path.is_dir():
        _read_index(path)
        _read(path / META)
    else:
        read_training_checkpoint(path, mapped=True)


def read_training_checkpoint(path: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """The content of a training checkpoint that is one file, on the CPU; `mapped` leaves its tensors on the disk until they are used.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is cut short, it would run code, or it is something else.
    """
    path = find_training_checkpoint(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, expected the file of a training checkpoint, such as resume.ckpt; a folder with config.json is a finished "
            "model, which model.init_args.init_from takes, and a folder with .metadata was left by the strategy unimodal.tasks.FSDP2"
        )
    content = _read(path, mapped)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} holds no weights of a model in training; give a checkpoint that `unimodal fit` left"
        )
    return content


def _read(path: Path, mapped: bool = False) -> Any:
    """What a file of torch's holds, by the restricted loader."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; give a checkpoint that is whole")
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is cut short or no training checkpoint; give the file that a run left"
            )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # torch raises what its restricted loader happens to meet
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {wanted[1]}" if wanted else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is no checkpoint that can be read without running code: {what}; do not use this file"
        ) from error


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


def _read_index(folder: Path) -> FileSystemReader:
    """A reader of the parts of a sharded checkpoint, which are all there."""
    refuse_code(folder)
    reader = FileSystemReader(folder)
    for part in reader.read_metadata().storage_data.values():
        file = folder / part.relative_path
        if file.name != part.relative_path:
            raise CheckpointError(
                f"{folder / INDEX} points out of its folder, to {part.relative_path}; do not use this checkpoint"
            )
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            raise CheckpointError(f"{folder}: {file.name} is missing or cut short; give a checkpoint that is whole")
    return reader


def _read_parts(folder: Path) -> dict[str, Tensor]:
    reader = _read_index(folder)
    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(WEIGHTS) and isinstance(tensor, TensorStorageMetadata)
    }
    if state:
        load(state, storage_reader=reader, no_dist=True)
    return state
