"""Attention and its neighbours, in torch alone: what the bridge and the heads are made of.

Sources: attention, Vaswani et al. 2017 (arXiv 1706.03762); pre-norm blocks, Xiong et al. 2020 (arXiv 2002.04745);
attention pooling as in OmniBridge (arXiv 2509.19018).

Shapes: B batch, T tokens read, L tokens reading, H attention heads, W width. A mask is bool [B, T], True = real token.
Keys and values are a plain pair of tensors [B, H, T, W / H]: an attention layer projects them (`project`) and attends
to any it is given, so that they can be kept, grown (`KeyValues.extend`) or handed to other rows (`KeyValues.select`)
without being computed again.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Added to a score that must not count. Finite: a row that may look at nothing stays finite. Within float16, even twice.
HIDDEN = -3e4


def key_mask_to_bias(mask: Tensor | None) -> Tensor | None:
    """What a mask [B, T] adds to attention scores: [B, 1, 1, T], 0 for a real token, `HIDDEN` for padding. None stays
    None.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask is not [B, T].
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool [B, T] with True for real tokens, got {mask.dtype}; pass mask.bool()")
    if mask.dim() != 2:
        raise ValueError(f"mask: expected bool [B, T] with True for real tokens, got the shape {list(mask.shape)}")
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, HIDDEN)[:, None, None]


def causal_bias(length: int, past: int, device: torch.device) -> Tensor | None:
    """[length, past + length]: token i sees all of the past and the tokens up to itself. None for one token."""
    if length == 1:
        return None
    return torch.full((length, past + length), HIDDEN, device=device).triu_(past + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention: q [B, H, L, h], k and v [B, H, T, h], bias to [B, H, L, T] -> [B, H, L, h]."""
    if bias is not None:
        bias = bias.to(q.dtype)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # torch's fused kernel is several times slower than three plain steps for short bfloat16 sequences on a CPU.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, dropout)


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`; the backward computes once more what this computes on the way and does not keep. For what is cheap and large."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler chooses for itself what to keep
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


class KeyValues:
    """Keys and values of every layer of a network that attends, and what hides some of them.

    As the memory of cross-attention it is computed once per image and selected for every pair that needs the image. As
    the cache of causal self-attention it starts empty and grows with each piece of text. (No dataclass: FSDP2 casts the
    inputs of a block in copies of dataclasses, and a copied cache would not grow.)

    Args:
        layers: keys and values [B, H, T, W / H] of each layer.
        bias: what is added to attention scores, [B, 1, 1, T].
        index: which row each of P pairs reads, [P]; None: as many pairs as rows, in their order.
    """

    def __init__(
        self,
        layers: list[tuple[Tensor, Tensor]] | None = None,
        bias: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        self.layers = [] if layers is None else layers
        self.bias, self.index = bias, index

    @classmethod
    def of(cls, readers: Iterable[Any], tokens: Tensor, mask: Tensor | None = None) -> "KeyValues":
        """Keys and values of tokens [B, T, D], mask [B, T], for every `Attention` that reads them."""
        return cls([reader.project(tokens) for reader in readers], key_mask_to_bias(mask))

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def rows(self) -> int:
        """Batch size B, or how many pairs P read these."""
        return self.layers[0][0].shape[0] if self.index is None else len(self.index)

    def layer(self, place: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `Attention` reads in one layer: keys, values, bias, index."""
        return (*self.layers[place], self.bias, self.index)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append to one layer; returns all that the layer holds now."""
        if layer == len(self.layers):
            self.layers.append((keys, values))
        else:
            past_keys, past_values = self.layers[layer]
            self.layers[layer] = (torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2))
        return self.layers[layer]

    def shared(self, index: Tensor) -> "KeyValues":
        """For pairs that read the rows `index` [P]: a layer's rows are repeated while it reads them, and at no other time."""
        return KeyValues(self.layers, self.bias, index)

    def select(self, index: Tensor) -> "KeyValues":
        """Rows `index` [P] of every layer, as new keys and values: gradients flow back, growth does not."""
        layers = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers]
        return KeyValues(layers, None if self.bias is None else self.bias.index_select(0, index))


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, index: Tensor) -> Tensor:
    """As `attend`; row p of q reads row index[p] of the rest."""
    bias = None if bias is None else bias.index_select(0, index)
    return attend(q, k.index_select(0, index), v.index_select(0, index), bias, dropout)


