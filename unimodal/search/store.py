"""The folder of an index.

    index.json               what never changes: format, model fingerprint, what is kept in which precision, backend
    documents.sqlite         the documents: ids, names, metadata, which are read (`unimodal.search.catalogue`)
    part-00000.safetensors   embeddings (float32) and tokens of the matching head (int8, one scale per token) of up to 1024 documents
    exact/, faiss/, ...      the backend's own files

A document's row number says where it lies: part `row // size`, place `row % size`. A part appears only when it is whole, and is
memory-mapped: a search touches the pages of the rows that it scores.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors.numpy import save_file

from unimodal.search.backends import Backend

FORMAT = 2
PART = 1024  # documents: what an interruption can cost
DTYPES: dict[str, Any] = {"F32": np.float32, "I8": np.int8, "I32": np.int32, "I64": np.int64}

Manifest = dict[str, Any]
Arrays = dict[str, np.ndarray]


def part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.safetensors"


def write_part(path: Path, arrays: Arrays) -> None:
    """The file appears only when it is whole and on the disk."""
    unfinished = path.with_name(f".{path.name}")
    save_file(arrays, unfinished)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def map_part(path: Path) -> Arrays:
    """The arrays of a part, memory-mapped: nothing but the header is read."""
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    data = raw[start:]
    return {
        name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    unfinished = folder / ".index.json"
    unfinished.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / "index.json")


def read_manifest(folder: Path) -> Manifest:
    """Raises:
    FileNotFoundError: no index there.
    ValueError: the index is of another format.
    """
    path = folder / "index.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no index.json; save an index there, or build it with folder=...")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has index format {manifest.get('format')}, this version reads {FORMAT}; build it again"
        )
    return manifest


def claim_folder(folder: Path, manifest: Manifest) -> Manifest:
    """Begin an index in a new or empty folder, or find it begun there. Returns the manifest that holds.

    Raises:
        ValueError: the folder holds something else.
    """
    if (folder / "index.json").exists():
        there = read_manifest(folder)
        if differ := [name for name in manifest if name not in ("part", "uri") and there.get(name) != manifest[name]]:
            raise ValueError(
                f"{folder} holds another index: other {', '.join(differ)}; choose another folder, or delete it"
            )
        return there
    if folder.exists() and any(path.name != ".index.json" for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no index; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)
    return manifest


def copy_folder(source: Path, folder: Path) -> None:
    """Copy an index beside `folder`, then put it in its place; what was there stays until the new one is whole.

    Raises:
        ValueError: the folder holds files that are not an index's.
    """
    ours = ("index.json", "documents.sqlite*", "part-*.safetensors", *get_args(Backend))
    if folder.exists() and (
        foreign := [path.name for path in folder.iterdir() if not any(path.match(pattern) for pattern in ours)]
    ):
        raise ValueError(f"{folder} holds other files ({foreign[0]}); choose another folder for the index")
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
