"""Weight merging: the average of models that were trained from each other.

Models fine-tuned from one start lie in one valley of the loss, and the average of their weights is often better than
each at what the others are good at: Wortsman et al. 2022 (model soups, arXiv 2203.05482). Qwen3-VL-Embedding (arXiv
2601.04720) merges the model before and the one after distillation.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def merge_weights(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of state dicts, tensor by tensor, summed in float64.

    Args:
        states: at least one, all with the same names, shapes and kinds of numbers.
        weights: one per state, none negative; only their ratios count. Integers (a count of batches, for example) cannot
            be averaged and are those of the state with the largest weight, the first of equals.

    Raises:
        ValueError: for weights that do not fit, or states of unlike models; every tensor that differs is named.
    """
    if not states or len(weights) != len(states) or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(
            f"Got {len(states)} states and weights {list(weights)}; expected one weight per state, none negative, not all zero."
        )
    first = states[0]
    for number, state in enumerate(states[1:], start=2):
        shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in (first, state)]
        differ = [name for name in sorted(shapes[0] | shapes[1]) if shapes[0].get(name) != shapes[1].get(name)]
        if differ:
            told = "; ".join(
                f"{name} {shapes[0].get(name, 'absent')} and {shapes[1].get(name, 'absent')}" for name in differ[:5]
            )
            raise ValueError(
                f"States 1 and {number} are of unlike models: {len(differ)} tensors differ: {told}. Merge only models of one "
                "configuration."
            )
    largest = states[max(range(len(states)), key=lambda k: weights[k])]
    total = sum(weights)
    out = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            out[name] = largest[name].clone()
            continue
        mean = torch.zeros_like(tensor, dtype=torch.float64)
        for state, weight in zip(states, weights):
            mean += state[name].double() * (weight / total)
        out[name] = mean.to(tensor.dtype)
    return out
