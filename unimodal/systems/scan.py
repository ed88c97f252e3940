"""SCAN: words attend to regions, or regions to words, and the score pools how well each finds itself (Lee et al. 2018, arXiv 1803.08024).

There are no cross-modal parameters: matching is attention over two sets. Affinities are clipped by a leaky rectifier of slope 0.1, as the
authors' code has it (the paper writes a plain one), and normalised for each context over the queries.

Legend: B images, M texts, Q queries, K contexts, R regions, L words, D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from unimodal.distributed import gather_padded, gather_with_grad
from unimodal.losses import triplet_loss
from unimodal.systems.base import Batch, Encoders, Images, State, System, Texts

SLOPE = 0.1
EPS = 1e-8
SOFTMAX = nn.Softmax(-1)


def stacked_attention(
    affinity: Tensor,
    query_mask: Tensor,
    context_mask: Tensor,
    context_products: Tensor,
    *,
    sharpness: float,
    softmax: nn.Module = SOFTMAX,
) -> Tensor:
    """How alike each query is to what it attends to: cosines [..., Q].

    | Inputs           | Shape       | Meaning                                                            |
    |------------------|-------------|--------------------------------------------------------------------|
    | affinity         | [..., Q, K] | inner products of queries and contexts, unit vectors all           |
    | query_mask       | [..., Q]    | True on real queries                                               |
    | context_mask     | [..., K]    | True on real contexts                                              |
    | context_products | [..., K, K] | inner products of the contexts among themselves                    |
    | sharpness        | number      | lambda 1: inverse temperature of the attention                     |
    | softmax          | module      | makes weights over the contexts; one of its own can be watched     |

    The attended context is never made: its product with the query and its length follow from the products alone.
    """
    clipped = F.leaky_relu(affinity, SLOPE).masked_fill(~query_mask[..., None], 0)
    normalised = clipped / (clipped.square().sum(-2, keepdim=True) + EPS**2).sqrt()  # over the queries
    weights = softmax((sharpness * normalised).masked_fill(~context_mask[..., None, :], float("-inf")))  # [..., Q, K]
    product = (weights * affinity).sum(-1)  # of query and attended context
    length = ((weights @ context_products) * weights).sum(-1).clamp(min=EPS**2).sqrt()
    return product / length


def pool_average(cosines: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real queries: [..., Q] -> [...]."""
    return cosines.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)


def pool_logsumexp(cosines: Tensor, mask: Tensor, sharpness: float) -> Tensor:
    """1 / lambda 2 times the log of the sum of exp(lambda 2 cosine) over the real queries: [..., Q] -> [...]."""
    return (sharpness * cosines).masked_fill(~mask, float("-inf")).logsumexp(-1) / sharpness