class Padding:
    """Where the real tokens of padded rows are, so that linear layers need not read the padding.

    Args:
        mask: [B, L], True = real token; R of them.
    """

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        self.places = mask.flatten().nonzero()[:, 0]

    def remove(self, x: Tensor) -> Tensor:
        """[B, L, W] -> [R, W]."""
        return x.flatten(0, 1)[self.places]

    def restore(self, x: Tensor) -> Tensor:
        """[R, W] -> [B, L, W], zeros in the padding."""
        return x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, self.places, x).unflatten(0, self.shape)


class Attention(nn.Module):
    """Multi-head attention of `width` to keys and values from `memory_width` (its own width if not given)."""

    def __init__(self, width: int, heads: int, *, memory_width: int | None = None, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"attention: a width of {width} does not divide into {heads} heads; change one of them")
        self.heads, self.dropout = heads, dropout
        memory_width = memory_width or width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)
        self.output = nn.Linear(width, width)

    def project(self, memory: Tensor, padding: "Padding | None" = None) -> tuple[Tensor, Tensor]:
        """Keys and values of memory [B, T, memory_width], or of its real tokens [R, memory_width]: two of [B, H, T, W / H]."""
        return self._split(self.key(memory), padding), self._split(self.value(memory), padding)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        index: Tensor | None = None,
        padding: "Padding | None" = None,
    ) -> Tensor:
        """x [B, L, W], or its real tokens [R, W], to the same; with an index [B] row b reads the keys and values of row index[b]."""
        queries = self._split(self.query(x), padding)
        dropout = self.dropout if self.training else 0.0
        if index is None:
            mixed = attend(queries, keys, values, bias, dropout)
        else:
            mixed = recomputed(_attend_rows, queries, keys, values, bias, dropout, index)
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.output(mixed if padding is None else padding.remove(mixed))

    def _split(self, x: Tensor, padding: "Padding | None") -> Tensor:
        x = x if padding is None else padding.restore(x)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, W] -> [B, H, T, W / H]


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._activate, self.up(x))  # keeps one of the two widest tensors of a transformer

    def _activate(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(x))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), as CLIP has GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415); one new tensor where no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x, inplace=not torch.is_grad_enabled()).mul_(1 / 1.702)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention to a memory, feed-forward."""

    def __init__(self, width: int, heads: int, *, memory_width: int, dropout: float = 0.0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout=dropout)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, memory_width=memory_width, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, bias: Tensor | None, memory: KeyValues, layer: int, cache: KeyValues | None = None
    ) -> Tensor:
        """x [B, L, W] -> [B, L, W]; `layer` is the block's place in `memory` and `cache`."""
        y = self.attention_norm(x)
        keys, values = self.attention.project(y)
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)
        x = x + self.dropout(self.attention(y, keys, values, bias))
        x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), *memory.layer(layer)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """Vectors [..., E] -> the same directions at norm 1, in float32 where `x` has fewer bits: in bfloat16 norms would lie between 0.996 and
    1.004."""
    return F.normalize(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, dim=-1)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens: x [B, T, W], mask [B, T] -> [B, W]. Zeros for a row without any."""
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class AttentionPool(nn.Module):
    """Tokens -> one vector: the mean of the real tokens asks, all real tokens answer (OmniBridge, arXiv 2509.19018).

    OmniBridge normalises keys and values apart; one norm spans the same functions, as its scale and shift fold into the
    projections.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.token_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, W], mask [B, T] -> [B, W]."""
        query = self.query_norm(masked_mean(x, mask))[:, None]
        return self.attention(query, *self.attention.project(self.token_norm(x)), key_mask_to_bias(mask))[:, 0]


def init_weights(module: nn.Module) -> None:
    """The start for `Module.apply`: linear weights N(0, 1 / fan-in), embeddings N(0, 1 / width), biases zero.

    BERT's 0.02 for every matrix suits a width of 768 and more; at 128 it starts attention so flat that reading is hardly learned.
    """
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
