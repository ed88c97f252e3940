"""The model: one backbone, one bridge, separate heads. Composition only: no losses, no tokenizer, no files.

Legend: B images, M texts, P pairs, T tokens, L text length, N queries, D backbone width, W bridge width, E embedding width.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unimodal import heads
from unimodal.backbones import TwoTowers
from unimodal.bridge import QFormer
from unimodal.config import ModelConfig
from unimodal.layers import KeyValues

# LSQ's `2 E|x| / sqrt(Q)` at Q = 127 for normal coordinates of unit variance.
FIRST_INT8_STEP = 2 * math.sqrt(2 / math.pi) / math.sqrt(127)


class ImageState(NamedTuple):
    """What the model read from B images: backbone tokens [B, T, D], their mask, bridged tokens [B, N, W], and, where the bridge writes the
    captions, the keys and values that its text looks back at."""

    tokens: Tensor
    mask: Tensor
    bridged: Tensor
    cache: KeyValues | None = None

    def select(self, index: Tensor) -> "ImageState":
        """Rows `index` [P], without what a captioner needs of them."""
        return ImageState(self.tokens[index], self.mask[index], self.bridged[index])

    def append(self, other: "ImageState") -> "ImageState":
        """These images, then `other`'s, without what a captioner needs of them."""
        tokens, mask, bridged = (torch.cat(parts) for parts in zip(self[:3], other[:3], strict=True))
        return ImageState(tokens, mask, bridged)


class TextState(NamedTuple):
    """What the model read from M texts: ids and mask [M, L], backbone tokens [M, L, D] and bridged tokens [M, N, W]."""

    ids: Tensor
    mask: Tensor
    tokens: Tensor
    bridged: Tensor

    def select(self, index: Tensor) -> "TextState":
        """Rows `index` [P]."""
        return TextState(*(part[index] for part in self))

    def append(self, other: "TextState") -> "TextState":
        """These texts, then `other`'s; both padded to the same length."""
        return TextState(*(torch.cat(parts) for parts in zip(self, other, strict=True)))


