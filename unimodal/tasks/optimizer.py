"""The optimizer: AdamW, or Muon for the hidden matrices and AdamW for the rest.

Muon orthogonalises the momentum of every hidden matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"). At
the update size of AdamW (Liu et al. 2025, arXiv 2502.16982) one learning rate could
serve both; narrow models trained briefly learn faster with a few times more.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unimodal.sharding import cut_like, replicate


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How a stage steps.

    Args:
        muon: factor of the rate of the hidden matrices and convolutions, which Muon then steps; 0 leaves them to AdamW, as embeddings,
            query sets and vectors always are.
        lr: peak learning rate; a stage's factors multiply it per parameter.
        weight_decay: decay of matrices; vectors (biases, norms, scales) and query sets have none.
        betas: of Adam.
        warmup: share of the stage's steps in which the rate rises from 0.
        decay: shape of the fall after it.
    """

    muon: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.05
    decay: Literal["cosine", "linear", "constant"] = "cosine"

    def rate(self, progress: float) -> float:
        """Factor of the peak rate at `progress` (0 to 1) through the stage."""
        if progress < self.warmup:
            return progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}[self.decay]


class HiddenMuon(torch.optim.Optimizer):
    """Muon for matrices and for kernels [O, I, h, w], which it steps as the matrices [O, I h w] that they are applied as.

    Of a sharded matrix every process puts gradient and momentum together, orthogonalises them whole and steps its own part.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        matrix = parameter.detach().view(len(parameter), -1)  # a view: Muon moves the parameter itself
        matrix.grad = replicate(parameter.grad).view(matrix.shape)  # type: ignore[arg-type]
        muon = torch.optim.Muon([{**group, "params": [matrix]}], adjust_lr_fn="match_rms_adamw")
        if own := self.state[parameter]:
            muon.state[matrix]["momentum_buffer"] = replicate(own["momentum_buffer"]).view(matrix.shape)
        muon.step()
        momentum = muon.state[matrix]["momentum_buffer"].view(parameter.shape)
        own["momentum_buffer"] = cut_like(momentum, parameter)


class Together(torch.optim.Optimizer):
    """Several optimizers that step as one, with one state by parameter: what Lightning, schedulers and sharded checkpoints take."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()  # loading made new ones


def build_optimizer(model: nn.Module, factors: dict[str, float], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of the parameters that require a gradient; `factors` multiply the rate by parameter name."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[bool, float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and "query_sets" not in name and ".ia3_l." not in name
            hidden = settings.muon > 0 and decays and parameter.ndim in (2, 4) and parameter not in embeddings
            groups.setdefault((hidden, factors[name], decays), []).append(parameter)

    def rows(hidden: bool) -> list[dict[str, Any]]:
        return [
            {
                "params": parameters,
                "lr": settings.lr * factor * (settings.muon if hidden else 1),
                "weight_decay": settings.weight_decay * decays,
            }
            for (is_hidden, factor, decays), parameters in groups.items()
            if is_hidden == hidden
        ]

    parts: list[torch.optim.Optimizer] = []
    if rows(True):
        parts.append(HiddenMuon(rows(True)))
    if rows(False):
        parts.append(torch.optim.AdamW(rows(False), betas=settings.betas))
    return Together(parts)
