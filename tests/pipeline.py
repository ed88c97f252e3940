"""diffusers' own pipeline around the network of a generation head: the second implementation that sampling is compared with."""

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from unimodal.heads.generation import GenerationHead


class Scheduler(FlowMatchEulerDiscreteScheduler):
    """With what this pipeline asks of older schedulers; a flow starts at noise of variance 1 and scales nothing."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def pipeline_of(head: GenerationHead) -> StableDiffusionPipeline:
    """A pipeline with the network of a U-Net head alone: texts are read and latents decoded elsewhere."""
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=head.transformer.network, scheduler=Scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def pipeline_pictures(
    pipeline: StableDiffusionPipeline, head: GenerationHead, condition: Tensor, noise: Tensor, steps: int, scale: float
) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] of conditions [B, N, W], from noise [B, 3, S, S]."""
    normed = head.transformer.condition_norm
    folded = pipeline(
        prompt_embeds=normed(condition),
        negative_prompt_embeds=normed(head.null_condition.expand_as(condition)),
        latents=F.pixel_unshuffle(noise, head.transformer.patch_size),
        sigmas=[1 - i / steps for i in range(steps)],
        guidance_scale=scale,
        output_type="latent",
    ).images
    return (F.pixel_shuffle(folded, head.transformer.patch_size) / 2 + 0.5).clamp(0, 1)
