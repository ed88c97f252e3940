"""Pictures from bridged generation queries: a diffusers transformer learns the flow from noise to picture.

The bridge's queries take the place of a text encoder's tokens (MetaQuery, arXiv 2504.06256; OmniBridge, arXiv
2509.19018). The denoiser is Sana (linear attention and convolutional feed-forward, arXiv 2410.10629), PixArt (full
attention, arXiv 2310.00426) or a convolutional U-Net (`unimodal.heads.unet`); it works on latents of a frozen autoencoder
or directly on pixels. Names stand for classes by the two tables below, never by an import path.
"""

import contextlib
import inspect
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, PixArtTransformer2DModel, SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unimodal.config import nearest
from unimodal.diffusion import euler_sample, guide, velocity_from_sample
from unimodal.draws import Generators, one_each
from unimodal.heads.patches import PatchAutoencoder
from unimodal.heads.unet import UNet

TRANSFORMERS = {"sana": SanaTransformer2DModel, "pixart": PixArtTransformer2DModel, "unet": UNet}
AUTOENCODERS = {"patches": PatchAutoencoder, "tiny": AutoencoderTiny, "kl": AutoencoderKL}


class GenerationHead(nn.Module):
    """Velocity network, autoencoder and sampler.

    Args:
        condition_width: width W of the condition tokens.
        size: side of the pictures in pixels.
        transformer: `sana`, `pixart` or `unet`.
        transformer_kwargs: its settings as diffusers names them. `num_layers`, `num_attention_heads`,
            `attention_head_dim` and `patch_size` mean the same in sana and pixart; `UNet` says what the U-Net takes.
            Channels, picture size and widths of the condition follow from the other arguments.
        autoencoder: `none` works on pixels; `patches` on their whitened components, which `head.autoencoder.fit(images)`
            computes before training; `tiny` and `kl` on latents of diffusers' autoencoders. It never trains here.
        autoencoder_kwargs: its settings, as diffusers or `PatchAutoencoder` name them.
        prediction: whether the network outputs the `velocity`, or the clean `sample` from which the velocity is
            computed. A network narrower than one patch has numbers cannot pass noise through, so that it can learn the
            second and not the first (arXiv 2511.13720).
        null_probability: share of training conditions that the learned null condition replaces, so that guidance has
            something to guide away from; 0 trains no null condition.
    """

    def __init__(
        self,
        *,
        condition_width: int,
        size: int = 32,
        transformer: Literal["sana", "pixart", "unet"] = "sana",
        transformer_kwargs: dict[str, Any] | None = None,
        autoencoder: Literal["none", "patches", "tiny", "kl"] = "none",
        autoencoder_kwargs: dict[str, Any] | None = None,
        prediction: Literal["velocity", "sample"] = "velocity",
        null_probability: float = 0.1,
    ):
        super().__init__()
        self.size, self.prediction, self.null_probability = size, prediction, null_probability
        self.condition_width = condition_width
        self.autoencoder = None
        self.latent_shape: tuple[int, ...] = (3, size, size)
        if autoencoder != "none":
            self.autoencoder = _build(AUTOENCODERS, "autoencoder", autoencoder, autoencoder_kwargs or {}, {})
            self.autoencoder.requires_grad_(False).eval()
            if isinstance(self.autoencoder, PatchAutoencoder):
                self.latent_shape = self.autoencoder.latent_shape(size)
            else:
                self.latent_shape = tuple(self.encode(torch.zeros(1, 3, size, size)).shape[1:])

        self.transformer = _build_transformer(transformer, transformer_kwargs or {}, self.latent_shape, condition_width)
        # The first prediction is zero: diffusers' random last layer would start from noise instead.
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        self.null_condition = nn.Parameter(0.02 * torch.randn(condition_width)) if null_probability else None

    @property
    def needs_fit(self) -> bool:
        """Whether the autoencoder still has to see pictures (`autoencoder.fit`) before anything can be learned."""
        return isinstance(self.autoencoder, PatchAutoencoder) and not bool(self.autoencoder.deviation.all())

    def train(self, mode: bool = True) -> "GenerationHead":
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Predicted velocity at x_t; in training mode the null condition replaces a random share of the conditions.

        Args:
            x_t: noisy pixels or latents [B, C, H, W].
            t: times [B], 0 = clean, 1 = noise.
            condition: condition tokens [B, N, W].
            condition_mask: bool [B, N], True = real token; None = all real.
        """
        if x_t.shape[1:] != self.latent_shape:
            raise ValueError(
                f"GenerationHead: expected x_t [B, {', '.join(map(str, self.latent_shape))}], got {tuple(x_t.shape)}; "
                "bring pictures to that form with encode()"
            )
        self._require_condition(condition)
        if self.training and self.null_condition is not None:
            dropped = torch.rand(len(condition), 1, 1, device=condition.device) < self.null_probability
            condition = torch.where(dropped, self.null_condition, condition)
        return self._velocity(x_t, t, condition, condition_mask)

    def _require_condition(self, condition: Tensor) -> None:
        if condition.ndim != 3 or condition.shape[-1] != self.condition_width:
            raise ValueError(
                f"GenerationHead: expected condition tokens [B, N, {self.condition_width}], got {tuple(condition.shape)}; "
                "give what `generation_condition` of the same model returns"
            )

    def _velocity(self, x_t: Tensor, t: Tensor, condition: Tensor, condition_mask: Tensor | None) -> Tensor:
        # PixArt insists on being told that there is no resolution or aspect ratio to condition on.
        sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        with _attention_kernel(x_t.device):
            output = self.transformer(
                x_t,
                encoder_hidden_states=condition,
                timestep=1000 * t,
                encoder_attention_mask=condition_mask,
                **(sizes if isinstance(self.transformer, PixArtTransformer2DModel) else {}),
            ).sample.to(x_t.dtype)
        return velocity_from_sample(x_t, output, t) if self.prediction == "sample" else output

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> what the flow runs on [B, C, H, W]: pixels or (mean) latents."""
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"GenerationHead: expected images [B, 3, {self.size}, {self.size}] in [-1, 1], "
                f"got {tuple(images.shape)}; resize them first"
            )
        if self.autoencoder is None:
            return images
        encoded = self.autoencoder.encode(images)
        if isinstance(self.autoencoder, PatchAutoencoder):
            return encoded
        latents = encoded.latents if isinstance(self.autoencoder, AutoencoderTiny) else encoded.latent_dist.mode()
        return (latents - (self.autoencoder.config.shift_factor or 0)) * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`: [B, C, H, W] -> pictures [B, 3, S, S], about [-1, 1]."""
        if self.autoencoder is None:
            return latents
        if isinstance(self.autoencoder, PatchAutoencoder):
            return self.autoencoder.decode(latents)
        latents = latents / self.autoencoder.config.scaling_factor + (self.autoencoder.config.shift_factor or 0)
        return self.autoencoder.decode(latents).sample

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        shift: float = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Pictures [B, 3, S, S] in [0, 1] for condition tokens [B, N, W].

        Args:
            condition_mask: bool [B, N], True = real token; None = all real.
            num_inference_steps: Euler steps.
            guidance_scale: 1 follows the condition as learned; more exaggerates it, at twice the cost.
            shift: > 1 spends more steps near the noise.
            generator: source of the noise, which pictures draw one after another, or a source for each picture; the same seed on the same
                device gives the same pictures.
        """
        self._require_condition(condition)
        count = len(condition)
        if guidance_scale != 1 and self.null_condition is None:
            raise ValueError(
                f"GenerationHead: guidance_scale={guidance_scale} needs a null condition, and this head was built with "
                "null_probability=0; use guidance_scale=1, or train with null_probability=0.1"
            )

        guided = guidance_scale != 1
        if guided and self.null_condition is not None:  # one call of 2 B rows is cheaper than two of B
            condition = torch.cat([condition, self.null_condition.expand_as(condition)])
            condition_mask = None if condition_mask is None else condition_mask.repeat(2, 1)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if not guided:
                return self._velocity(x, t, condition, condition_mask)
            both = self._velocity(x.repeat(2, 1, 1, 1), t.repeat(2), condition, condition_mask)
            conditional, unconditional = both.chunk(2)
            return guide(conditional, unconditional, guidance_scale)

        # Each picture's noise by itself, so that it does not depend on the batch; on the generator's own device, so that a seed of the CPU
        # means the same picture on a GPU.
        noise = [
            torch.randn(self.latent_shape, generator=one, device=condition.device if one is None else one.device)
            for one in one_each(generator, count)
        ]
        start = torch.stack([each.to(condition.device) for each in noise])
        latents = euler_sample(velocity, start, num_inference_steps=num_inference_steps, shift=shift)
        return (self.decode(latents) / 2 + 0.5).clamp(0, 1)


def _build(table: dict[str, Any], role: str, name: str, settings: dict[str, Any], given: dict[str, Any]) -> Any:
    """The class that `table` holds under `name`, built from `settings`, with `given` settled by us."""
    if name not in table:
        raise ValueError(f"GenerationHead: unknown {role} {name!r}; {nearest(name, table)}")
    known = inspect.signature(table[name].__init__).parameters.keys() - {"self"} - given.keys()
    for key in settings:
        if key not in known:
            raise ValueError(f"GenerationHead: unknown setting {key!r} of {role} {name!r}; {nearest(key, known)}")
    return table[name](**settings, **given)


def _build_transformer(name: str, settings: dict[str, Any], latent_shape: tuple[int, ...], condition_width: int) -> Any:
    if name == "unet":
        given = {"channels": latent_shape[0], "sample_size": latent_shape[1], "condition_width": condition_width}
        return _build(TRANSFORMERS, "transformer", name, settings, given)
    settings = {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32, "patch_size": 2, **settings}
    channels, side, _ = latent_shape
    if side % settings["patch_size"]:
        raise ValueError(
            f"GenerationHead: patch_size {settings['patch_size']} does not divide the side {side} of what it cuts up"
        )
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    given = {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": side,
        "caption_channels": condition_width,
        "cross_attention_dim": width,
    }
    if name == "sana":
        # This switches on the sine-cosine positions: few patches with no place of their own know no left and right.
        settings = {
            "num_cross_attention_heads": settings["num_attention_heads"],
            "cross_attention_head_dim": settings["attention_head_dim"],
            "interpolation_scale": 1,
            **settings,
        }
    return _build(TRANSFORMERS, "transformer", name, settings, given)


def _attention_kernel(device: torch.device) -> contextlib.AbstractContextManager:
    """Fused attention; plain matrix products under autocast on a CPU, whose fused bfloat16 kernel is far slower."""
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
