"""One-way contrast of queries and documents in which likely false negatives are left out: the loss of Qwen3-VL-Embedding.

Its report (arXiv 2601.04720, 2026, section 3.3) trains the first stage with `within`, the later ones without. Wrong documents that are
mined for each query follow its rule, whose thresholds are not published.
Legend: B local pairs, R ranks, Q queries, D documents, K wrong documents per query, E embedding dim. Across ranks: see
`unimodal.distributed`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from unimodal import distributed
from unimodal.layers import at_least_float32
from unimodal.losses.contrastive import Wrong
from unimodal.retrieval import row_similarity, similarity


class Mined(NamedTuple):
    """Which queries [Q] are worth learning from, wrong documents of each [Q, K], the most similar first, and which are there [Q, K]."""

    kept: Tensor
    documents: Tensor
    given: Tensor


@torch.no_grad()
def mine_negatives(
    scores: Tensor, right: Tensor, pool: Tensor, *, count: int, above: float = 0.1, margin: float = 0.1
) -> Mined:
    """The most similar wrong documents of each query.

    | Inputs | Shape  | Meaning                                                                                       |
    |--------|--------|-----------------------------------------------------------------------------------------------|
    | scores | [Q, D] | cosines                                                                                       |
    | right  | [Q, D] | which documents answer a query, at least one                                                  |
    | pool   | [Q, D] | which may be mined                                                                            |
    | count  | number | K, or D where that is fewer                                                                   |
    | above  | number | a query is kept if one of its right documents scores more than this                           |
    | margin | number | a document is taken for a false negative unless it scores less than the mean right one + this |
    """
    best = scores.masked_fill(~right, float("-inf")).amax(1)
    mean = scores.masked_fill(~right, 0).sum(1) / right.sum(1)
    wrong = pool & ~right & (scores < mean[:, None] + margin)
    documents = scores.masked_fill(~wrong, float("-inf")).topk(min(count, scores.shape[1]), 1).indices
    return Mined(best > above, documents, wrong.gather(1, documents))


def masked_info_nce(
    query: Tensor,
    document: Tensor,
    ids: Tensor,
    *,
    scale: Tensor | float,
    wrong: Wrong | None = None,
    margin: float = 0.1,
    within: bool = False,
    gather: bool = True,
) -> Tensor:
    """`-log(exp(scale s_ii) / Z_i)`, the mean over queries: each query finds its document; a scalar.

    | Inputs   | Shape               | Meaning                                                                       |
    |----------|---------------------|-------------------------------------------------------------------------------|
    | query    | [B, E]              | unit vectors                                                                  |
    | document | [B, E]              | unit vectors; row i is the document of query i                                |
    | ids      | [B]                 | what a pair is about: equal ids are never each other's negatives              |
    | scale    | scalar              | 1 / temperature                                                               |
    | wrong    | [B, K, E], [B, K]   | documents that are wrong for their own query                                  |
    | margin   | number              | a negative this much more similar than the positive is taken for a false one  |
    | within   | bool                | also push queries from queries and documents from documents                   |
    | gather   | bool                | negatives from the batches of all ranks, with gradient; else the local one    |

    With s the cosine, Z_i sums exp(scale s) over the positive s(q_i, d_i), over s(q_i, d_j), over the query's own wrong
    documents and, `within`, over s(q_i, q_j) and s(d_i, d_j). A negative counts unless its s exceeds
    s(q_i, d_i) + margin or its id is that of row i. A rank returns the mean over its own queries.

    Raises ValueError on shapes that do not fit; several vectors per item have no similarity within a modality.
    """
    if query.dim() != 2 or query.shape != document.shape or ids.shape != query.shape[:1]:
        raise ValueError(
            f"Got queries {tuple(query.shape)}, documents {tuple(document.shape)} and ids {tuple(ids.shape)}; expected "
            "[B, E], [B, E] and [B]: one vector per item (embedding.pool 'mean' or 'attention'), one document per query."
        )
    query, document = at_least_float32(query), at_least_float32(document)
    queries, documents, all_ids = query, document, ids
    if gather:
        queries, documents = distributed.gather_with_grad(query), distributed.gather_with_grad(document)
        all_ids = distributed.gather(ids)

    positive = row_similarity(query, document[:, None])  # [B, 1]
    other = ids[:, None] != all_ids[None, :]  # [B, R * B]
    blocks = [(similarity(query, documents), other)]
    if within:
        blocks += [(similarity(query, queries), other), (similarity(document, documents), other)]
    if wrong is not None:
        blocks.append((row_similarity(query, wrong.embedding), wrong.given))
    limit = positive.detach() + margin
    columns = [(scale * s).masked_fill(~counts | (s.detach() > limit), float("-inf")) for s, counts in blocks]
    return (torch.cat([scale * positive, *columns], dim=1).logsumexp(dim=1) - scale * positive[:, 0]).mean()
