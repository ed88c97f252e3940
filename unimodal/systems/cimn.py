"""CIMN: each side reasons over graphs of its own tokens and is matched by one vector.

An inferred design: of the paper the abstract alone is public. It names feature relationship reasoning (neighbourhood and latent relations),
graph pooling, and a gravitation loss (`unimodal.losses.gravitation`). Graph convolution: Kipf and Welling 2017 (arXiv 1609.02907);
pooling by scored nodes: Gao and Ji 2019 (arXiv 1905.05178), Lee et al. 2019 (arXiv 1904.08082).

Legend: B items, N nodes (image tokens or words), W width, E embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import gather, gather_padded, gather_with_grad, local_rows, random_rows
from unimodal.layers import init_weights, key_mask_to_bias, masked_mean
from unimodal.losses import gravitation_loss, masses
from unimodal.systems.base import Batch, Encoders, Images, System, Texts

TEMPERATURE = 0.1  # of neighbourhoods
KEPT = 0.5  # share of nodes that a round of pooling keeps
ROUNDS = 2
DROPPED = 0.2  # share of tokens that a second view lacks
INTRA = 0.2  # weight of matching within a side


def neighbourhood(nodes: Tensor, mask: Tensor, nearest: int, *, sequence: bool = False) -> Tensor:
    """Who is near whom: rows of weights over each node's nearest nodes, itself among them, that sum to one.

    | Inputs   | Shape     | Meaning                                                |
    |----------|-----------|--------------------------------------------------------|
    | nodes    | [B, N, W] | compared by cosine                                     |
    | mask     | [B, N]    | True on real nodes; no other is a neighbour            |
    | nearest  | number    | how many neighbours                                    |
    | sequence | bool      | the nodes before and after a node are neighbours, too  |
    """
    unit = F.normalize(nodes, dim=-1)
    similarity = (unit @ unit.transpose(1, 2)).masked_fill(~mask[:, None], float("-inf"))  # [B, N, N]
    count = nodes.shape[1]
    kept = torch.zeros_like(similarity, dtype=torch.bool)
    kept.scatter_(2, similarity.topk(min(nearest, count), 2).indices, True)
    if sequence:
        place = torch.arange(count, device=nodes.device)
        kept |= (place[:, None] - place[None]).abs() == 1
    return (similarity / TEMPERATURE).masked_fill(~kept, float("-inf")).softmax(2)


class Relations(nn.Module):
    """One layer of reasoning: each node reads its neighbours and, by a learned graph, all nodes.

    Args:
        width: W.
        nearest, sequence: see `neighbourhood`.
        dropout: of what the layer adds.
    """

    def __init__(self, width: int, nearest: int, sequence: bool, dropout: float) -> None:
        super().__init__()
        self.nearest, self.sequence = nearest, sequence
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.near, self.latent = nn.Linear(width, width), nn.Linear(width, width)
        self.output = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        """[B, N, W], mask [B, N] -> [B, N, W], zero outside the mask."""
        near = neighbourhood(nodes, mask, self.nearest, sequence=self.sequence) @ self.near(nodes)
        affinity = self.query(nodes) @ self.key(nodes).transpose(1, 2) * nodes.shape[-1] ** -0.5
        bias = key_mask_to_bias(mask)
        assert bias is not None
        latent = (affinity + bias[:, 0]).softmax(2) @ self.latent(nodes)
        update = self.output(F.relu(torch.cat([near, latent], -1)))
        return self.norm(nodes + self.dropout(update)) * mask[..., None]


class GraphPool(nn.Module):
    """One round of pooling: nodes are scored in the light of their neighbours, the best half stays, weighed by its scores.

    Args:
        width: W.
        nearest: see `neighbourhood`.
    """

    def __init__(self, width: int, nearest: int) -> None:
        super().__init__()
        self.nearest = nearest
        self.convolve = nn.Linear(width, width)
        self.direction = nn.Parameter(torch.randn(width))

    def forward(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, W], mask [B, N] -> the kept nodes [B, ceil(N / 2), W], best first, and their mask: half of the real ones, rounded up."""
        near = neighbourhood(nodes, mask, self.nearest) @ self.convolve(nodes)
        score = torch.tanh(near @ F.normalize(self.direction, dim=0)).masked_fill(~mask, float("-inf"))  # [B, N]
        best, index = score.topk(math.ceil(KEPT * nodes.shape[1]), 1)
        kept = torch.arange(best.shape[1], device=nodes.device) < (KEPT * mask.sum(1, keepdim=True)).ceil()
        gate = best.masked_fill(~kept, 0)
        return nodes.gather(1, index[..., None].expand(-1, -1, nodes.shape[-1])) * gate[..., None], kept


