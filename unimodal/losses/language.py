"""Captioning loss: predict the next token. Smoothed by 0.1 as in BLIP (Li et al. 2022, arXiv 2201.12086) and BLIP-2.

Legend: B batch, L text length, V vocabulary size.
"""

import torch.nn.functional as F
from torch import Tensor

from unimodal.layers import at_least_float32
from unimodal.losses.numerics import mean_over_real

IGNORED = -100  # no token has this id


def caption_loss(logits: Tensor, ids: Tensor, mask: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy of the next token over all real targets; a scalar.

    | Inputs          | Shape     | Meaning                                                                |
    |-----------------|-----------|------------------------------------------------------------------------|
    | logits          | [B, L, V] | position i scores token i + 1 (the last position predicts nothing)     |
    | ids             | [B, L]    | the caption as it was fed to the decoder, start token included         |
    | mask            | [B, L]    | True for real tokens; pads are neither targets nor predict any         |
    | label_smoothing | number    | share of each target that is spread evenly over the vocabulary         |

    Every real token of the global batch weighs the same, however the captions are spread over ranks.
    Raises ValueError on shapes that do not fit, and if no target is real.
    """
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or mask.shape != ids.shape or ids.shape[1] < 2:
        raise ValueError(
            f"Got logits {tuple(logits.shape)}, ids {tuple(ids.shape)} and mask {tuple(mask.shape)}; "
            "expected [B, L, V], [B, L] and [B, L] with L of at least 2 (a start token and one to predict)."
        )
    real = mask[:, 1:] & mask[:, :-1]  # [B, L - 1]; both ends, so that left padding is ignored too
    targets = ids[:, 1:].masked_fill(~real, IGNORED)
    predictions = at_least_float32(logits[:, :-1])  # [B, L - 1, V]
    total = F.cross_entropy(
        predictions.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return mean_over_real(total, real)
