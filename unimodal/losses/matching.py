"""Image-text matching: which wrong pairs to show the matching head, and how to judge its logits.

Negatives drawn by contrastive similarity: Li et al. 2021 (ALBEF, arXiv 2107.07651); over all ranks: Bao et al. 2022
(VLMo, arXiv 2111.02358) and Li et al. 2023 (BLIP-2, arXiv 2301.12597). Legend: I images, T texts, P pairs.

On R ranks, sample from the gathered batch and keep your own rows:

    scores = scale * similarity(gather(image), gather(text))
    text_index, image_index = sample_hard_negatives(scores, gather(image_id), gather(image_id), generator)
    wrong_text = gather_with_grad(text_states)[local_rows(text_index)]

With a generator seeded alike on all ranks this draws what one process would draw. With unlike seeds the rows are still
valid draws: a rank only reads its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.losses.numerics import at_least_float32


@torch.no_grad()
def sample_hard_negatives(
    similarity: Tensor, image_id: Tensor, text_image_id: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One wrong text per image [I] and one wrong image per text [T], as column and row indices of `similarity`.

    | Inputs        | Shape  | Meaning                                                                              |
    |---------------|--------|--------------------------------------------------------------------------------------|
    | similarity    | [I, T] | logits (scale times cosine): a pair is drawn with probability softmax(similarity)     |
    | image_id      | [I]    | which image a row shows                                                               |
    | text_image_id | [T]    | which image a text describes                                                          |
    | generator     | -      | on the device of `similarity`; makes the draw reproducible                            |

    A pair with equal ids is never drawn.
    Raises ValueError on shapes that do not fit, and if an image or a text has no wrong partner in the batch.
    """
    if similarity.shape != (*image_id.shape, *text_image_id.shape):
        raise ValueError(
            f"Got similarity {tuple(similarity.shape)} with image_id {tuple(image_id.shape)} and text_image_id "
            f"{tuple(text_image_id.shape)}; expected [I, T], [I] and [T]."
        )
    same = image_id[:, None] == text_image_id[None, :]
    _require_negative(same, image_id, "image", "text")
    _require_negative(same.T, text_image_id, "text", "image")
    logits = at_least_float32(similarity).masked_fill(same, float("-inf"))
    text_index = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)  # [I]
    image_index = torch.multinomial(logits.T.softmax(dim=1), 1, generator=generator).squeeze(1)  # [T]
    return text_index, image_index


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Two-way cross-entropy over pairs; a scalar.

    | Inputs | Shape | Meaning                                                      |
    |--------|-------|--------------------------------------------------------------|
    | logits | [P]   | logit of "match" minus logit of "no match"                   |
    | labels | [P]   | 1 (or True) for a matching pair, 0 (or False) for a wrong one |

    A softmax over two logits depends only on their difference, so this equals `cross_entropy([no, yes], labels)`.
    Raises ValueError if the shapes differ.
    """
    if logits.dim() != 1 or logits.shape != labels.shape:
        raise ValueError(f"Got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected [P] for both.")
    logits = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _require_negative(same: Tensor, ids: Tensor, row: str, column: str) -> None:
    without = same.all(dim=1).nonzero()
    if len(without):
        first = int(without[0])
        raise ValueError(
            f"The {row} at row {first} (image id {ids[first].item()}) has no negative: all {same.shape[1]} {column}s "
            "of the batch belong to the same image. Matching needs at least two different images per batch: raise the "
            "batch size, or draw captions of different images."
        )