class GraphEncoder(nn.Module):
    """Tokens of one side -> one vector.

    Args:
        in_width: C of the tokens.
        width: W.
        layers: of reasoning.
        dim: E.
        nearest, sequence: see `neighbourhood`.
        dropout: as in `Relations`.
    """

    def __init__(
        self, in_width: int, width: int, layers: int, dim: int, *, nearest: int, sequence: bool, dropout: float
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(in_width), nn.Linear(in_width, width))
        self.relations = nn.ModuleList(Relations(width, nearest, sequence, dropout) for _ in range(layers))
        self.pools = nn.ModuleList(GraphPool(width, nearest) for _ in range(ROUNDS))
        self.read_out = nn.Linear(2 * width, dim)
        self.apply(init_weights)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, N, C], mask [B, N] -> unit vectors [B, E]."""
        nodes = self.project(tokens) * mask[..., None]
        for layer in self.relations:
            nodes = layer(nodes, mask)
        total = nodes.new_zeros(len(nodes), 2 * nodes.shape[-1])
        for pool in self.pools:
            nodes, mask = pool(nodes, mask)
            largest = nodes.masked_fill(~mask[..., None], float("-inf")).amax(1)
            total = total + torch.cat([masked_mean(nodes, mask), largest], -1)
        return F.normalize(self.read_out(total), dim=-1)


class CIMN(System):
    """Two graph encoders, matched by cosine under a gravitation loss, between and within the sides.

    Args:
        encoders: the shared ones.
        width, layers, dropout: of both graph encoders.
        dim: E.
        image_nearest, text_nearest: neighbours of an image token and of a word.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 2,
        dropout: float = 0.1,
        dim: int = 256,
        image_nearest: int = 8,
        text_nearest: int = 3,
    ) -> None:
        super().__init__(encoders)
        self.image = GraphEncoder(
            encoders.image_width, width, layers, dim, nearest=image_nearest, sequence=False, dropout=dropout
        )
        self.text = GraphEncoder(
            encoders.text_width, width, layers, dim, nearest=text_nearest, sequence=True, dropout=dropout
        )

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        images, texts, ids = batch.images, batch.texts, gather(batch.image_id)
        # The second view of an image lacks some of its tokens; that of a caption is another of the same image, where the batch has one.
        other = (ids[:, None] == ids[None]).fill_diagonal_(False)
        partner = torch.where(other.any(1), other.long().argmax(1), torch.arange(len(ids), device=ids.device))
        words, mask = (x[local_rows(partner)] for x in gather_padded(texts.tokens, texts.mask))
        image, text, image_view, text_view = map(
            gather_with_grad,
            (
                self.embed_images(images),
                self.embed_texts(texts),
                self.image(images.tokens, drop_nodes(images.mask)),
                self.text(words, drop_nodes(mask)),
            ),
        )
        image_mass, text_mass = masses(image, text)
        return {
            "inter": gravitation_loss(image @ text.T, image_mass, text_mass, ids),
            "intra": INTRA
            * (
                gravitation_loss(image @ image_view.T, image_mass, image_mass, ids)
                + gravitation_loss(text @ text_view.T, text_mass, text_mass, ids)
            ),
        }

    def embed_images(self, images: Images) -> Tensor:
        return self.image(images.tokens, images.mask)

    def embed_texts(self, texts: Texts) -> Tensor:
        return self.text(texts.tokens, texts.mask)


def drop_nodes(mask: Tensor) -> Tensor:
    """The mask [B, N] without a share of its real nodes; one stays at least."""
    draw = random_rows(mask.shape, mask.device).masked_fill(~mask, -1.0)
    return mask & ((draw >= DROPPED) | (draw == draw.amax(1, keepdim=True)))
