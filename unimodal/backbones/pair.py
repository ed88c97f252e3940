"""A pretrained pair: the two towers of CLIP (arXiv 2103.00020), SigLIP (2303.15343) or SigLIP 2 (2502.14786), with their embeddings.

The towers, and how each model pools them, are transformers'. The bridge reads their tokens, projected to one width.

Legend: B images, M texts, L text length, T patches, C width of a tower, D width of the tokens, E width of an embedding.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, Siglip2Model, SiglipModel
from transformers.activations import QuickGELUActivation

from unimodal.backbones.base import Backbone, Pixels, Tokens
from unimodal.backbones.last import last_state
from unimodal.backbones.published import load_published
from unimodal.config import PublishedConfig
from unimodal.layers import QuickGELU, unit

CLASSES: dict[str, Any] = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model}


class PretrainedPair(Backbone):
    """Both towers of a published image-text pair.

    Args:
        config: which one.
        width: D; None leaves the towers' tokens as they are, for use without a bridge.
        pretrained: load the weights of its source.

    Raises:
        FileNotFoundError, ValueError: as `load_published`.
    """

    modalities = ("image", "text")
    offers = ("embedding",)
    parts = {"published": "model."}
    sees: tuple[str, ...] = (
        "image_projection.*",
        *(f"model.vision_model.{part}.*" for part in ("embeddings", "pre_layrnorm", "encoder")),
    )
    reads = (
        "text_projection.*",
        *(f"model.text_model.{part}.*" for part in ("embeddings", "encoder", "final_layer_norm")),
    )
    own: tuple[str, ...] = ("model.*projection.*", "model.*.head.*")

    def __init__(self, config: PublishedConfig, *, width: int | None, pretrained: bool = False) -> None:
        super().__init__()
        self.name = config.name
        self.model: Any
        self.model, self.sources = load_published(CLASSES[config.name], config, pretrained=pretrained)
        for layer in self.model.modules():
            if isinstance(getattr(layer, "activation_fn", None), QuickGELUActivation):
                layer.activation_fn = QuickGELU()
        settings = self.model.config
        image_width, text_width = settings.vision_config.hidden_size, settings.text_config.hidden_size
        after_tower = ("model.vision_model.post_layernorm.*",)  # SigLIP normalises all tokens, CLIP only what it pools
        if self.name == "clip":
            self.own = (*self.own, *after_tower)
        else:
            self.sees = (*self.sees, *after_tower)
        self.vocab_size = settings.text_config.vocab_size
        self.max_length = settings.text_config.max_position_embeddings
        self.embeds = settings.projection_dim if self.name == "clip" else settings.text_config.projection_size
        self.log_scale = self.model.logit_scale.item()
        self.bias = None if self.name == "clip" else self.model.logit_bias.item()
        self.prefix_tokens = 1 if self.name == "clip" else 0
        vision = settings.vision_config
        patches = vision.num_patches if self.name == "siglip2" else (vision.image_size // vision.patch_size) ** 2
        self.most_image_tokens = patches + self.prefix_tokens
        self.width = width or image_width
        self.projects = width is not None
        if width is not None:
            self.image_projection = nn.Sequential(nn.Linear(image_width, width), nn.LayerNorm(width))
            self.text_projection = nn.Sequential(nn.Linear(text_width, width), nn.LayerNorm(width))

    @property
    def text_width(self) -> int:
        return self.width if self.projects else self.model.config.text_config.hidden_size

    def tower(self, kind: str) -> tuple[str, ...]:
        """All that tokens depend on but our projection of them."""
        patterns = self.sees if kind == "image" else self.reads
        return tuple(pattern for pattern in patterns if pattern.startswith("model."))

    def random_pixels(self, count: int, generator: torch.Generator) -> Pixels:
        """[count, 3, S, S], or for NaFlex patches of square pictures, their mask and shapes."""
        vision = self.model.config.vision_config
        if self.name != "siglip2":
            return torch.randn(count, 3, vision.image_size, vision.image_size, generator=generator)
        side = math.isqrt(vision.num_patches)
        return {
            "pixel_values": torch.randn(count, side**2, 3 * vision.patch_size**2, generator=generator),
            "pixel_attention_mask": torch.ones(count, side**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * count),
        }

    def image_features(self, pixels: Pixels) -> Tensor:
        """Last hidden states [B, T, C] of the image tower: [B, 3, S, S], or the patches, mask and shapes of a NaFlex batch."""
        inputs = {"pixel_values": pixels} if isinstance(pixels, Tensor) else pixels
        return self.model.vision_model(**inputs).last_hidden_state

    def image_mask(self, pixels: Pixels) -> Tensor | None:
        """Which patches are real [B, T], for NaFlex."""
        return None if isinstance(pixels, Tensor) else pixels["pixel_attention_mask"].bool()

    def image_tokens(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """[B, T, C] -> [B, T, D]."""
        hidden = self.image_projection(features) if self.projects else features
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
        return Tokens(hidden, mask)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [M, L, C] of the text tower. SigLIP was trained without a mask: it reads its padding, too."""
        seen = mask.long() if self.name == "clip" else None
        return self.model.text_model(input_ids=ids, attention_mask=seen).last_hidden_state

    def text_tokens(self, features: Tensor, mask: Tensor) -> Tokens:
        """[M, L, C] -> [M, L, D]."""
        hidden = self.text_projection(features) if self.projects else features
        return Tokens(hidden, mask)

    def image_embedding(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """CLIP projects the class token, SigLIP pools by attention: [B, T, C] -> unit vectors [B, E]."""
        tower = self.model.vision_model
        if self.name == "clip":
            pooled = self.model.visual_projection(tower.post_layernorm(features[:, 0]))
        elif mask is None:
            pooled = tower.head(features)
        elif self.name == "siglip":  # transformers' head of the fixed resolution takes no mask
            head = tower.head
            pooled = head.attention(
                head.probe.expand(len(features), -1, -1), features, features, key_padding_mask=~mask
            )[0]
            pooled = (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
        else:
            pooled = tower.head(features, mask)
        return unit(pooled)

    def text_embedding(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """CLIP reads the end-of-text token, SigLIP the last position whatever it holds: [M, L, C] -> unit vectors [M, E]."""
        return self._project_text(features[torch.arange(len(ids)), self._pooled_place(ids)])

    def _pooled_place(self, ids: Tensor) -> Tensor:
        """Which token of each text its embedding is made of: [M, L] -> [M]."""
        if self.name != "clip":
            return torch.full_like(ids[:, 0], ids.shape[1] - 1)
        end = self.model.config.text_config.eos_token_id
        # Early configurations name another id; the end-of-text token then is the largest id of a text.
        return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)

    def _project_text(self, pooled: Tensor) -> Tensor:
        """[M, C] -> unit vectors [M, E]."""
        project = self.model.text_projection if self.name == "clip" else self.model.text_model.head
        return unit(project(pooled))

    def embed_images(self, pixels: Pixels) -> Tensor:
        """As `image_embedding`; what only other patches need in CLIP's last layer is left out. SigLIP pools all of them."""
        if self.name != "clip":
            return super().embed_images(pixels)
        tower = self.model.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        first = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        return self.image_embedding(last_state(tower, hidden, first, causal=False)[:, None], None)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As `text_embedding`; what only other tokens need in the last layer is left out. CLIP pads on the right, where no token looks."""
        tower = self.model.text_model
        state = last_state(tower, tower.embeddings(ids), self._pooled_place(ids), causal=self.name == "clip")
        return self._project_text(tower.final_layer_norm(state))
