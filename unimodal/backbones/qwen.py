"""Qwen3-VL as a backbone (arXiv 2511.21631): a causal language model that reads an item as one conversation, pictures and words together.

Qwen3-VL-Embedding and Qwen3-VL-Reranker (arXiv 2601.04720) are the same network: an embedding is the state of the last token, a match
logit one row applied to it, a caption what the model writes next.

A batch of conversations is a dict of tensors with one row each, as `unimodal.data.conversation` makes it; padding on either side:

    ids, mask, types [B, L]                token ids, which are real, and what they stand for: 0 text, 1 image, 2 video
    patches [B, P, C], grids [B, V, 3]     patches of all images of a row and their numbers in time, height and width; zeros are padding
    video_patches, video_grids             the same of videos

Legend: B conversations, L tokens, P patches, C numbers of a patch, V images or videos, D width of the tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, Qwen3VLForConditionalGeneration

from unimodal import arguments
from unimodal.backbones.base import Backbone, Pixels, Tokens
from unimodal.backbones.published import load_published
from unimodal.config import PublishedConfig
from unimodal.layers import unit

OUTPUT = "lm_head.weight"
Prefix = list[tuple[Tensor, Tensor]]  # keys and values [1, heads, tokens, width] of every layer


class QwenVL(Backbone):
    """A published Qwen3-VL.

    Args:
        config: which one.
        width: D; None leaves its hidden states as they are, for use without a bridge.
        pretrained: load the weights of its source.

    Raises:
        FileNotFoundError, ValueError: as `load_published`.
    """

    modalities = ("image", "images", "video", "text", "empty")
    whole = True
    offers: tuple[str, ...] = ("embedding", "matching", "captioning")
    parts = {"published": "model."}
    sees = ("model.model.*", "projection.*")
    reads = ("model.model.language_model.*", "projection.*")

    def __init__(self, config: PublishedConfig, *, width: int | None, pretrained: bool = False) -> None:
        super().__init__()
        self.model: Any
        self.model, self.sources = load_published(
            Qwen3VLForConditionalGeneration, config, pretrained=pretrained, adjust=self._without_output
        )
        self.model.generation_config = GenerationConfig()  # the authors' is kept with the processor
        self.embeds = self.model.config.text_config.hidden_size
        self.vocab_size = self.model.config.text_config.vocab_size
        self.width = width or self.embeds
        self.projection = (
            nn.Identity() if width is None else nn.Sequential(nn.Linear(self.embeds, width), nn.LayerNorm(width))
        )

    def _without_output(self, settings: Any, names: set[str]) -> None:
        """An embedder may be published without output words (Qwen3-VL-Embedding-8B is): their place is not filled with random ones."""
        if not settings.tie_word_embeddings and OUTPUT not in names:
            settings.tie_word_embeddings, self.offers = True, ("embedding",)

    def random_pixels(self, count: int, generator: torch.Generator) -> Pixels:
        """Conversations of one picture of 4 tokens."""
        vision, settings = self.model.config.vision_config, self.model.config
        side = 2 * vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        ids = torch.tensor(
            [settings.vision_start_token_id, *4 * [settings.image_token_id], settings.vision_end_token_id]
        )
        return {
            "ids": ids.repeat(count, 1),
            "mask": torch.ones(count, len(ids), dtype=torch.bool),
            "types": (ids == settings.image_token_id).long().repeat(count, 1),
            "patches": torch.randn(count, side**2, width, generator=generator),
            "grids": torch.tensor([[[1, side, side]]] * count),
        }

    # Reading.

    def image_features(self, pixels: Pixels) -> Tensor:
        """Last hidden states [B, L, C] of conversations."""
        return self.states(_conversations(pixels))

    def image_mask(self, pixels: Pixels) -> Tensor:
        """Which tokens are real [B, L]."""
        return _conversations(pixels)["mask"]

    def image_tokens(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """[B, L, C] -> [B, L, D]."""
        mask = features.new_ones(features.shape[:2], dtype=torch.bool) if mask is None else mask
        return Tokens(self.projection(features), mask)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [M, L, C] of conversations without pictures."""
        return self.states({"ids": ids, "mask": mask, "types": torch.zeros_like(ids)})

    def text_tokens(self, features: Tensor, mask: Tensor) -> Tokens:
        """[M, L, C] -> [M, L, D]."""
        return Tokens(self.projection(features), mask)

    def image_embedding(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """The state of the last real token [B, L, C] -> unit vectors [B, E]."""
        mask = features.new_ones(features.shape[:2], dtype=torch.bool) if mask is None else mask
        return unit(_last(features, mask))

    def text_embedding(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The state of the last real token, never the first padding one that may have the same id: [M, L, C] -> unit vectors [M, E]."""
        return unit(_last(features, mask))

    def states(
        self, conversations: dict[str, Tensor], *, positions: Tensor | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """Last hidden states [B, L, C] of conversations, or of how they go on after a prefix that all of them share.

        Args:
            conversations: see above.
            positions: of the tokens [3, B, L], as `positions` gives them; needed after a prefix.
            prefix: as `prefix` gives it.
        """
        mask, cache = conversations["mask"], None
        if prefix is not None:
            mask = torch.cat([mask.new_ones(len(mask), prefix[0][0].shape[2]), mask], dim=1)
            cache = self._cache(prefix, len(mask))
        return self._run(conversations, mask, positions, cache).last_hidden_state

    def last_states(self, conversations: dict[str, Tensor], **options: Any) -> Tensor:
        """The state [B, C] of the last real token of each conversation; options as in `states`."""
        return _last(self.states(conversations, **options), conversations["mask"])

    def prefix(self, start: dict[str, Tensor], positions: Tensor, before: Prefix | None = None) -> Prefix:
        """Keys and values of the start of a conversation [1, L], or of how it goes on after `before`; together with those of `before`."""
        cache = DynamicCache(config=self.model.config) if before is None else self._cache(before, 1)
        mask = start["mask"].new_ones(1, start["ids"].shape[1] + (0 if before is None else before[0][0].shape[2]))
        out = self._run(start, mask, positions, cache)
        return [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    def positions(self, conversations: dict[str, Tensor]) -> Tensor:
        """Positions in time, height and width [3, B, L] of the tokens of conversations; padding counts for nothing."""
        grids = {name: conversations[name] for name in ("grids", "video_grids") if name in conversations}
        flat = {name: grid[grid[..., 0] > 0] for name, grid in grids.items()}
        found, _ = self.model.model.get_rope_index(
            conversations["ids"],
            conversations["types"],
            image_grid_thw=flat.get("grids"),
            video_grid_thw=flat.get("video_grids"),
            attention_mask=conversations["mask"],
        )
        return found

    def _run(self, conversations: dict[str, Tensor], mask: Tensor, positions: Tensor | None, cache: Any) -> Any:
        return self.model.model(
            input_ids=conversations["ids"],
            attention_mask=mask.long(),
            position_ids=self.positions(conversations) if positions is None else positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **_flat(conversations),
        )

    def _cache(self, prefix: Prefix, rows: int) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    # Writing.

    def answer_row(self, yes: int, no: int) -> Tensor:
        """The row [1, C] that gives the logit of token `yes` minus that of token `no` from a last hidden state."""
        words = self.model.lm_head.weight
        return (words[yes] - words[no])[None].detach().clone()

    def word_logits(self, features: Tensor) -> Tensor:
        """Logits [..., V] of the next token after last hidden states [..., C]."""
        return self.model.lm_head(features)

    def write(self, conversations: dict[str, Tensor], **options: Any) -> list[list[int]]:
        """Token ids of what the model writes after each conversation, padded on the left; without what ends it.

        Args:
            conversations: see above.
            options: arguments of transformers' `generate`; none is taken from elsewhere.
        """
        inputs = {
            "input_ids": conversations["ids"],
            "attention_mask": conversations["mask"].long(),
            "mm_token_type_ids": conversations["types"],
            **_flat(conversations),
        }
        out = arguments.passed_on(self.model.generate, inputs, options, "caption")
        ends = options.get("eos_token_id")
        stop = {ends} if isinstance(ends, int) else set(ends or ())
        return [_until(row, stop) for row in out[:, conversations["ids"].shape[1] :].tolist()]


def _last(features: Tensor, mask: Tensor) -> Tensor:
    """The state [B, C] of the last real token of features [B, L, C] with mask [B, L]."""
    place = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)  # [B]
    return features[torch.arange(len(features), device=features.device), place]


def _conversations(pixels: Pixels) -> dict[str, Tensor]:
    if isinstance(pixels, Tensor):
        raise TypeError(
            f"Qwen3-VL reads conversations, a dict of tensors, got a tensor {list(pixels.shape)}; make them with the processor"
        )
    return pixels


def _flat(conversations: dict[str, Tensor]) -> dict[str, Tensor]:
    """All patches one after another, and the grids they form, as transformers takes them."""
    out: dict[str, Tensor] = {}
    for names, patches, grids in (
        (("pixel_values", "image_grid_thw"), "patches", "grids"),
        (("pixel_values_videos", "video_grid_thw"), "video_patches", "video_grids"),
    ):
        if patches in conversations:
            given, grid = conversations[patches], conversations[grids]
            count = grid.prod(-1).sum(1)  # [B]
            real = torch.arange(given.shape[1], device=given.device) < count[:, None]
            out |= {names[0]: given[real], names[1]: grid[grid[..., 0] > 0]}
    return out


def _until(ids: Sequence[int], stop: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    return list(ids[:end])
