"""Two towers: any timm image encoder beside any transformers text encoder, each projected to the common token width D.

A second image tower may stand beside the first: it sees the same pixels, and its channels are set beside the first's at every place of the
same grid. The towers may have an embedding of their own, as a dual encoder has (VSE++, Faghri et al. 2018, arXiv 1707.05612).

Convolutional feature maps carry no position, so a fixed two-dimensional sine-cosine position (as in MAE, arXiv 2111.06377) is
added to them.

Legend: B batch, C tower width, T tokens, D backbone width, E embedding width.
"""

import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from unimodal.backbones.base import Backbone, Pixels, Tokens
from unimodal.backbones.published import sha256
from unimodal.config import TextTowerConfig, TowerEmbeddingConfig, VisionTowerConfig
from unimodal.layers import init_weights, masked_mean, unit

CLASSIFIER_PREFIXES = ("classifier.", "head.", "head_drop.", "fc.", "fc_norm.")


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed positions [height * width, dim]: a quarter each of sine and cosine of the row and of the column."""
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine position needs a width divisible by 4, got {dim}")
    frequency = torch.exp(-math.log(10000.0) * torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1)


class TwoTowers(Backbone):
    """A timm image tower and a transformers text tower.

    Args:
        width: common token width D.
        vision: the image tower's configuration.
        text: the text tower's configuration.
        beside: a second image tower's.
        embedding: what the towers' own embedding is; None has none.
        pretrained: load the towers' first weights from their `source`; otherwise they start from random numbers.

    Raises:
        ValueError: for an unknown architecture, weights that do not fit it (the report lists every name), or image towers that do not
            see the same pixels or leave the same grid.
    """

    modalities = ("image", "text")
    sees, reads, own = ("vision*", "beside*", "image*"), ("text*",), ("embed_*",)
    image_positions: Tensor

    def __init__(
        self,
        *,
        width: int,
        vision: VisionTowerConfig,
        text: TextTowerConfig,
        beside: VisionTowerConfig | None = None,
        embedding: TowerEmbeddingConfig | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.parts = {part: f"{part}." for part in ("vision", *(() if beside is None else ("beside",)), "text")}
        self.image_size = vision.image_size
        self.levels = [("vision", vision.stage, vision.also)]
        self.max_length = text.max_length
        self.sources = {}
        self.vision = self._build_vision("vision", vision, pretrained)
        second: Any = None if beside is None else self._build_vision("beside", beside, pretrained)
        self.beside = second
        self.text = self._build_text(text, pretrained)
        self.vocab_size = self.text.config.vocab_size
        self.prefix_tokens = getattr(self.vision, "num_prefix_tokens", 0)
        with torch.no_grad():
            pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
            features, grid = _vision_map(self.vision.eval(), *self.levels[0], pixels)
            self.vision.train()
            self.vision_width = features.shape[-1]
            if beside is not None:
                self.levels.append(("beside", beside.stage, beside.also))
                same = [(tower.image_size, tower.mean, tower.std) for tower in (vision, beside)]
                others, places = _vision_map(second.eval(), *self.levels[1], pixels)
                second.train()
                if same[0] != same[1] or places != grid or others.shape[1] != features.shape[1]:
                    raise ValueError(
                        f"backbone.beside: {beside.name} leaves {others.shape[1]} places of pixels {same[1]}, {vision.name} "
                        f"{features.shape[1]} of {same[0]} (size, mean, std); the two see the same pixels and need the same grid: give "
                        "both the same image_size, mean and std, and towers, or stages, of the same stride"
                    )
                self.vision_width += others.shape[-1]
        self.most_image_tokens, self.placed = features.shape[1], grid is not None
        positions = sincos_positions(*grid, width) if grid else torch.zeros(features.shape[1], width)
        self.register_buffer("image_positions", positions, persistent=False)
        self.vision_projection = nn.Sequential(nn.LayerNorm(self.vision_width), nn.Linear(self.vision_width, width))
        self.text_projection = nn.Sequential(
            nn.LayerNorm(self.text.config.hidden_size), nn.Linear(self.text.config.hidden_size, width)
        )
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        if embedding is not None:
            self.embeds, self.pool = embedding.dim, embedding.pool
            pooled = self.vision_width * (2 if embedding.pool == "mean_gem" else 1)
            self.embed_image = nn.Sequential(
                nn.LayerNorm(pooled),
                nn.Dropout(embedding.dropout / 2),
                nn.Linear(pooled, embedding.hidden),
                nn.GELU(),
                nn.LayerNorm(embedding.hidden),
                nn.Dropout(embedding.dropout),
                nn.Linear(embedding.hidden, embedding.dim),
            )
            self.embed_text = nn.Linear(self.text.config.hidden_size, embedding.dim)
            for part in (self.embed_image, self.embed_text):
                part.apply(init_weights)

    def _build_vision(self, part: str, config: VisionTowerConfig, pretrained: bool) -> Any:
        if not timm.is_model(config.name):
            near = timm.list_models(f"*{config.name.split('_')[0]}*")[:8]
            raise ValueError(
                f"vision tower {config.name!r} is not a timm architecture; near it: {', '.join(near) or 'none'}"
            )
        tower: Any = timm.create_model(config.name, num_classes=0, **config.kwargs)
        if pretrained and config.source:
            path = config.source
            if not Path(path).exists():
                path = hf_hub_download(config.source, "model.safetensors", revision=config.revision)
            weights = {
                name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()
            }
            result = tower.load_state_dict(weights, strict=False)
            unexpected = [name for name in result.unexpected_keys if not name.startswith(CLASSIFIER_PREFIXES)]
            if result.missing_keys or unexpected:
                raise ValueError(
                    f"{config.source} does not hold the weights of timm {config.name!r}: "
                    f"missing {result.missing_keys}, unexpected {unexpected}; give the source of the same architecture"
                )
            self.sources[part] = {"source": config.source, "revision": config.revision, "sha256": sha256(path)}
        if config.stage is not None:
            tower.prune_intermediate_layers([config.stage], prune_norm=True, prune_head=True)
        return tower

    def _build_text(self, config: TextTowerConfig, pretrained: bool) -> Any:
        if pretrained and config.source:
            tower = AutoModel.from_pretrained(
                config.source, revision=config.revision, dtype=torch.float32, use_safetensors=True
            )
            folder = Path(config.source)
            weights = folder / "model.safetensors"
            if not folder.is_dir():
                weights = Path(hf_hub_download(config.source, "model.safetensors", revision=config.revision))
            self.sources["text"] = {"source": config.source, "revision": config.revision, "sha256": sha256(weights)}
        else:
            tower = AutoModel.from_config(AutoConfig.for_model(config.name, **config.kwargs))
        # Captions are short: plain attention is as fast as the fused kernel, and several times faster in bfloat16 on a CPU.
        tower.set_attn_implementation("eager")
        tower.pooler = None  # the bridge reads tokens; a pooler would be a parameter without gradient
        return tower

    def tower(self, kind: str) -> tuple[str, ...]:
        """Images have one tower or two, and texts another."""
        return ("text.*",) if kind == "text" else ("vision.*", "beside.*")

    def random_pixels(self, count: int, generator: torch.Generator) -> Pixels:
        """[count, 3, S, S]."""
        return torch.randn(count, 3, self.image_size, self.image_size, generator=generator)

    def image_features(self, pixels: Pixels) -> Tensor:
        """Raw tokens [B, T, C] of the image tower, the second's channels after the first's."""
        assert isinstance(pixels, Tensor)
        towers = [self.vision] if self.beside is None else [self.vision, self.beside]
        maps = [_vision_map(tower, *level, pixels)[0] for tower, level in zip(towers, self.levels, strict=True)]
        return torch.cat(maps, dim=-1)

    def image_tokens(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Project raw image tokens [B, T, C] to [B, T, D]."""
        if features.shape[1:] != (len(self.image_positions), self.vision_width):
            raise ValueError(
                f"image features have shape {tuple(features.shape)}, expected [B, {len(self.image_positions)}, {self.vision_width}]; "
                "rebuild the feature cache with this backbone"
            )
        hidden = self.image_norm(self.vision_projection(features)) + self.image_positions
        return Tokens(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool))

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw tokens [M, L, C] of the text tower."""
        return self.text(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def text_tokens(self, features: Tensor, mask: Tensor) -> Tokens:
        """Project raw text tokens [M, L, C] to [M, L, D]."""
        hidden = self.text_norm(self.text_projection(features))
        return Tokens(hidden, mask)

    def image_embedding(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Raw image tokens, pooled and projected: [B, T, C] -> unit vectors [B, E]."""
        pooled = features.mean(1)
        if self.pool == "mean_gem":
            cubes = features.float().clamp(min=1e-4) ** 3  # a root has no slope at 0
            pooled = torch.cat([pooled, cubes.mean(1).pow(1 / 3).to(pooled.dtype)], dim=-1)  # [B, 2C]
        return unit(self.embed_image(pooled))

    def text_embedding(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean of raw text tokens, of norm 1, projected: [M, L, C] -> unit vectors [M, E]."""
        return unit(self.embed_text(F.normalize(masked_mean(features, mask), dim=-1)))


def _vision_map(
    tower: Any, part: str, stage: int | None, also: int | None, pixels: Tensor
) -> tuple[Tensor, tuple[int, int] | None]:
    """Raw tokens [B, T, C] of the image tower that is this part of the backbone, and the grid they come from when it is convolutional."""
    if also is not None:
        features, (between,) = tower.forward_intermediates(pixels, indices=[also])
        if features.ndim != 4 or features.shape[-2:] != between.shape[-2:]:
            raise ValueError(
                f"backbone.{part}: stage {also} (also) leaves features {tuple(between.shape[1:])} and the last ones are "
                f"{tuple(features.shape[1:])}; expected a convolutional network and a stage of the same grid, the last for example"
            )
        features = torch.cat([features, between], dim=1)
    elif stage is None:
        features = tower.forward_features(pixels)
    else:
        (features,) = tower.forward_intermediates(pixels, indices=[stage], intermediates_only=True)
    if features.ndim == 3:
        return features, None
    if (
        stage is None and also is None and features.shape[1] != tower.num_features
    ):  # channels-last architectures such as Swin
        features = features.permute(0, 3, 1, 2)
    height, width = features.shape[-2:]
    return features.flatten(2).transpose(1, 2), (height, width)  # [B, C, h, w] -> [B, T, C]
