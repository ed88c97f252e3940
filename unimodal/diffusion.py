"""Flow matching: the straight path from a picture to noise, and the walk back.

A network learns the velocity of the path x_t = (1 - t) x + t n between a clean picture x (t = 0) and Gaussian noise n
(t = 1); a picture is made by starting at noise and following the velocity down to t = 0. Nothing here knows a network,
a condition or a latent space.

Sources: flow matching, Lipman et al. 2023 (arXiv 2210.02747); rectified flow, Liu et al. 2023 (arXiv 2209.03003);
logit-normal times, Esser et al. 2024 (arXiv 2403.03206); predicting the clean sample under a velocity loss, Li and He
2025 (arXiv 2511.13720); guidance, Ho and Salimans 2022 (arXiv 2207.12598).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

T_MIN = 0.05  # below this time a picture is as good as clean; dividing by t there would only amplify errors


def flow_path(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A point on the path from picture to noise, and the velocity there.

    Args:
        x: clean pictures or latents [B, ...].
        noise: Gaussian noise of the same shape.
        t: times [B] in [0, 1].

    Returns:
        x_t = (1 - t) x + t n, and the velocity d x_t / dt = n - x, which does not depend on t.
    """
    if x.shape != noise.shape or t.shape != x.shape[:1]:
        raise ValueError(
            f"flow_path: pictures {tuple(x.shape)} need noise of the same shape and one time each, "
            f"got noise {tuple(noise.shape)} and times {tuple(t.shape)}"
        )
    t = t.view(-1, *[1] * (x.ndim - 1))
    return (1 - t) * x + t * noise, noise - x


def sample_t(
    batch: int,
    *,
    distribution: Literal["logit_normal", "uniform"] = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Training times [B] in [T_MIN, 1]: sigmoid of a normal variable, or uniform.

    A positive `mean` trains more on noisy pictures, where layout is decided; a negative one on nearly clean ones.
    """
    if distribution == "logit_normal":
        t = torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=device))
    elif distribution == "uniform":
        t = torch.rand(batch, generator=generator, device=device)
    else:
        raise ValueError(f"sample_t: distribution must be 'logit_normal' or 'uniform', got {distribution!r}")
    return t.clamp(min=T_MIN)


def velocity_from_sample(x_t: Tensor, sample: Tensor, t: Tensor) -> Tensor:
    """The velocity that leads from x_t [B, ...] straight to a predicted clean sample: (x_t - x) / max(t, T_MIN).

    On x_t = (1 - t) x + t n with t >= T_MIN and the true x this is n - x. A squared error on it is one on x, weighted
    by 1 / max(t, T_MIN)^2.
    """
    return (x_t - sample) / t.clamp(min=T_MIN).view(-1, *[1] * (x_t.ndim - 1))


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: from the unconditional prediction to the conditional one and, for scale > 1, beyond."""
    return unconditional + scale * (conditional - unconditional)


def euler_sample(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, *, num_inference_steps: int, shift: float = 1.0
) -> Tensor:
    """Follow the velocity from noise (t = 1) to a picture (t = 0).

    Args:
        velocity: (x_t [B, ...], t [B]) -> velocity [B, ...].
        noise: starting point [B, ...].
        num_inference_steps: Euler steps, each one call of `velocity`.
        shift: > 1 spends more of the steps near the noise: t -> shift t / (1 + (shift - 1) t).
    """
    if num_inference_steps < 1:
        raise ValueError(f"euler_sample: num_inference_steps must be at least 1, got {num_inference_steps}")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    # Our own times 1, ..., 1/n: the scheduler's default ones end at 1/1000, so that its last step would move nothing.
    times = [1 - i / num_inference_steps for i in range(num_inference_steps)]
    scheduler.set_timesteps(sigmas=times, device=noise.device)

    x = noise
    for timestep in scheduler.timesteps:
        t = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
        x = scheduler.step(velocity(x, t), timestep, x).prev_sample
    return x
