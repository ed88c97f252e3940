"""A tower whose last layer reads on for one token of each item, the one that its embedding is made of.

The others still give it their keys and values, but do not ask, and do not go through the feed-forward part: of twelve squares of the width
that a layer multiplies a token with (query, key, value, output, and eight of the feed-forward part) they need two.

Legend: B items, T tokens, C width of the tower, H attention heads.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from unimodal.layers import attend, key_mask_to_bias


def last_state(tower: Any, hidden: Tensor, place: Tensor, *, causal: bool) -> Tensor:
    """The state [B, C] in which one token leaves the last layer.

    Args:
        tower: of a CLIP or SigLIP of transformers, without adapters in use: hooks on a layer expect all of its tokens.
        hidden: [B, T, C], what the first layer reads.
        place: of the token, [B].
        causal: whether no token looks to its right; all look at all others if not.
    """
    *lower, last = tower.encoder.layers
    given: dict[str, Any] = {"attention_mask": None}
    if causal:
        mask = create_causal_mask(config=tower.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        given = {"attention_mask": mask, "is_causal": True}
    for layer in lower:
        hidden = layer(hidden, **given)
    attention, normed = last.self_attn, last.layer_norm1(hidden)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, T, C] -> [B, H, T, C / H]

    rows = torch.arange(len(hidden), device=hidden.device)
    queries = split(attention.q_proj(normed[rows, place])[:, None])
    keys, values = split(attention.k_proj(normed)), split(attention.v_proj(normed))
    seen = torch.arange(hidden.shape[1], device=hidden.device) <= place[:, None] if causal else None
    mixed = attend(queries, keys, values, key_mask_to_bias(seen), 0.0).flatten(1)  # [B, C]
    state = hidden[rows, place] + attention.out_proj(mixed)
    return state + last.mlp(last.layer_norm2(state))
