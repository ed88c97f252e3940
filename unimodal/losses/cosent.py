"""CoSENT: graded similarities. A pair that is rated higher should have the larger cosine, whatever the two cosines are.

Su 2022, as in the report of Qwen3-VL-Embedding (arXiv 2601.04720, section 3.3), which trains semantic textual similarity by it.
Legend: P local pairs, R ranks. Across ranks: see `unimodal.distributed`.
"""

import torch
from torch import Tensor

from unimodal import distributed
from unimodal.layers import at_least_float32


def cosent_loss(cosine: Tensor, rating: Tensor, *, scale: Tensor | float, gather: bool = True) -> Tensor:
    """`log(1 + sum exp(scale (cosine_b - cosine_a)))` over all pairs a and b of which a is rated higher; a scalar.

    | Inputs | Shape  | Meaning                                                             |
    |--------|--------|---------------------------------------------------------------------|
    | cosine | [P]    | of the two items of each pair                                       |
    | rating | [P]    | how alike they are said to be; only the order counts                |
    | scale  | scalar | 1 / temperature                                                     |
    | gather | bool   | compare with the pairs of all ranks, with gradient; else local ones |

    0 where all ratings are equal. Takes time P log P and no matrix of all comparisons: sorted by rating, the pairs that are rated below
    another are a beginning of the list, and enter as one running logarithm of a sum.

    Raises ValueError on shapes that do not fit.
    """
    if cosine.dim() != 1 or cosine.shape != rating.shape:
        raise ValueError(f"Got cosines {tuple(cosine.shape)} and ratings {tuple(rating.shape)}; expected [P] for both.")
    cosine = at_least_float32(cosine)
    if gather:
        cosine, rating = distributed.gather_with_grad(cosine), distributed.gather(rating)
    rating, order = rating.sort()
    logits = scale * cosine[order]
    lower = torch.searchsorted(rating, rating)  # [R * P], how many are rated below each
    higher = lower > 0
    below = logits.logcumsumexp(0)[lower[higher] - 1]
    return torch.cat([logits.new_zeros(1), below - logits[higher]]).logsumexp(0)