class UnimodalModel(nn.Module):
    """One shared backbone and bridge with separate heads for embedding, matching, captioning and generation.

    Args:
        config: what to build; see `unimodal.config.ModelConfig`. A head set to None is absent.
        pretrained: start the towers from their sources' weights, and the bridge from the text tower's where the configuration says so.
    """

    def __init__(self, config: ModelConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        backbone, bridge, embedding = config.backbone, config.bridge, config.embedding
        self.backbone = TwoTowers(
            width=backbone.width, vision=backbone.vision, text=backbone.text, pretrained=pretrained
        )
        text_config = self.backbone.text.config
        self.bridge = QFormer(
            width=bridge.width,
            layers=bridge.layers,
            heads=bridge.heads,
            intermediate=bridge.intermediate,
            memory_width=backbone.width,
            cross_attention_every=bridge.cross_attention_every,
            dropout=bridge.dropout,
            queries=bridge.queries,
            vocab_size=text_config.vocab_size if bridge.text_branch else None,
        )
        if pretrained and bridge.from_text_tower:
            self.bridge.load_bert(self.backbone.text.state_dict())
        shared: dict[str, Any] = {
            "width": bridge.width,
            "backbone_width": backbone.width,
            "dim": embedding.dim,
            "gate": embedding.gate,
        }
        self.heads = nn.ModuleDict()
        self.heads["image_embedding"] = heads.EmbeddingHead(pool=embedding.pool, **shared)
        self.heads["text_embedding"] = heads.EmbeddingHead(
            pool="attention" if embedding.pool == "query" else embedding.pool, **shared
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(embedding.scale)))
        self.pair_bias = None if embedding.bias is None else nn.Parameter(torch.tensor(float(embedding.bias)))
        self.int8_step = nn.Parameter(torch.tensor(FIRST_INT8_STEP)) if embedding.quantise else None
        if (matching := config.matching) is not None:
            if matching.kind == "bridge":
                self.heads["matching"] = heads.BridgeMatchingHead(width=bridge.width)
            else:
                self.heads["matching"] = heads.CachedMatchingHead(
                    width=bridge.width,
                    text_width=backbone.width,
                    hidden=matching.hidden,
                    layers=matching.layers,
                    heads=matching.heads,
                    dropout=matching.dropout,
                )
        if (captioning := config.captioning) is not None:
            if captioning.kind == "bridge":
                self.heads["captioning"] = heads.BridgeCaptioner(bos_id=captioning.bos_id, eos_id=captioning.eos_id)
            else:
                self.heads["captioning"] = heads.CaptionDecoder(
                    vocab_size=captioning.vocabulary or text_config.vocab_size,
                    width=bridge.width,
                    hidden=captioning.hidden,
                    layers=captioning.layers,
                    heads=captioning.heads,
                    max_length=captioning.max_length,
                    bos_id=captioning.bos_id,
                    eos_id=captioning.eos_id,
                    unk_id=captioning.unk_id,
                    dropout=captioning.dropout,
                )
        if config.generation is not None:
            self.heads["generation"] = heads.GenerationHead(
                condition_width=bridge.width,
                **{f.name: getattr(config.generation, f.name) for f in dataclasses.fields(config.generation)},
            )

    # Reading: once per image and once per text, whatever the heads do with it.

    def encode_image(self, pixels: Tensor | None = None, *, features: Tensor | None = None) -> ImageState:
        """Read images from pixels [B, 3, S, S], or from the image tower's cached features [B, T, C]."""
        if features is None:
            if pixels is None:
                raise ValueError("encode_image needs pixels or cached features, got neither")
            features = self.backbone.image_features(pixels)
        hidden, mask, _ = self.backbone.image_tokens(features)
        writes = "captioning" in self.heads and isinstance(self.heads["captioning"], heads.BridgeCaptioner)
        cache = KeyValues() if writes else None
        return ImageState(hidden, mask, self.bridge.read("image", hidden, mask, cache=cache), cache)

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextState:
        """Read texts: token ids and mask, both [M, L]."""
        hidden, mask, _ = self.backbone.text_tokens(ids, mask)
        return TextState(ids, mask, hidden, self.bridge.read("text", hidden, mask))

    def head(self, name: str) -> Any:
        """A head by name; a model without it says which it has."""
        if name not in self.heads:
            raise ValueError(
                f"this model has no {name} head; it has: {', '.join(self.heads)}. Give its configuration to train one"
            )
        return self.heads[name]

    # Retrieval embedding.

    def image_embedding(self, state: ImageState) -> Tensor:
        """Unit vectors [B, E], or [B, N, E] where the head pools per query."""
        return self.heads["image_embedding"](state.bridged, state.tokens, state.mask)

    def text_embedding(self, state: TextState) -> Tensor:
        """Unit vectors [M, E]."""
        return self.heads["text_embedding"](state.bridged, state.tokens, state.mask)

    @property
    def scale(self) -> Tensor:
        """The learned inverse temperature, at most 100 (CLIP, arXiv 2103.00020)."""
        return self.log_scale.clamp(max=math.log(100.0)).exp()

    @property
    def bias(self) -> Tensor:
        """The learned bias of the sigmoid loss (SigLIP, arXiv 2303.15343)."""
        if self.pair_bias is None:
            raise ValueError(
                "the sigmoid loss learns a bias and this model has none; set embedding.bias, for example to -10"
            )
        return self.pair_bias

    @property
    def step(self) -> Tensor:
        """The learned step of int8 codes (LSQ, arXiv 1902.08153), in units of the root mean square coordinate."""
        if self.int8_step is None:
            raise ValueError("training in few bits learns a step and this model has none; set embedding.quantise")
        return self.int8_step

    # Matching.

    def match(self, image: ImageState, text: TextState, image_index: Tensor, text_index: Tensor) -> Tensor:
        """Match logits [P] of pairs (image_index[p], text_index[p]); what an image needs is projected once and gathered per pair."""
        head = self.head("matching")
        if isinstance(head, heads.BridgeMatchingHead):
            memory = self.bridge.project_memory(image.tokens, image.mask).select(image_index)
            pair = text.select(text_index)
            return head(self.bridge.match("image", pair.ids, pair.mask, memory))
        return head(
            text.tokens[text_index], text.mask[text_index], head.project_images(image.bridged).select(image_index)
        )

    # Captioning.

    def start_caption(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] of texts as a captioner is fed them: their first token becomes the caption's start token."""
        return torch.cat([torch.full_like(ids[:, :1], self.head("captioning").bos_id), ids[:, 1:]], dim=1)

    def caption_targets(self, ids: Tensor) -> Tensor:
        """The classes [B, L] that `caption_logits` scores for token ids [B, L]: the ids, or their rows in a subset vocabulary."""
        head = self.head("captioning")
        return ids if isinstance(head, heads.BridgeCaptioner) else head.rows_of(ids)

    def caption_logits(self, image: ImageState, ids: Tensor) -> Tensor:
        """Next-token logits [B, L, V] of captions `ids` [B, L] under teacher forcing."""
        head = self.head("captioning")
        if isinstance(head, heads.BridgeCaptioner):
            assert image.cache is not None
            return head(
                self.bridge, ids, cache=KeyValues(list(image.cache.layers))
            )  # a copy, for the text's keys to be added to
        return head(ids, image.bridged)

    @torch.no_grad()
    def caption(self, image: ImageState, **options) -> list[list[int]]:
        """Token ids of a caption per image; options as in `unimodal.heads.CaptionDecoder.generate`."""
        head = self.head("captioning")
        if isinstance(head, heads.BridgeCaptioner):
            return head.generate(self.bridge, cache=image.cache, **options)
        return head.generate(image.bridged, **options)

    # Generation.

    def generation_condition(self, text: TextState, replaced: float = 1.0) -> Tensor:
        """Conditioning tokens [M, N, W]: generation queries that read the text.

        Args:
            text: the prompts.
            replaced: probability p that a position holds its learned query; otherwise it holds the caption's token embedding. Raising p to
                1 during training hands the conditioning over from the text to the queries (OmniBridge, arXiv 2509.19018). Positions beyond
                a caption always hold their query; at p = 1 the caption's embeddings take no part.
        """
        if "generate" not in self.bridge.query_sets:
            raise ValueError(f"the bridge has no query set 'generate'; it has: {', '.join(self.bridge.query_sets)}")
        queries = self.bridge.query_sets["generate"]  # [N, W]
        if replaced >= 1:
            return self.bridge.read("generate", text.tokens, text.mask)
        length = min(len(queries), text.ids.shape[1])
        embedded = self.bridge.embed_text(text.ids[:, :length])  # [M, length, W]
        keep_text = text.mask[:, :length] & (torch.rand(embedded.shape[:2], device=embedded.device) >= replaced)
        inputs = queries.expand(len(embedded), -1, -1).clone()
        inputs[:, :length] = torch.where(keep_text[..., None], embedded, inputs[:, :length])
        return self.bridge.read("generate", text.tokens, text.mask, inputs=inputs)
