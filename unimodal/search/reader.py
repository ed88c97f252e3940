"""Documents into arrays: what an index keeps of a batch of items, read once."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from unimodal.data.items import Item
from unimodal.search.encoder import Encoder
from unimodal.search.quantise import int8_rows
from unimodal.search.store import Arrays

OnError = Literal["raise", "skip"]
TokenPrecision = Literal["int8", "float32"]


def open_item(item: Item, on_error: OnError) -> Item | str:
    """The item with its picture loaded, or why it cannot be."""
    try:
        return item.opened()
    except (OSError, ValueError, TypeError) as error:
        if on_error == "raise":
            raise
        return str(error)


def read_items(
    encoder: Encoder, items: Sequence[Item], precision: TokenPrecision, keep_tokens: bool, prompt: str | None = None
) -> Arrays:
    """Arrays of n items: `embedding` [n, E] or [n, N, E] float32, `length` [n] of their tokens, `tokens` one after another, and the `scale`
    of each token where they are int8."""
    read = encoder.read(items, prompt)
    kept = read.tokens if keep_tokens else [torch.empty(0)] * len(items)
    tokens = torch.cat(kept).cpu()
    codes = tokens.float().numpy() if tokens.is_floating_point() else tokens.int().numpy()
    scale = np.empty(0, np.float32)
    if precision == "int8" and codes.ndim == 2:
        codes, scale = int8_rows(codes)
    length = np.array([len(one) for one in kept], np.int64)
    return {"embedding": read.embedding.cpu().numpy(), "length": length, "tokens": codes, "scale": scale}


def lay_out(batches: Sequence[tuple[Sequence[int], Arrays]], size: int) -> Arrays:
    """The arrays of a part of `size` places from its batches, each with the places of its items; a place without an item is empty."""
    if not batches:
        nothing = np.empty(0, np.float32)
        return {"embedding": nothing, "end": np.zeros(size, np.int64), "tokens": nothing, "scale": nothing}
    joined = {name: np.concatenate([arrays[name] for _, arrays in batches]) for name in batches[0][1]}
    places = np.concatenate([np.asarray(some, np.int64) for some, _ in batches])
    embedding = np.zeros((size, *joined["embedding"].shape[1:]), np.float32)
    length = np.zeros(size, np.int64)
    embedding[places], length[places] = joined["embedding"], joined["length"]
    return {"embedding": embedding, "end": np.cumsum(length), "tokens": joined["tokens"], "scale": joined["scale"]}
