"""Items as the features of a sentence-transformers model: one row of every tensor for each item, under the names that its trainer knows.

Its trainer finds the columns of a data set by the endings `input_ids` and `pixel_values`, cuts batches into pieces row by row
(the cached losses) and joins columns that have the same features. So an item without a picture has an empty row among the pictures, and
one without a text a row that the mask leaves out. Pictures have an axis more, of length one, where others have tokens: what cuts off
padding by the length of the texts then never takes them for texts.

Legend: n items, I pictures among them, L text length; `...` what a processor makes of a picture: [3, S, S], or the patches of NaFlex.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimodal.backbones import Pixels

# What processors call the parts of pictures and conversations, and their names here.
PICTURE = {name: name for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
TEXT = {"ids": "input_ids", "mask": "attention_mask", "types": "token_types"}
SEEN = {
    "patches": "pixel_values",
    "grids": "image_grids",
    "video_patches": "pixel_values_videos",
    "video_grids": "video_grids",
}

Features = dict[str, Tensor]


def decoded(value: Any) -> Any:
    """An item whose pictures may be as `datasets` keeps them inside of dicts, `{"bytes": ..., "path": ...}`, as this library reads it."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"}:
        return {"image": _stored(value)}
    return {
        key: [_stored(one) for one in part] if isinstance(part, list) else _stored(part) for key, part in value.items()
    }


def _stored(picture: Any) -> Any:
    if isinstance(picture, dict) and picture.keys() == {"bytes", "path"}:
        return picture["path"] if picture["bytes"] is None else picture["bytes"]
    return picture


def picture_features(pixels: Pixels, rows: Sequence[int], count: int) -> Features:
    """Pixels [I, ...] of the pictures of some of `count` items -> features [n, 1, ...], and `has_image` [n]."""
    place = torch.tensor(rows)
    parts = pixels if isinstance(pixels, dict) else {"pixel_values": pixels}
    features = {PICTURE[name]: _spread(part, place, count)[:, None] for name, part in parts.items()}
    return features | {"has_image": _spread(torch.ones(len(rows), dtype=torch.bool), place, count)}


def text_features(ids: Tensor, mask: Tensor, rows: Sequence[int], count: int, *, reads_padding: bool) -> Features:
    """Token ids and their mask [M, L] of the texts of some of `count` items -> features [n, L].

    The columns where `attention_mask` is False may be cut off. A model that reads its padding has it True there, and `token_mask` besides.
    """
    place = torch.tensor(rows)
    features = {"input_ids": _spread(ids, place, count), "attention_mask": _spread(mask, place, count)}
    if reads_padding:
        features["token_mask"] = features["attention_mask"]
        features["attention_mask"] = _spread(torch.ones_like(mask), place, count)
    return features


def texts(features: Features, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and their mask of these rows, as the model takes them."""
    mask = features.get("token_mask", features["attention_mask"])
    return features["input_ids"][rows], mask[rows].bool()


def conversation_features(batch: dict[str, Tensor]) -> Features:
    """A batch of conversations, which has one row for each item, as features."""
    return {name: batch[part] for part, name in TEXT.items()} | {
        name: batch[part][:, None] for part, name in SEEN.items() if part in batch
    }


def pictures(features: Features, rows: Tensor) -> Pixels:
    """The pixels of these rows, as the model takes them."""
    parts = {part: features[name][rows, 0] for part, name in PICTURE.items() if name in features}
    return parts if len(parts) > 1 else parts["pixel_values"]


def conversations(features: Features, rows: Tensor) -> dict[str, Tensor]:
    """The conversations of these rows, as the model takes them."""
    return {part: features[name][rows] for part, name in TEXT.items()} | {
        part: features[name][rows, 0] for part, name in SEEN.items() if name in features
    }


def rows_with_pictures(features: Features) -> Tensor:
    """Which items have pictures [I]."""
    if "token_types" in features:
        return features["token_types"].any(dim=1).nonzero()[:, 0]
    if "has_image" in features:
        return features["has_image"].nonzero()[:, 0]
    return torch.arange(len(features["pixel_values"]) if "pixel_values" in features else 0)


def rows_with_texts(features: Features) -> Tensor:
    """Which items have texts [M]; of conversations those that are mere texts."""
    if "token_types" in features:
        return (~features["token_types"].any(dim=1)).nonzero()[:, 0]
    if "attention_mask" in features:
        return features["attention_mask"].any(dim=1).nonzero()[:, 0]
    return torch.arange(0)


def count_of(features: Features) -> int:
    """n."""
    return len(features["input_ids" if "input_ids" in features else "pixel_values"])


def _spread(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """Rows of some items among those of all items, zeros elsewhere."""
    if len(rows) == count:
        return part
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)
