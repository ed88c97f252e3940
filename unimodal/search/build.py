"""Building an index: every document is read once, a part at a time; an interrupted build continues where it stopped."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file

from unimodal.data.images import load_image
from unimodal.data.items import Item, as_items
from unimodal.search.encoder import Encoder, batches, progress
from unimodal.search.index import Index
from unimodal.search.quantise import int8_rows
from unimodal.search.store import FORMAT, Arrays, claim_folder, join, part_files, write_part

PART = 1024  # documents: what an interruption can cost


def build_index(
    encoder: Encoder,
    documents: Any,
    ids: Sequence[int | str] | None = None,
    precision: Literal["int8", "float32"] = "int8",
    *,
    batch_size: int = 32,
    on_error: Literal["raise", "skip"] = "raise",
    folder: str | Path | None = None,
    show_progress_bar: bool | None = None,
) -> Index:
    """Read documents into an index.

    Args:
        encoder: the model and its processor.
        documents: items, see `unimodal.data.items`.
        ids: what hits are called, all different; 0, 1, ... where not given.
        precision: of the tokens that are kept for reranking. With `int8` an image takes N W bytes for the cached
            matching head (N queries, W bridge width) and T D for the one in the bridge (T image tokens, D backbone
            width; often ten times as much); `float32` takes four times that. Embeddings are always float32.
        batch_size: documents at a time.
        on_error: what happens at an image that cannot be read: `raise` stops; `skip` leaves it out, warns with count
            and reasons, and lists it in `Index.skipped`.
        folder: keep the index there from the start, and continue one that was interrupted. Documents are told apart by
            path, text and id, not by the content of files.
        show_progress_bar: None shows one for several batches on a terminal.

    Raises:
        ValueError: ids that do not fit, an unknown precision, a folder that holds something else; also what `as_items`
            and `load_image` raise.
    """
    if precision not in ("int8", "float32"):
        raise ValueError(f"precision: the tokens of an index are 'int8' or 'float32', got {precision!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    items = as_items(documents, check_files=on_error == "raise")
    encoder.check_one_shape(items)
    kinds = {item.kind for item in items}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "model": encoder.fingerprint(),
        "precision": precision,
        "kind": kinds.pop() if kinds in ({"image"}, {"text"}) else "mixed",
        "ids": _check_ids(ids, len(items)),
        "documents": [item.document for item in items],
        "part": PART,
    }
    files: list[Path] = []
    if folder is not None:
        manifest = claim_folder(Path(folder), manifest)
        files = part_files(Path(folder), manifest)
    parts = {i: load_file(file) for i, file in enumerate(files) if file.exists()}
    rows = np.arange(len(items))
    todo = [(i, rows[part]) for i, part in enumerate(batches(len(items), manifest["part"])) if i not in parts]
    steps = [(i, part[batch].tolist()) for i, part in todo for batch in batches(len(part), batch_size)]
    width = encoder.model.config.embedding.dim
    problems: list[str] = []
    for i, group in groupby(progress(steps, "Indexing", show_progress_bar), key=lambda step: step[0]):
        read = []
        for _, batch in group:
            opened = {row: _open(items[row], f"{manifest['ids'][row]!r}", on_error, problems) for row in batch}
            read.append(_read(encoder, {row: item for row, item in opened.items() if item}, manifest))
        parts[i] = join(read, width)
        if files:
            write_part(files[i], parts[i])
    if problems:
        warnings.warn(
            f"{len(problems)} of {len(items)} documents could not be read and are not in the index: "
            + "; ".join(problems[:5]),
            stacklevel=2,
        )
    return Index(encoder, manifest, [parts[i] for i in sorted(parts)])


def _open(item: Item, name: str, on_error: str, problems: list[str]) -> Item | None:
    """The item with its picture loaded, or None and one more problem."""
    try:
        return item if item.image is None else replace(item, image=load_image(item.image))
    except (OSError, ValueError, TypeError) as error:
        if on_error == "raise":
            raise
        problems.append(f"{name}: {error}")
        return None


def _read(encoder: Encoder, items: dict[int, Item], manifest: dict[str, Any]) -> Arrays:
    """Arrays of one batch of documents, by row."""
    if not items:
        return join([], encoder.model.config.embedding.dim)
    read = encoder.read(list(items.values()))
    kept = read.tokens if manifest["kind"] != "mixed" else [torch.empty(0)] * len(items)
    tokens = torch.cat(kept).cpu()
    codes, scale = (
        tokens.float().numpy() if tokens.is_floating_point() else tokens.int().numpy(),
        np.empty(0, np.float32),
    )
    if manifest["precision"] == "int8" and codes.ndim == 2:
        codes, scale = int8_rows(codes)
    return {
        "row": np.array(list(items), np.int64),
        "embedding": read.embedding.cpu().numpy(),
        "length": np.array([len(t) for t in kept], np.int64),
        "tokens": codes,
        "scale": scale,
    }


def _check_ids(ids: Sequence[int | str] | None, count: int) -> list[int | str]:
    ids = list(range(count)) if ids is None else list(ids)
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int | str)]:
        raise ValueError(f"ids: expected int or str, got {type(wrong[0]).__name__} {wrong[0]!r}")
    if len(ids) != count or len(set(ids)) != count:
        raise ValueError(
            f"ids: expected {count} different ones, one per document, got {len(ids)} of which {len(set(ids))} differ"
        )
    return ids
