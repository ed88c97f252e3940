"""The batch contract: the keys a batch may carry, their shapes, and a check that names what is missing.

Legend: B images, K false captions per image, L text length (each key its own), S image side, T tokens and C width of a tower.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]

KEYS = {
    "image": "float [B, 3, S, S], normalised pictures",
    "image_features": "float [B, T, C], cached features of a frozen image tower (instead of image)",
    "image_features_mask": "bool [B, T], True on real ones; absent where all are",
    "text": "long [B, L], token ids",
    "text_mask": "bool [B, L], True on real tokens",
    "caption": "long [B, L], prompt and caption in the token ids of a language model, which has its own tokenizer",
    "caption_mask": "bool [B, L], True on the caption, its end and the token before it; the prompt is read, not learned",
    "text_features": "float [B, L, C], cached features of a frozen text tower (beside text)",
    "image_id": "long [B], equal for rows that show the same image; drives every multi-positive target and every false-negative mask",
    "text_id": "long [B], the caption",
    "labels": "float [B, K], which of the model's K categories the image has",
    "negative_text": "long [B, K, L], token ids of captions that are wrong for the image (a swapped attribute or relation)",
    "negative_mask": "bool [B, K, L], True on real tokens; all False in place of a caption that the reader does not have",
    "negative_text_features": "float [B, K, L, C], their cached features (beside negative_text); absent where not all are cached",
    "negative_text_logit": "float [B, K], mined match logits of the image with those captions; NaN where there is none",
    "negative_image": "float [B, K, 3, S, S], pictures that are wrong for the caption; zeros in place of one that is not there",
    "negative_image_features": "float [B, K, T, C], their cached features (instead of negative_image)",
    "negative_image_features_mask": "bool [B, K, T], True on real ones; absent where all are",
    "negative_image_mask": "bool [B, K], which of them are there",
    "negative_image_logit": "float [B, K], mined match logits of the caption with those pictures; NaN where there is none",
    "match_logit": "float [B], mined match logit of the image with its own caption, from a file that a matching head judged",
    "target": "float [B, 3, S, S] in [-1, 1], the picture to generate",
}


def check_batch(batch: dict[str, Any], needed: tuple[str, ...], reader: str) -> None:
    """Refuse a batch that lacks a key `reader` needs, or whose rows do not agree.

    Raises:
        KeyError: names the missing key, what it should hold, and what the batch has.
        ValueError: for keys of different batch size.
    """
    for key in needed:
        if key == "image" and "image_features" in batch:
            continue
        if key not in batch:
            raise KeyError(f"{reader} needs batch key {key!r} ({KEYS[key]}); the batch has {sorted(batch)}")
    rows = {key: len(value) for key, value in batch.items() if torch.is_tensor(value)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"{reader} got a batch whose keys have different numbers of rows: {rows}")


def image_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `UnimodalModel.encode_image` takes of a batch."""
    return {
        "pixels": batch.get("image"),
        "features": batch.get("image_features"),
        "mask": batch.get("image_features_mask"),
    }


def text_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `UnimodalModel.encode_text` takes of a batch."""
    return {"ids": batch["text"], "mask": batch["text_mask"], "features": batch.get("text_features")}
