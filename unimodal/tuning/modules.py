"""The tuning methods that peft does not have for arbitrary networks. Each sits beside a module that it leaves as it is, and changes what
that module reads or writes while one of its named adapters is in use.

Legend: B batch, T tokens, C width, P learned tokens, r width of a bottleneck.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKS = ("attention_mask", "attn_mask")
# Arguments of a block that say where its tokens stand, or keep them for the next call: more tokens would be out of step with them.
PLACES = ("position_embeddings", "rope", "cu_seqlens", "past_key_values")
START = 0.02  # standard deviation of a learned token before training


class Addition(nn.Module):
    """Named adapters beside one module, of which some are in use.

    Attributes:
        names: those in use.
    """

    names: tuple[str, ...] = ()
    adapters: Any

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Any] = []

    @property
    def in_use(self) -> list[Any]:
        return [self.adapters[name] for name in self.names if name in self.adapters]

    def detach(self) -> None:
        """Leave the module as it was."""
        for handle in self.handles:
            handle.remove()


class Bottlenecks(Addition):
    """What a layer writes, and a narrow network's correction of it (Houlsby et al. 2019, arXiv 1902.00751); none before training."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.width = layer.out_features
        self.adapters = nn.ModuleDict()
        self.handles = [layer.register_forward_hook(self.correct)]

    def add(self, name: str, r: int, dropout: float) -> None:
        up = nn.Linear(r, self.width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.adapters[name] = nn.Sequential(nn.Linear(self.width, r), nn.GELU(), nn.Dropout(dropout), up)

    def correct(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        for adapter in self.in_use:
            output = output + adapter(output.to(adapter[0].weight.dtype)).to(output.dtype)
        return output


class PromptTokens(Addition):
    """Learned tokens that a transformer block reads before its own and that leave with it, so that every block has its own
    (VPT-deep: Jia et al. 2022, arXiv 2203.12119)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.width = keys_of(block).in_features
        self.adapters = nn.ParameterDict()
        self.handles = [
            block.register_forward_pre_hook(self.insert, with_kwargs=True),
            block.register_forward_hook(self.remove),
        ]

    def add(self, name: str, tokens: int) -> None:
        self.adapters[name] = nn.Parameter(START * torch.randn(1, tokens, self.width))

    @property
    def count(self) -> int:
        """P, over all in use."""
        return sum(tokens.shape[1] for tokens in self.in_use)

    def tokens(self, hidden: Tensor) -> Tensor:
        """[B, P, C]."""
        return torch.cat([tokens.to(hidden.dtype).expand(len(hidden), -1, -1) for tokens in self.in_use], dim=1)

    def insert(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.in_use:
            return None
        named = not args
        hidden = kwargs["hidden_states"] if named else args[0]
        _require_plain_tokens(block, hidden, kwargs)
        longer = torch.cat([self.tokens(hidden), hidden], dim=1)  # [B, P + T, C]
        kwargs = {key: self._see_all(value) if key in MASKS else value for key, value in kwargs.items()}
        if named:
            return args, {**kwargs, "hidden_states": longer}
        return (longer, *(self._see_all(value) for value in args[1:])), kwargs

    def _see_all(self, mask: Any) -> Any:
        """A mask [B, T] or [B, 1, (1 or T), T] with the learned tokens in front, which everyone sees and which see everyone."""
        if not isinstance(mask, Tensor):
            return mask
        rows = self.count if mask.ndim == 4 and mask.shape[-2] > 1 else 0
        shown: Any = 0.0 if mask.is_floating_point() else True
        return F.pad(mask, (self.count, 0, rows, 0) if mask.ndim == 4 else (self.count, 0), value=shown)

    def remove(self, block: nn.Module, args: Any, output: Any) -> Any:
        if not self.in_use:
            return None
        return (output[0][:, self.count :], *output[1:]) if isinstance(output, tuple) else output[:, self.count :]


class PrefixTokens(PromptTokens):
    """Learned keys and values that an attention layer sees before those of its tokens (Li and Liang 2021, arXiv 2101.00190, without the
    network that they reparametrise them by in training)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        both = getattr(attention, "qkv", None)
        self.width = keys_of(attention).out_features // (1 if both is None else 3)
        if both is not None:
            self.handles.append(both.register_forward_hook(self.write_both))
        else:
            for write, names in ((self.write_keys, KEYS), (self.write_values, VALUES)):
                projection = next(getattr(attention, name) for name in names if hasattr(attention, name))
                self.handles.append(projection.register_forward_hook(write))

    def add(self, name: str, tokens: int) -> None:
        self.adapters[name] = nn.Parameter(START * torch.randn(2, tokens, self.width))  # keys, values

    @property
    def count(self) -> int:
        return sum(pair.shape[1] for pair in self.in_use)

    def tokens(self, hidden: Tensor) -> Tensor:
        """Places [B, P, C] for the projections to fill."""
        return hidden.new_zeros(len(hidden), self.count, hidden.shape[-1])

    def _write(self, output: Tensor, which: int) -> Tensor:
        """Learned rows [B, P, C] of keys (0) or values (1), then those of `output` [B, P + T, C] that belong to tokens."""
        rows = torch.cat([pair[which] for pair in self.in_use]).to(output.dtype)
        return torch.cat([rows.expand(len(output), -1, -1), output[:, self.count :]], dim=1)

    def write_keys(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._write(output, 0) if self.in_use else None

    def write_values(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._write(output, 1) if self.in_use else None

    def write_both(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.in_use:
            return None
        queries, keys, values = output.chunk(3, dim=-1)
        return torch.cat([queries, self._write(keys, 0), self._write(values, 1)], dim=-1)


KEYS, VALUES = ("qkv", "key", "k_proj"), ("qkv", "value", "v_proj")


def is_attention(module: nn.Module) -> bool:
    """Whether a module projects tokens to keys and values by linear layers of its own."""
    return all(
        any(isinstance(plain(getattr(module, name, None)), nn.Linear) for name in names) for names in (KEYS, VALUES)
    )


def plain(layer: Any) -> Any:
    """A layer without what peft wrapped around it."""
    return getattr(layer, "base_layer", layer)


def keys_of(module: nn.Module) -> Any:
    """The layer that makes the keys, in an attention layer or in a block that holds one."""
    attention = next(part for part in module.modules() if is_attention(part))
    return plain(next(getattr(attention, name) for name in KEYS if hasattr(attention, name)))


def _require_plain_tokens(block: nn.Module, hidden: Any, kwargs: dict[str, Any]) -> None:
    placed = [name for name in PLACES if kwargs.get(name) is not None]
    if placed or not isinstance(hidden, Tensor) or hidden.ndim != 3:
        found = f"reads {', '.join(placed)}" if placed else f"reads {list(getattr(hidden, 'shape', [type(hidden)]))}"
        raise ValueError(
            f"prompt and prefix tuning put tokens before those of a block, [B, T, C] without positions of their own, but "
            f"{type(block).__name__} {found}; tune it with lora, dora, ia3, layer_norm or bottleneck"
        )
