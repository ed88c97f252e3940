"""Losses of the generation branch: regress the velocity of a flow, and regress the bridge onto a text encoder.

Flow matching: Lipman et al. 2023 (arXiv 2210.02747), Liu et al. 2023 (rectified flow, arXiv 2209.03003); the path
itself lives in `unimodal.diffusion`. Conditioning: OmniBridge trains its generation queries by regression onto the
states of the text encoder that conditions the image generator.
Legend: B batch, C channels, H x W pixels, N queries, D width.
"""

import torch.nn.functional as F
from torch import Tensor

from unimodal.layers import at_least_float32
from unimodal.losses.numerics import mean_over_real


def flow_matching_loss(velocity_prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity; a scalar.

    | Inputs              | Shape            | Meaning                                                              |
    |---------------------|------------------|----------------------------------------------------------------------|
    | velocity_prediction | [B, C, H, W]     | what the generator predicts at x_t                                   |
    | target              | [B, C, H, W]     | the velocity of the path, noise minus data                           |
    | weight              | [B], default ones| multiplies the error of each sample; not normalised                  |

    Raises ValueError if the shapes differ (broadcasting would hide it), or weight is not one number per sample.
    """
    _require_same_shape(velocity_prediction, target)
    error = F.mse_loss(at_least_float32(velocity_prediction), at_least_float32(target), reduction="none")
    error = error.flatten(1).mean(dim=1)  # [B]
    if weight is None:
        return error.mean()
    if weight.shape != error.shape:
        raise ValueError(
            f"Got weight {tuple(weight.shape)} for velocities {tuple(target.shape)}; expected one per sample."
        )
    return (weight * error).mean()


def conditioning_loss(bridge_output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error between what the bridge gives the generator and what a text encoder would give it; a scalar.

    | Inputs        | Shape     | Meaning                                                                |
    |---------------|-----------|------------------------------------------------------------------------|
    | bridge_output | [B, N, D] | generation queries after the bridge                                    |
    | target        | [B, N, D] | states of the frozen text encoder; the caller detaches them            |
    | mask          | [B, N]    | True where the target is the state of a real token                     |

    Every real position of the global batch weighs the same.
    Raises ValueError on shapes that do not fit, and if no position is real.
    """
    _require_same_shape(bridge_output, target)
    if mask.shape != target.shape[:2]:
        raise ValueError(
            f"Got mask {tuple(mask.shape)} for states {tuple(target.shape)}; expected [B, N] and [B, N, D]."
        )
    error = F.mse_loss(at_least_float32(bridge_output), at_least_float32(target), reduction="none").mean(
        dim=-1
    )  # [B, N]
    return mean_over_real(error.masked_fill(~mask, 0).sum(), mask)


def _require_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"Got a prediction {tuple(prediction.shape)} and a target {tuple(target.shape)}; expected equal shapes."
        )
