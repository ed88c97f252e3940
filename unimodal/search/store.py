"""The folder of an index.

    index.json               format, model fingerprint, kind, ids and names of the documents, documents per part
    part-00000.safetensors   embeddings (float32) and the tokens of the matching head (int8, one scale per token)

A part is written when its rows are done, and appears only when it is whole. So the parts that exist are the work that
is done, and an interrupted build continues with the first one that is missing.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

FORMAT = 1

Manifest = dict[str, Any]
Arrays = dict[str, np.ndarray]


def part_files(folder: Path, manifest: Manifest) -> list[Path]:
    """The files of all parts, written or not."""
    count = -(-len(manifest["ids"]) // manifest["part"])
    return [folder / f"part-{i:05}.safetensors" for i in range(count)]


def write_part(path: Path, arrays: Arrays) -> None:
    """The file appears only when it is whole."""
    unfinished = path.with_name(f".{path.name}")
    save_file(arrays, unfinished)
    os.replace(unfinished, path)


def join(parts: list[Arrays], width: int) -> Arrays:
    """Parts one after another. Without any row, arrays for no embeddings of this width."""
    parts = [part for part in parts if len(part["row"])]
    if parts:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    none, nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    return {"row": none, "embedding": nothing.reshape(0, width), "length": none, "tokens": nothing, "scale": nothing}


def claim_folder(folder: Path, manifest: Manifest) -> Manifest:
    """Begin an index in a new or empty folder, or find it begun there. Returns the manifest that holds.

    Raises:
        ValueError: the folder holds something else.
    """
    path = folder / "index.json"
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if differ := [name for name in manifest if name != "part" and there.get(name) != manifest[name]]:
            raise ValueError(
                f"{folder} holds another index: other {', '.join(differ)}; choose another folder, or delete it"
            )
        return there
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no index; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.with_name(".index.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    os.replace(path.with_name(".index.json"), path)
    return manifest


def replace_folder(folder: Path, manifest: Manifest, parts: list[Arrays]) -> None:
    """Write an index beside `folder`, then put it in its place; what was there stays until the new one is whole.

    Raises:
        ValueError: the folder holds files that are not an index's.
    """
    if folder.exists() and (
        foreign := [p.name for p in folder.iterdir() if not p.match("part-*.safetensors") and p.name != "index.json"]
    ):
        raise ValueError(f"{folder} holds other files ({foreign[0]}); choose another folder for the index")
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    claim_folder(beside, manifest)
    for path, arrays in zip(part_files(beside, manifest), parts):
        write_part(path, arrays)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def read_folder(folder: Path) -> tuple[Manifest, list[Arrays]]:
    """Manifest and parts of a complete index.

    Raises:
        FileNotFoundError: no index there.
        ValueError: the index is of another format, or parts are missing.
    """
    path = folder / "index.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no index.json; save an index there, or build it with folder=...")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has index format {manifest.get('format')}, this version reads {FORMAT}; build it again"
        )
    files = part_files(folder, manifest)
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(
            f"{folder} is incomplete: {len(missing)} of {len(files)} parts are missing, first {missing[0]}; build it "
            "again with the same documents and this folder, and it continues there"
        )
    return manifest, [load_file(file) for file in files]
