"""The model: one backbone, one bridge, separate heads. Composition only: no losses, no tokenizer, no files.

Legend: B images, M texts, P pairs, T tokens, L text length, N queries, D backbone width, W bridge width, E embedding width.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unimodal import heads, tuning
from unimodal.backbones import Pixels, build_backbone
from unimodal.bridge import QFormer
from unimodal.config import AdapterConfig, EmbeddingConfig, ModelConfig, WordsConfig, nearest
from unimodal.layers import KeyValues
from unimodal.states import ImageState, TextState
from unimodal.systems import BackboneEncoders, System, build_system, heads_of

# LSQ's `2 E|x| / sqrt(Q)` at Q = 127 for normal coordinates of unit variance.
FIRST_INT8_STEP = 2 * math.sqrt(2 / math.pi) / math.sqrt(127)


class UnimodalModel(nn.Module):
    """One shared backbone and bridge with separate heads for embedding, matching, captioning and generation.

    Args:
        config: what to build; see `unimodal.config.ModelConfig`. A head set to None is absent.
        pretrained: start the towers from their sources' weights, and the bridge from the text tower's where the configuration says so.
    """

    backbone: Any
    bridge: Any
    system: System | None
    encoders: BackboneEncoders | None
    log_scale: Tensor

    def __init__(self, config: ModelConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, pretrained=pretrained)
        self.encoders, self.system = None, None
        if config.system is not None:
            self.encoders, self.system = build_system(config.system, self.backbone)
            config = dataclasses.replace(config, **heads_of(self.system, config.scoring))
        self.config = config
        bridge, embedding = config.bridge, config.embedding
        self.bridge = None
        if bridge is not None:
            self.bridge = QFormer(
                width=bridge.width,
                layers=bridge.layers,
                heads=bridge.heads,
                intermediate=bridge.intermediate,
                memory_width=self.backbone.width,
                cross_attention_every=bridge.cross_attention_every,
                dropout=bridge.dropout,
                queries=bridge.queries,
                vocab_size=self.backbone.vocab_size if bridge.text_branch else None,
                max_positions=bridge.positions,
            )
            if pretrained and bridge.from_text_tower:
                self.bridge.load_bert(self.backbone.text.state_dict())
        self.heads = nn.ModuleDict()
        self.embeds: heads.Embedder | None = None
        parts = heads.Parts(config, self.backbone, pretrained, self.system)
        if embedding is not None:
            self.embeds, modules = heads.EMBEDDING[embedding.kind](parts)
            self.heads.update(modules)
        self._start_scale(pretrained)
        if config.matching is not None:
            self.heads["matching"] = heads.MATCHING[config.matching.kind](config.matching, parts)
        if config.captioning is not None:
            self.heads["captioning"] = heads.CAPTIONING[config.captioning.kind](config.captioning, parts)
        if config.generation is not None:
            parts.require_text_tokens("the generation head")
            self.heads["generation"] = heads.GenerationHead(
                condition_width=parts.bridge_width("the generation head"),
                **{f.name: getattr(config.generation, f.name) for f in dataclasses.fields(config.generation)},
            )
        self.active: tuple[str, ...] = ()
        self.config = dataclasses.replace(config, adapters={})
        for name, adapter in config.adapters.items():
            self.add_adapter(name, adapter)

    def _start_scale(self, pretrained: bool) -> None:
        """Temperature and bias of the embedding: the configuration's, or what the backbone's own embedding was trained with."""
        embedding, backbone = self.config.embedding, self.backbone
        scale = embedding.scale if embedding is not None else 1.0
        bias = embedding.bias if embedding is not None else None
        if self.system is None:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        else:  # a system has a temperature of its own
            self.register_buffer("log_scale", torch.tensor(math.log(scale)))
        self.pair_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        if pretrained and self._embeds_by_backbone and backbone.log_scale is not None:
            self.log_scale.data.fill_(backbone.log_scale)
            if self.pair_bias is not None and backbone.bias is not None:
                self.pair_bias.data.fill_(backbone.bias)
        quantise = embedding is not None and embedding.quantise
        self.int8_step = nn.Parameter(torch.tensor(FIRST_INT8_STEP)) if quantise else None

    @property
    def jobs(self) -> tuple[str, ...]:
        """What the model can do: `embedding`, `matching`, `captioning`, `generation`, as far as they are there."""
        config = self.config
        settings = {
            "embedding": config.embedding,
            "matching": config.matching,
            "captioning": config.captioning,
            "generation": config.generation,
        }
        return tuple(job for job, given in settings.items() if given is not None)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The kinds of item that it reads, by its backbone, by the bridge's text branch or by its system."""
        reads_words = self.system is not None or (self.bridge is not None and self.bridge.has_text)
        return tuple(dict.fromkeys((*self.backbone.modalities, *(("text",) if reads_words else ()))))

    @property
    def language_captioner(self) -> heads.LanguageModelCaptioner | None:
        """The captioning head where it is a language model, which has a tokenizer of its own."""
        head: Any = self.captioner
        return head if head is not None and head.own_words else None

    @property
    def captioner(self) -> heads.CaptioningHead | None:
        """The captioning head, if there is one."""
        return cast(heads.CaptioningHead | None, dict(self.heads.items()).get("captioning"))

    @property
    def matcher(self) -> heads.MatchingHead | None:
        """The matching head, if there is one."""
        return cast(heads.MatchingHead | None, dict(self.heads.items()).get("matching"))

    @property
    def parts(self) -> dict[str, str]:
        """Name of each part that a source may have given, and the prefix of its weights: the backbone's, and `language_model`."""
        own = {} if self.language_captioner is None else {"language_model": "heads.captioning.language_model."}
        return {part: f"backbone.{prefix}" for part, prefix in self.backbone.parts.items()} | own

    @property
    def sources(self) -> dict[str, dict[str, str | None]]:
        """Where published parts came from: those of `backbone.sources`, and `language_model`."""
        captioner = self.language_captioner
        return self.backbone.sources | (captioner.sources if captioner is not None else {})

    @sources.setter
    def sources(self, found: dict[str, dict[str, str | None]]) -> None:
        self.backbone.sources = {part: source for part, source in found.items() if part in self.backbone.parts}
        if self.language_captioner is not None:
            self.language_captioner.sources = {part: found[part] for part in found.keys() - self.backbone.sources}

    def learn_words(self, words: WordsConfig) -> None:
        """Tell the system which tokenizer the ids of texts are of.

        Raises:
            ValueError: the model has no system, or its system has learned the words of another tokenizer.
        """
        settings = self.config.system
        if self.system is None or self.encoders is None or settings is None:
            raise ValueError("learn_words: this model has no system, and its heads take ids as they come")
        if settings.words not in (None, words):
            raise ValueError(
                "learn_words: the system has learned the ids of another tokenizer; give the tokenizer of the checkpoint that it comes from"
            )
        self.config = dataclasses.replace(self.config, system=dataclasses.replace(settings, words=words))
        self.encoders.words = words
        self.system.learn_words()

    # Adapters: small parts around the weights, several of which may stand by; see `unimodal.tuning`.

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Add an adapter to the modules that it targets, in use if its configuration says so.

        Raises:
            ValueError: as `tuning.add_adapter`.
        """
        tuning.add_adapter(self, name, config)
        self.config = dataclasses.replace(self.config, adapters={**self.config.adapters, name: config})
        self.set_adapter([*self.active, name] if config.active else self.active)

    def set_adapter(self, names: str | Sequence[str] | None) -> None:
        """Use these adapters from now on and no others; None uses none.

        Raises:
            ValueError: the model has no such adapter.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names or ())
        for name in chosen:
            if name not in self.config.adapters:
                raise ValueError(f"this model has no adapter {name!r}; {nearest(name, self.config.adapters)}")
        self.active = chosen
        tuning.use_adapters(self, chosen)
        for tower in self._towers():
            tower.in_use = chosen

    def merge_adapters(self) -> None:
        """Fold the adapters in use into the weights and forget the others: the model computes the same, under its plain names.

        Raises:
            ValueError: one in use is of a kind that no weight can take up (`bottleneck`, `prompt`, `prefix`).
        """
        tuning.merge_adapters(self, self.active)
        self.config = dataclasses.replace(self.config, adapters={})
        self.set_adapter(None)

    def own_state(self, adapters: Sequence[str] | None = None) -> dict[str, Tensor]:
        """`state_dict` without the adapters of other models that share its towers, and only with these of its own."""
        return tuning.own(self.state_dict(), self.config.adapters if adapters is None else adapters)

    def tower_state(self, parts: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Weights of these of its `parts`, or of all, without any adapter, by the names they have in this model."""
        prefixes = tuple(prefix for part, prefix in self.parts.items() if parts is None or part in parts)
        return {name: tensor for name, tensor in self.own_state(()).items() if name.startswith(prefixes)}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moved and converted as torch does it, but what transformers computes from a configuration keeps its precision: rotary frequencies
        in bfloat16 would put tokens at other places."""
        computed = [
            (module, name, buffer)
            for published in self.modules()
            if isinstance(published, PreTrainedModel)
            for module in published.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in computed:
            if (now := getattr(module, name)).dtype != buffer.dtype:
                setattr(module, name, buffer.to(now.device))
        return self

    def _towers(self) -> list[Any]:
        return [self.get_submodule(prefix.rstrip(".")) for prefix in self.parts.values()]

    def _use_own_adapters(self) -> None:
        """Another model may share the towers (`hub.load_adapter`) and have used its own."""
        if any(getattr(tower, "in_use", ()) != self.active for tower in self._towers()):
            self.set_adapter(self.active)

    # Reading: once per image and once per text, whatever the heads do with it.

    def encode_image(
        self, pixels: Pixels | None = None, *, features: Tensor | None = None, mask: Tensor | None = None
    ) -> ImageState:
        """Read images from pixels [B, 3, S, S], or from the backbone's cached features [B, T, C] and their mask [B, T]."""
        if features is None:
            if pixels is None:
                raise ValueError("encode_image needs pixels or cached features, got neither")
            self._use_own_adapters()
            features, mask = self.backbone.image_features(pixels), self.backbone.image_mask(pixels)
        own = None if self.embeds is None else self.embeds.own_image(self, features, mask)
        hidden, mask = self.backbone.image_tokens(features, mask)
        if self.encoders is not None:
            hidden = self.encoders.placed(hidden)
        cache = None if self.captioner is None else self.captioner.cache()
        memory = None if self.matcher is None else self.matcher.memory(self, hidden, mask)
        return ImageState(hidden, mask, self.read_bridge("image", memory or hidden, mask, cache), cache, memory, own)

    def encode_text(self, ids: Tensor, mask: Tensor, *, features: Tensor | None = None) -> TextState:
        """Read texts: token ids and mask, both [M, L]; with the backbone's cached features [M, L, C], the tower does not run."""
        if "text" not in self.backbone.modalities:
            nothing = self.log_scale.new_empty(len(ids), 0)
            return TextState(ids, mask, nothing, nothing)
        if features is None:
            self._use_own_adapters()
            features = self.backbone.text_features(ids, mask)
        own = None if self.embeds is None else self.embeds.own_text(self, features, ids, mask)
        hidden, mask = self.backbone.text_tokens(features, mask)
        return TextState(ids, mask, hidden, self.read_bridge("text", hidden, mask), own)

    def read_bridge(
        self, queries: str, memory: Tensor | KeyValues, mask: Tensor, cache: KeyValues | None = None
    ) -> Tensor:
        """Bridged tokens [B, N, W]; [B, 0] where the model has no such queries."""
        if self.bridge is None or queries not in self.bridge.query_sets:
            return self.log_scale.new_empty(len(mask), 0)
        return self.bridge.read(queries, memory, mask, cache=cache)

    @property
    def _embeds_by_backbone(self) -> bool:
        return self.embeds is not None and self.embeds.by_backbone

    def head(self, name: str) -> Any:
        """A head by name; a model without it says which it has."""
        if name not in self.heads:
            raise ValueError(self._without(name))
        return self.heads[name]

    def _without(self, name: str) -> str:
        if name in self.jobs:
            return f"the {name} of this model is its backbone's own, which is used as it is and not by parts"
        hint = f", or open it as one: heads=[{name!r}]" if name in self.backbone.offers else ""
        return (
            f"this model has no {name} head; it has: {', '.join(self.jobs)}. Give its configuration to train one{hint}"
        )

    # Retrieval embedding.

    def embed_images(
        self, pixels: Pixels | None, *, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """`image_embedding` of images of which nothing else is wanted; arguments as in `encode_image`."""
        if not self._embeds_by_backbone:
            return self.image_embedding(self.encode_image(pixels, features=features, mask=mask))
        if features is None:
            assert pixels is not None
            self._use_own_adapters()
            if not (self.active or torch.is_grad_enabled()):
                return self.backbone.embed_images(pixels)
            features, mask = self.backbone.image_features(pixels), self.backbone.image_mask(pixels)
        return self.backbone.image_embedding(features, mask)

    def embed_texts(self, ids: Tensor, mask: Tensor, *, features: Tensor | None = None) -> Tensor:
        """`text_embedding` of texts of which nothing else is wanted; arguments as in `encode_text`."""
        if not self._embeds_by_backbone:
            return self.text_embedding(self.encode_text(ids, mask, features=features))
        if features is None:
            self._use_own_adapters()
            if not (self.active or torch.is_grad_enabled()):
                return self.backbone.embed_texts(ids, mask)
            features = self.backbone.text_features(ids, mask)
        return self.backbone.text_embedding(features, ids, mask)

    def image_embedding(self, state: ImageState) -> Tensor:
        """Unit vectors [B, E], or [B, N, E] where the head pools per query."""
        return self._embeds.image(self, state)

    def text_embedding(self, state: TextState) -> Tensor:
        """Unit vectors [M, E]."""
        return self._embeds.text(self, state)

    @property
    def _embeds(self) -> heads.Embedder:
        if self.embeds is None:
            raise ValueError(self._without("embedding"))
        return self.embeds

    @property
    def embedding(self) -> EmbeddingConfig:
        """What the model's embeddings are.

        Raises:
            ValueError: if it has none.
        """
        if self.config.embedding is None:
            raise ValueError(self._without("embedding"))
        return self.config.embedding

    @property
    def image_vectors(self) -> int:
        """The number of vectors of an image's embedding, of which the best counts; 0 where an image has a single one."""
        return self._embeds.vectors(self)

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
        return self.head("matching").match(self, image, text, image_index, text_index)

    def judge(self, conversations: Pixels, **options: Any) -> Tensor:
        """Match logits [P] of pairs that a vision-language model reads as one conversation each; options as in its `last_states`."""
        return self.head("matching")(self.backbone.last_states(conversations, **options))

    # Captioning.

    def start_caption(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] of texts as a captioner is fed them: their first token becomes the caption's start token."""
        return self.head("captioning").start(ids)

    def caption_targets(self, ids: Tensor) -> Tensor:
        """The classes [B, L] that `caption_logits` scores for token ids [B, L]: the ids, or their rows in a subset vocabulary."""
        return self.head("captioning").targets(ids)

    def caption_logits(self, image: ImageState, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Next-token logits [B, L, V] of captions `ids` [B, L] under teacher forcing; with their mask [B, L], padding may not be read."""
        self._use_own_adapters()
        return self.head("captioning").logits(self, image, ids, mask)

    @torch.no_grad()
    def caption(self, image: ImageState, **options) -> list[list[int]]:
        """Token ids of a caption per image; options as in `generate` of the head that the model has."""
        self._use_own_adapters()
        return self.head("captioning").write(self, image, **options)

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
