"""The image tower of BLIP-2 (Li et al. 2023, arXiv 2301.12597), whose tokens its Q-Former reads as they are.

BLIP-2 has no text tower: texts are read by the bridge's own text branch, or by a language model behind it.

Legend: B images, S image side, T tokens (the class token, then the patches), D width of the tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Blip2Config, Blip2VisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2PreTrainedModel

from unimodal.backbones.base import Backbone, Pixels, Tokens
from unimodal.backbones.published import load_published
from unimodal.config import PublishedConfig


class Blip2Vision(Blip2PreTrainedModel):
    """Only the image tower of a published BLIP-2."""

    _keys_to_ignore_on_load_unexpected = [r"^(?!vision_model\.)"]

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.vision_model: Any = Blip2VisionModel._from_config(config.vision_config)
        self.post_init()


class Blip2Backbone(Backbone):
    """The image tower of a published BLIP-2; it reads no texts.

    The raw features are those before the last LayerNorm, which BLIP-2 trains while the rest of the tower is frozen.

    Args:
        config: which one.
        width: D; only None, or the tower's own width, since a BLIP-2 bridge reads the tokens as they are.
        pretrained: load the weights of its source.

    Raises:
        ValueError: for another width.
        FileNotFoundError, ValueError: as `load_published`.
    """

    modalities = ("image",)
    parts = {"published": "model."}
    sees: tuple[str, ...] = ("model.*",)
    prefix_tokens = 1

    def __init__(self, config: PublishedConfig, *, width: int | None, pretrained: bool = False) -> None:
        super().__init__()
        self.model: Any
        self.model, self.sources = load_published(Blip2Vision, config, pretrained=pretrained)
        settings = self.model.config
        vision = settings.vision_config
        self.width = vision.hidden_size
        self.most_image_tokens = (vision.image_size // vision.patch_size) ** 2 + self.prefix_tokens
        if width not in (None, self.width):
            raise ValueError(
                f"backbone.width: the tokens of this blip-2 are {self.width} wide and go to the bridge as they are, got {width}; "
                "set backbone.width to null"
            )
        reader = settings.qformer_config if settings.qformer_config.use_qformer_text_input else settings.text_config
        self.max_length = getattr(reader, "max_position_embeddings", None) or 512  # T5 counts no positions
        self.vocab_size = reader.vocab_size  # of the tokenizer that its authors release with it

    def random_pixels(self, count: int, generator: torch.Generator) -> Pixels:
        """[count, 3, S, S]."""
        side = self.model.config.vision_config.image_size
        return torch.randn(count, 3, side, side, generator=generator)

    def image_features(self, pixels: Pixels) -> Tensor:
        """[B, 3, S, S] -> [B, T, D], before the last LayerNorm."""
        tower = self.model.vision_model
        return tower.encoder(tower.embeddings(pixels)).last_hidden_state

    def image_tokens(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """[B, T, D] -> [B, T, D], normalised."""
        hidden = self.model.vision_model.post_layernorm(features)
        return Tokens(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool))
