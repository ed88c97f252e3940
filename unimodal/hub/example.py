"""A stored input and what the model made of it, so that anyone can see that a checkpoint still computes the same.

Legend: 2 images, 2 texts of different length.
"""

from typing import Protocol

import torch
from torch import Tensor

from unimodal.model import UnimodalModel

TEXTS = ["a small red circle is left of a large blue square.", "a dog runs."]
CAPTION_TOKENS = 12


class Reader(Protocol):
    """Texts -> ids and mask: `unimodal.data.Processor`."""

    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]: ...


def example_inputs(model: UnimodalModel, processor: Reader) -> dict[str, Tensor]:
    """Fixed inputs: pixels [2, 3, S, S] or the named tensors that stand for them, ids and mask [2, L], and, where the model draws, noise
    [2, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    pixels = model.backbone.random_pixels(2, generator)
    named = (
        {"pixels": pixels} if isinstance(pixels, Tensor) else {f"pixels.{name}": part for name, part in pixels.items()}
    )
    ids, mask = processor.texts(TEXTS)
    inputs = {**named, "ids": ids, "mask": mask}
    if "generation" in model.heads:
        inputs["noise"] = torch.randn(2, *model.head("generation").latent_shape, generator=generator)
    return inputs


@torch.no_grad()
def example_outputs(model: UnimodalModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each head of the model makes of the inputs, in evaluation mode, on the CPU."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in inputs.items()}
    named = {name.removeprefix("pixels."): part for name, part in inputs.items() if name.startswith("pixels.")}
    pixels = named or inputs["pixels"]
    image = model.encode_image(pixels)
    text = model.encode_text(inputs["ids"], inputs["mask"])
    outputs = {}
    if "embedding" in model.jobs:
        outputs = {"image_embedding": model.image_embedding(image), "text_embedding": model.text_embedding(text)}
    if model.matcher is not None:
        outputs["match"] = model.matcher.probe(model, pixels, image, text)
    if model.captioner is not None:
        outputs |= model.captioner.example(model, pixels, image, CAPTION_TOKENS)
    if "generation" in model.heads:
        half = torch.full((2,), 0.5, device=inputs["ids"].device)
        outputs["velocity"] = model.head("generation")(inputs["noise"], half, model.generation_condition(text))
    for module, mode in modes.items():
        module.training = mode
    return {name: tensor.cpu().contiguous() for name, tensor in outputs.items()}


def differences(stored: dict[str, Tensor], replayed: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference per output, on the scale of its largest stored value where that is above 1; infinite
    where captions differ."""
    found = {}
    for name, before in stored.items():
        now = replayed[name]
        if not before.is_floating_point():
            found[name] = 0.0 if torch.equal(before, now) else float("inf")
        else:
            found[name] = ((before - now).abs().max() / before.abs().max().clamp(min=1)).item()
    return found