class SCAN(System):
    """One direction of stacked cross attention.

    Args:
        encoders: the shared ones.
        width: D of regions and words.
        direction: `t2i`: words attend to regions; `i2t`: regions to words.
        pool: `avg` or `lse`.
        sharpness: lambda 1, of the attention.
        pool_sharpness: lambda 2, of the pool `lse`.
        margin: of the triplets; the hardest of the batch counts, and another caption of the same image counts as wrong, as in the paper's
            code.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        direction: Literal["t2i", "i2t"] = "t2i",
        pool: Literal["avg", "lse"] = "avg",
        sharpness: float = 9.0,
        pool_sharpness: float = 6.0,
        margin: float = 0.2,
    ) -> None:
        super().__init__(encoders)
        self.direction, self.pool, self.margin = direction, pool, margin
        self.sharpness, self.pool_sharpness = sharpness, pool_sharpness
        self.attention = nn.Softmax(-1)
        self.looks = ("attention",) if direction == "t2i" else ()  # regions that look at words are not looked at
        self.regions = nn.Linear(encoders.image_width, width)
        nn.init.xavier_uniform_(self.regions.weight)
        nn.init.zeros_(self.regions.bias)
        self.words = nn.GRU(encoders.text_width, width, batch_first=True, bidirectional=True)

    def image_state(self, images: Images) -> State:
        """Regions [B, R, D], their mask, their products [B, R, R]."""
        return _set(self.regions(images.tokens), images.mask)

    def text_state(self, texts: Texts) -> State:
        """Words [M, L, D], the mean of both directions of the GRU, their mask, their products [M, L, L]."""
        lengths = texts.mask.sum(1).cpu()
        packed = pack_padded_sequence(texts.tokens, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.words(packed)[0], batch_first=True, total_length=texts.mask.shape[1])
        forward, backward = hidden.chunk(2, dim=-1)
        return _set((forward + backward) / 2, texts.mask)

    def score_pairs(self, images: State, texts: State) -> Tensor:
        affinity = images[0] @ texts[0].transpose(-1, -2)  # [P, R, L]
        return self._pooled(affinity, images[1:], texts[1:])

    def score_matrix(self, images: State, texts: State) -> Tensor:
        regions, words = images[0], texts[0]
        affinity = torch.einsum("brd,mld->bmrl", regions, words)
        image, text = [x[:, None] for x in images[1:]], [x[None] for x in texts[1:]]
        return self._pooled(
            affinity, (image[0].expand(-1, len(words), -1), image[1]), (text[0].expand(len(regions), -1, -1), text[1])
        )

    def _pooled(self, affinity: Tensor, image: State, text: State) -> Tensor:
        """Affinity [..., R, L], mask and products of both sides -> scores [...]."""
        (image_mask, image_products), (text_mask, text_products) = image, text
        if self.direction == "t2i":
            query_mask, sides = text_mask, (affinity.transpose(-1, -2), text_mask, image_mask, image_products)
        else:
            query_mask, sides = image_mask, (affinity, image_mask, text_mask, text_products)
        cosines = stacked_attention(*sides, sharpness=self.sharpness, softmax=self.attention)
        if self.pool == "avg":
            return pool_average(cosines, query_mask)
        return pool_logsumexp(cosines, query_mask, self.pool_sharpness)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        texts = gather_padded(*self.text_state(batch.texts))
        scores = gather_with_grad(self.score_matrix(self.image_state(batch.images), texts))  # [R * B, R * B]
        return {"triplet": triplet_loss(scores, margin=self.margin)}


class SCANEnsemble(System):
    """Two models whose score is the mean of theirs, one of each direction. By default those of the paper's headline: words to regions with
    average pooling, and regions to words with log-sum-exp.

    Args:
        encoders: the shared ones.
        width: of both.
        t2i, i2t: the pool of each direction.
        pool_sharpness: lambda 2 of `i2t`, on Flickr30K; on COCO the paper has 20. That of `t2i` is 6 on both.
        margin: of both.
    """

    looks = ("t2i.attention",)

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        t2i: Literal["avg", "lse"] = "avg",
        i2t: Literal["avg", "lse"] = "lse",
        pool_sharpness: float = 5.0,
        margin: float = 0.2,
    ) -> None:
        super().__init__(encoders)
        self.t2i = SCAN(encoders, width, "t2i", t2i, sharpness=9.0, pool_sharpness=6.0, margin=margin)
        self.i2t = SCAN(encoders, width, "i2t", i2t, sharpness=4.0, pool_sharpness=pool_sharpness, margin=margin)

    def image_state(self, images: Images) -> State:
        return (*self.t2i.image_state(images), *self.i2t.image_state(images))

    def text_state(self, texts: Texts) -> State:
        return (*self.t2i.text_state(texts), *self.i2t.text_state(texts))

    def score_pairs(self, images: State, texts: State) -> Tensor:
        return (self.t2i.score_pairs(images[:3], texts[:3]) + self.i2t.score_pairs(images[3:], texts[3:])) / 2

    def score_matrix(self, images: State, texts: State) -> Tensor:
        return (self.t2i.score_matrix(images[:3], texts[:3]) + self.i2t.score_matrix(images[3:], texts[3:])) / 2

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        """Each learns alone, as two models trained apart."""
        parts = {"t2i": self.t2i, "i2t": self.i2t}
        return {name: part.losses(batch, stage, progress)["triplet"] for name, part in parts.items()}


def _set(hidden: Tensor, mask: Tensor) -> State:
    """Unit vectors [B, N, D], zeros in the padding, their mask and their products [B, N, N]."""
    unit = F.normalize(hidden, dim=-1) * mask[..., None]
    return unit, mask, unit @ unit.transpose(-1, -2)
