"""What a model is, in data: the typed configuration that recipes write, checkpoints carry and `UnimodalModel.build` reads.

Names stand for classes by fixed tables in the code (a timm architecture, a transformers model type, a diffusers transformer), never by an
import path, so that a configuration fetched from anyone cannot run anything. Unknown keys are refused with the nearest known name.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

FROM_ZERO = (
    "stage",
    "also",
    "bos_id",
    "eos_id",
    "unk_id",
    "scoring.k",
    "pad_id",
    "start_id",
    "end_id",
    "mask_id",
)  # places, token ids and a depth that may be nothing; other whole numbers are sizes and counts
LARGEST = 2**63
BY_BACKBONE, BY_SYSTEM = "backbone", "system"  # kinds of heads that a model's other parts are by themselves
Combine = Literal["replace", "sum"]


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """The image tower of a two-tower backbone: any timm architecture.

    Args:
        name: timm architecture, for example `tf_efficientnet_lite0`.
        kwargs: further arguments of `timm.create_model` (JSON values only).
        stage: for hierarchical networks, the feature stage to read (0 = finest); None reads the last features.
        also: a feature stage of a convolutional network whose channels stand beside the last features, on the same grid.
        source: where the first weights come from: a Hub id or a local safetensors file; None starts from random numbers.
        revision: the commit of a Hub source.
        image_size: side of the square input in pixels.
        mean: per-channel mean that the preprocessing subtracts (images in 0-1).
        std: per-channel scale that the preprocessing divides by.
    """

    name: str = "vit_tiny_patch16_224"
    kwargs: dict[str, Any] = field(default_factory=dict)
    stage: int | None = None
    also: int | None = None
    source: str | None = None
    revision: str | None = None
    image_size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """The text tower of a two-tower backbone: any transformers text encoder.

    Args:
        name: transformers model type, for example `bert`.
        kwargs: fields of its configuration class (vocab_size, hidden_size, ...); ignored where `source` brings its own.
        source: where weights and tokenizer come from: a Hub id or a local folder; None starts from random numbers.
        revision: the commit of a Hub source.
        max_length: longest text in tokens, special tokens included.
    """

    name: str = "bert"
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    revision: str | None = None
    max_length: int = 64


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """A published model that serves as the backbone, as its authors released it.

    Args:
        name: transformers model type. `siglip` also reads the SigLIP 2 checkpoints of fixed resolution, `siglip2` those of
            native aspect ratio (NaFlex).
        kwargs: fields of its configuration class; ignored where `source` brings its own.
        source: where weights, tokenizer and preprocessing come from: a Hub id or a local folder; None starts from random numbers.
        revision: the commit of a Hub source.
    """

    name: Literal["clip", "siglip", "siglip2", "blip-2", "qwen3_vl"] = "clip"
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A published language model that writes captions.

    Args:
        name: transformers model type of any decoder-only language model: `opt`, `gpt2`, `llama`, `qwen3`, ...; or `t5`, whose encoder
            reads picture and prompt and whose decoder writes the caption.
        kwargs: fields of its configuration class; ignored where `source` brings its own.
        source: where weights and tokenizer come from: a Hub id or a local folder, also of a BLIP-2 that holds such a model; None starts
            from random numbers.
        revision: the commit of a Hub source.
    """

    name: str = "opt"
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class TowerEmbeddingConfig:
    """An embedding that two towers have by themselves, as a dual encoder: pooled features through a projection each.

    Args:
        dim: embedding width E.
        hidden: width inside the projection of images; texts have a linear one.
        dropout: dropout inside the projection of images, and half of it before.
        pool: what an image's tokens become: their mean, or beside it their generalised mean of power 3, in which the strongest
            places count most (GeM, Radenovic et al. 2018, arXiv 1711.02512).
    """

    dim: int = 256
    hidden: int = 1024
    dropout: float = 0.5
    pool: Literal["mean", "mean_gem"] = "mean"


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What turns items into tokens: two towers projected to one token width, or a published model.

    Args:
        width: width D of the tokens that the bridge reads; None leaves a published model's tokens as they are.
        vision: the image tower.
        beside: a second image tower, which sees the same pixels; its channels stand beside the first's at every place of the grid.
        text: the text tower.
        embedding: an embedding of the towers' own, for `embedding.kind: backbone`; None has none.
        published: a published model in place of the two towers.

    Raises:
        ValueError: an image tower has both a `stage` and an `also`.
    """

    width: int | None = 384
    vision: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    beside: VisionTowerConfig | None = None
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    embedding: TowerEmbeddingConfig | None = None
    published: PublishedConfig | None = None

    def __post_init__(self) -> None:
        for part, tower in (("vision", self.vision), ("beside", self.beside)):
            if tower is not None and tower.stage is not None and tower.also is not None:
                raise ValueError(
                    f"backbone.{part}: stage is {tower.stage} and also is {tower.also}; `also` stands beside the last features, so leave "
                    "stage null"
                )

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        if self.published is None:
            names = [tower.name for tower in (self.vision, self.beside, self.text) if tower is not None]
            return f"{', '.join(names[:-1])} and {names[-1]} towers"
        return f"{self.published.name} of {self.published.source}" if self.published.source else self.published.name


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The Q-Former (BLIP-2, arXiv 2301.12597).

    Args:
        width: hidden width W.
        layers: number of blocks.
        heads: attention heads.
        intermediate: width of the feed-forward networks.
        cross_attention_every: cross-attention in layers 0, k, 2k, ...
        dropout: dropout of BERT's places.
        queries: learned queries per named set.
        text_branch: whether the bridge reads and writes text itself (in-bridge matching and captioning).
        positions: longest text of that branch in tokens.
        from_text_tower: start from the weights of the text tower, a BERT of the same width, as BLIP-2 starts from BERT.
    """

    width: int = 384
    layers: int = 6
    heads: int = 12
    intermediate: int = 1536
    cross_attention_every: int = 2
    dropout: float = 0.1
    queries: dict[str, int] = field(default_factory=lambda: {"image": 32, "text": 8})
    text_branch: bool = True
    positions: int = 512
    from_text_tower: bool = False


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Retrieval embeddings.

    Args:
        kind: `bridge` embeds what the bridge read; `backbone` is the backbone's own embedding, of a published model or of two towers;
            `system` that of a published design.
        dim: embedding width E.
        pool: how image queries become one vector; `query` keeps one vector per query, scored by the best (BLIP-2).
        text: how a text becomes a vector: `queries` read the backbone's text tokens; `words` takes the first output of the bridge's own
            text branch (BLIP-2).
        gate: whether a learned gate mixes in the pooled backbone tokens (OmniBridge, arXiv 2509.19018).
        matryoshka: prefix widths that also serve as embeddings (the full width is always one).
        scale: initial inverse temperature.
        bias: initial bias of the sigmoid loss (SigLIP starts at -10); None has no such parameter.
        quantise: whether the model learns the step of its int8 codes (LSQ, arXiv 1902.08153), for training in few bits.
    """

    kind: Literal["bridge", "backbone", "system"] = "bridge"
    dim: int = 256
    pool: Literal["query", "mean", "attention"] = "attention"
    text: Literal["queries", "words"] = "queries"
    gate: bool = True
    matryoshka: tuple[int, ...] = ()
    scale: float = 20.0
    bias: float | None = None
    quantise: bool = False


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """Image-text match scores.

    Args:
        kind: `cached` scores text tokens against cached bridged image tokens; `bridge` runs text and queries through the bridge (BLIP-2);
            `backbone` asks a vision-language model that reads query and document as one conversation (Qwen3-VL-Reranker); `system` is the
            pair score of a published design.
        hidden: width of the cached matcher.
        layers: blocks of the cached matcher.
        heads: attention heads of the cached matcher.
        dropout: dropout of the cached matcher.
    """

    kind: Literal["cached", "bridge", "backbone", "system"] = "cached"
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ScoringRule:
    """How a model ranks: search, evaluation, tuning and calibration follow this rule unless a call asks for another.

    Args:
        first: what ranks the whole gallery: `embed` compares embeddings, `pair` scores every item with the query as a pair.
        k: how many of the first are scored again as pairs, by the matching head where there is one; 0 scores none again. Under `pair`
            all are.
        combine: whether the pair score replaces the first score (ALBEF, arXiv 2107.07651) or is added to it (BLIP-2, arXiv 2301.12597).
            Which is better is measured on validation data.
        scale: weight of the pair score under `sum`: first score + scale * pair score.
        directions: `both`, or `text_to_image` alone for a system that reads images anew for each text (ELIP, arXiv 2502.15682).

    Raises:
        ValueError: a negative k, or a sum without a first score.
    """

    first: Literal["embed", "pair"] = "embed"
    k: int = 32
    combine: Combine = "replace"
    scale: float = 1.0
    directions: Literal["both", "text_to_image"] = "both"

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"scoring.k: expected 0 or more candidates to score again, got {self.k}")
        if self.combine not in typing.get_args(Combine):
            raise ValueError(f"scoring.combine: expected 'replace' or 'sum', got {self.combine!r}")
        if self.first == "pair" and self.combine == "sum":
            raise ValueError(
                "scoring.first is 'pair' and scoring.combine is 'sum', but pairs that are scored first have no score to add to; set "
                "combine to 'replace', or first to 'embed'"
            )


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """Captions.

    Args:
        kind: `decoder` is a small decoder on bridged tokens; `bridge` the causal text branch of the bridge (BLIP-2, first stage);
            `language_model` a published language model that reads them (BLIP-2, second stage); `backbone` a vision-language model's own;
            `system` those of a published design.
        hidden: width of the decoder.
        layers: blocks of the decoder.
        heads: attention heads of the decoder.
        dropout: dropout of the decoder.
        vocabulary: size of the decoder's vocabulary when it is a subset of the tokenizer's; None takes all of it.
        max_length: longest caption in tokens.
        bos_id: token that starts a caption ([CLS] in BERT's vocabulary; BLIP-2 adds a [DEC] token); a language model brings its own.
        eos_id: token that ends a caption ([SEP] in BERT's vocabulary); a language model brings its own.
        unk_id: token that stands for what a subset vocabulary lacks ([UNK] in BERT's vocabulary).
        language_model: which one writes.
        prompt: what that one reads between the picture and the caption, in training and where a caption is asked for without a prompt.
    """

    kind: Literal["decoder", "bridge", "language_model", "backbone", "system"] = "decoder"
    hidden: int = 256
    layers: int = 3
    heads: int = 4
    dropout: float = 0.1
    vocabulary: int | None = None
    max_length: int = 40
    bos_id: int = 101
    eos_id: int = 102
    unk_id: int = 100
    language_model: LanguageModelConfig | None = None
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Pictures from bridged generation queries by flow matching.

    Args:
        transformer: denoiser by name: `sana`, `pixart` or the convolutional `unet` (diffusers).
        transformer_kwargs: its size (num_layers, num_attention_heads, ... of the first two, block_out_channels, ... of the U-Net).
        autoencoder: `none` generates pixels; `patches` their whitened components; `tiny` and `kl` latents of a diffusers autoencoder.
        autoencoder_kwargs: the autoencoder's configuration.
        size: side of the generated picture in pixels.
        prediction: what the network predicts: the velocity, or the clean sample it is computed from.
        null_probability: share of training conditions replaced by the learned null condition.
    """

    transformer: Literal["sana", "pixart", "unet"] = "sana"
    transformer_kwargs: dict[str, Any] = field(default_factory=dict)
    autoencoder: Literal["none", "patches", "tiny", "kl"] = "none"
    autoencoder_kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    prediction: Literal["velocity", "sample"] = "velocity"
    null_probability: float = 0.1


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A small part that is trained in place of the weights around it (`unimodal.tuning`).

    Args:
        kind: `lora` (arXiv 2106.09685), `dora` (2402.09353) and `ia3` (2205.05638) change linear layers and convolutions, `layer_norm`
            (2312.11420) the normalisations, `bottleneck` (1902.00751) what linear layers write, `prompt` (2203.12119) the tokens of
            transformer blocks, `prefix` (2101.00190) the keys and values of attention layers.
        target: patterns over the names of the model's modules, such as `backbone.vision.blocks.*.attn.qkv`. Of those that match, the ones
            that the kind can tune are tuned: `backbone.text.*` means all of them in the text tower.
        r: rank of lora and dora, width of a bottleneck.
        alpha: lora and dora count alpha / r times.
        dropout: dropout of lora, dora and bottleneck.
        tokens: learned tokens per layer of prompt and prefix.
        active: whether the model starts with it in use; `set_adapter` changes that.
    """

    kind: Literal["lora", "dora", "ia3", "layer_norm", "bottleneck", "prompt", "prefix"] = "lora"
    target: tuple[str, ...] = ("backbone.*",)
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    tokens: int = 8
    active: bool = True


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """What a system knows of the tokenizer's words.

    Args:
        pad_id: token that fills a text up.
        start_id: token that begins every text; None where the tokenizer begins none.
        end_id: token that ends every text; None where the tokenizer ends none.
        mask_id: token that stands for a hidden word; None where the tokenizer has no token to spare.
        known: token ids of the texts that the system holds (instructions, nouns, names of categories), by text.
    """

    pad_id: int = 0
    start_id: int | None = None
    end_id: int | None = None
    mask_id: int | None = None
    known: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """A published design on the backbone, in place of bridge and heads.

    Args:
        name: one of `unimodal.systems.SYSTEMS`.
        settings: arguments of its class (JSON values only).
        words: what it knows of the tokenizer; a training fills this in.
        categories: names of the categories that it learns, where it learns any; a training fills this in.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    words: WordsConfig | None = None
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One backbone, one bridge and the heads a model has; what is None is absent. Only a published model does without a bridge.
    `system` is a published design that stands in place of bridge and heads, also of the backbone's own embedding. `adapters` are what
    parameter-efficient tuning adds, by name.
    `scoring` is how the model ranks.

    Raises:
        ValueError: a system stands beside a bridge or a head.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    system: SystemConfig | None = None
    bridge: BridgeConfig | None = field(default_factory=BridgeConfig)
    embedding: EmbeddingConfig | None = field(default_factory=EmbeddingConfig)
    matching: MatchingConfig | None = None
    captioning: CaptioningConfig | None = None
    generation: GenerationConfig | None = None
    scoring: ScoringRule = field(default_factory=ScoringRule)
    adapters: dict[str, AdapterConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.system is None:
            return
        if self.bridge == BridgeConfig():  # nobody asked for it
            object.__setattr__(self, "bridge", None)
        if self.embedding == EmbeddingConfig() or BY_BACKBONE in kinds_of(self.embedding):
            object.__setattr__(self, "embedding", None)
        parts = {name: getattr(self, name) for name in ("bridge", "embedding", "matching", "captioning", "generation")}
        beside = [name for name, part in parts.items() if part is not None and BY_SYSTEM not in kinds_of(part)]
        if beside:
            raise ValueError(
                f"system: {self.system.name} stands in place of bridge and heads, got {', '.join(beside)} beside it; leave "
                f"{'them' if len(beside) > 1 else 'it'} out, or leave system out"
            )

    @property
    def chosen(self) -> "ModelConfig":
        """Without the heads that a system is by itself: what somebody chose."""
        if self.system is None:
            return self
        return dataclasses.replace(self, embedding=None, matching=None, captioning=None)


def kinds_of(*parts: Any) -> set[str]:
    """The kinds of these heads' configurations; a part that has none, or is absent, adds nothing."""
    return {part.kind for part in parts if hasattr(part, "kind")}


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The hint of an error about an unknown `name`: the nearest known one, and all of them where they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return hint + (f"known: {', '.join(known)}" if len(known) <= 100 else f"{len(known)} are known")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a configuration from plain JSON values.

    Raises:
        ValueError: for an unknown key (names the nearest known one), a value outside its choices, a size below 1 or a number that is not
            finite.
        TypeError: for a value of the wrong type.
    """
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise TypeError(f"{where}: expected a mapping of settings, got {type(values).__name__} {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}; {nearest(key, hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [a for a in arguments if a is not type(None)]
        return _convert(hint, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{where}: expected a list, got {type(value).__name__} {value!r}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{where}: expected {len(arguments)} values, got {len(value)}: {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{where}: expected a mapping, got {type(value).__name__} {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        require_finite(value, where)
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"{where}: expected {hint.__name__}, got {type(value).__name__} {value!r}")
    if hint is int and not (least := 0 if where.endswith(FROM_ZERO) or ".known." in where else 1) <= value < LARGEST:
        raise ValueError(f"{where}: expected a whole number of at least {least} and of up to 64 bits, got {value}")
    require_finite(value, where)
    return value


def require_finite(value: Any, where: str) -> None:
    """Refuse a number that is not finite, anywhere in plain JSON values; `where` names the value.

    Raises:
        ValueError: one is NaN or infinite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if isinstance(value, dict):
        for key, part in value.items():
            require_finite(part, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            require_finite(part, f"{where}[{i}]")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values of a configuration; `from_dict` gives it back equal."""
    return dataclasses.asdict(config)
