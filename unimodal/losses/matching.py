"""Image-text matching: which wrong pairs to show the matching head, and how to judge its logits.

Negatives drawn by contrastive similarity: Li et al. 2021 (ALBEF, arXiv 2107.07651); over all ranks: Bao et al. 2022
(VLMo, arXiv 2111.02358) and Li et al. 2023 (BLIP-2, arXiv 2301.12597). Legend: I images, T texts, P pairs, B local pairs, R ranks.

On R ranks, sample from the gathered batch and keep your own rows, as `in_batch_matching` does:

    scores = scale * similarity(gather(image), gather(text))
    text_index, image_index = sample_hard_negatives(scores, gather(image_id), gather(image_id))
    wrong_text = gather_with_grad(text_states)[local_rows(shared(text_index))]

`shared` gives all ranks the draw of the first one, which is the draw of one process.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal import distributed
from unimodal.layers import at_least_float32
from unimodal.losses.numerics import mean_over_real


@torch.no_grad()
def sample_hard_negatives(
    similarity: Tensor,
    image_id: Tensor,
    text_image_id: Tensor,
    generator: torch.Generator | None = None,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One wrong text per image [I] and one wrong image per text [T], as column and row indices of `similarity`; with a `count`, so many
    different ones, [I, K] and [T, K].

    | Inputs        | Shape  | Meaning                                                                              |
    |---------------|--------|--------------------------------------------------------------------------------------|
    | similarity    | [I, T] | logits (scale times cosine): a pair is drawn with probability softmax(similarity)     |
    | image_id      | [I]    | which image a row shows                                                               |
    | text_image_id | [T]    | which image a text describes                                                          |
    | generator     | -      | on the device of `similarity`; makes the draw reproducible                            |
    | count         | -      | K                                                                                    |

    A pair with equal ids is never drawn.
    Raises ValueError on shapes that do not fit, and if an image or a text has too few wrong partners in the batch.
    """
    if similarity.shape != (*image_id.shape, *text_image_id.shape):
        raise ValueError(
            f"Got similarity {tuple(similarity.shape)} with image_id {tuple(image_id.shape)} and text_image_id "
            f"{tuple(text_image_id.shape)}; expected [I, T], [I] and [T]."
        )
    same = image_id[:, None] == text_image_id[None, :]
    _require_negatives(same, image_id, "image", "text", count or 1)
    _require_negatives(same.T, text_image_id, "text", "image", count or 1)
    logits = at_least_float32(similarity).masked_fill(same, float("-inf"))
    if count is None:
        text_index = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)  # [I]
        image_index = torch.multinomial(logits.T.softmax(dim=1), 1, generator=generator).squeeze(1)  # [T]
        return text_index, image_index
    # The largest of logit plus Gumbel noise are a draw without replacement (Kool et al. 2019, arXiv 1903.06059), whatever underflows.
    text_index, image_index = (
        (rows + _gumbel(rows, generator)).topk(count, dim=1).indices for rows in (logits, logits.T)
    )
    return text_index, image_index  # [I, K], [T, K]


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(min=1e-300)))


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Two-way cross-entropy, the mean over the pairs of all ranks, which may bring unequal numbers of them; a scalar.

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
    total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return mean_over_real(total, torch.ones_like(labels, dtype=torch.bool))


def in_batch_matching(
    score: Callable[[Tensor, Tensor], Tensor], similarity: Tensor, image_id: Tensor, own: Tensor | None = None
) -> Tensor:
    """`matching_loss` of a batch's true pairs, with a hard wrong text for each image and a hard wrong image for each text; a scalar.

    | Inputs     | Shape              | Meaning                                                                           |
    |------------|--------------------|-----------------------------------------------------------------------------------|
    | score      | function           | rows of images [P] and of texts [P] among the pairs of all ranks -> logits [P];    |
    |            |                    | asked once, for the 3 B pairs of this rank                                        |
    | similarity | [R * B, R * B]     | as in `sample_hard_negatives`, of the pairs of all ranks                          |
    | image_id   | [R * B]            | rows of equal ids are never drawn as wrong                                        |
    | own        | [B], default equal | which of the pairs are this rank's                                                |
    |            | shares of all      |                                                                                   |

    Raises ValueError as `sample_hard_negatives` does.
    """
    wrong_text, wrong_image = (
        distributed.shared(rows) for rows in sample_hard_negatives(similarity, image_id, image_id)
    )
    true = distributed.local_rows(torch.arange(len(image_id), device=image_id.device)) if own is None else own
    logits = score(torch.cat([true, true, wrong_image[true]]), torch.cat([true, wrong_text[true], true]))
    return matching_loss(logits, torch.arange(len(logits), device=logits.device) < len(true))


def _require_negatives(same: Tensor, ids: Tensor, row: str, column: str, count: int) -> None:
    wrong = (~same).sum(dim=1)
    if len(without := (wrong < count).nonzero()):
        first = int(without[0])
        has = f"only {wrong[first]} of {count} negatives" if wrong[first] else "no negative"
        raise ValueError(
            f"The {row} at row {first} (image id {ids[first].item()}) has {has}: "
            f"{same[first].sum()} of the {same.shape[1]} {column}s of the batch belong to the same image. "
            f"Matching needs at least {count + 1} different images per batch: raise the batch size, or draw captions of different images."
        )


def listwise_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of the true candidate among all, localized contrastive estimation (Gao et al. 2021, arXiv 2101.08751); a scalar.

    | Inputs | Shape     | Meaning                                                                 |
    |--------|-----------|-------------------------------------------------------------------------|
    | logits | [Q, 1 + K] | of each query with its candidates, the true one first                  |

    Raises ValueError if there is no second candidate.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"Got logits {tuple(logits.shape)}; expected [Q, 1 + K], the true candidate first, K at least 1."
        )
    return F.cross_entropy(at_least_float32(logits), logits.new_zeros(len(logits), dtype=torch.long))
