"""Published models as ready checkpoints: CLIP, SigLIP, BLIP-2, opened from the folder or Hub id of their authors.

What such a checkpoint can do at once (embed, match, caption) is what its authors trained; the heads it lacks can be trained on top.
"""

import errno
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from unimodal.backbones.pair import CLASSES as PAIRS
from unimodal.backbones.published import FILES as PUBLISHED_FILES
from unimodal.config import (
    BackboneConfig,
    BridgeConfig,
    CaptioningConfig,
    EmbeddingConfig,
    LanguageModelConfig,
    MatchingConfig,
    ModelConfig,
    PublishedConfig,
    ScoringRule,
)
from unimodal.data.conversation import open_conversations, single_token
from unimodal.data.processor import Processor
from unimodal.data.published import open_processor, open_writer
from unimodal.hub.building import few_parts, require_bounded
from unimodal.hub.processing import require_filled, require_vocabulary
from unimodal.hub.weights import CheckpointError, open_weights, read_json, require_finite
from unimodal.model import UnimodalModel

# Widths of Qwen3-VL-Embedding, which was trained for prefixes of 64 dimensions and more (arXiv 2601.04720).
WIDTHS = (64, 128, 256, 512, 768, 1024, 1536, 2048)

__all__ = ["PUBLISHED_FILES", "is_published", "open_published"]


def is_published(folder: Path) -> bool:
    """Whether a folder holds a published model of a kind that can be opened."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in (*PAIRS, "blip-2", "qwen3_vl")


def open_published(
    folder: Path, name: str, revision: str | None, heads: Sequence[str] | None
) -> tuple[UnimodalModel, Processor]:
    """The model of a folder with all that its authors trained, and its preprocessing.

    Args:
        folder: local folder of it.
        name: what the user called it: the folder, or a Hub id.
        revision: as the user gave it.
        heads: load only these; None loads all. A Qwen3-VL can be asked for `embedding`, `matching` and `captioning` whatever it was
            trained for; None takes what its files say of that (`qwen_heads`).

    Raises:
        CheckpointError: it is incomplete, or lacks a head that was asked for.
    """
    if folder.parent.name == "snapshots":
        revision = folder.name  # the commit that a branch or tag stood for
    try:
        with few_parts(_require_bounded(folder)):
            model, processor = _open(folder, heads)
        require_finite(model.state_dict(), name)
    except OSError as error:
        if error.errno is not None and error.errno != errno.ENOENT:
            raise
        raise CheckpointError(f"{name}: {error}") from error
    except Exception as error:  # what constructors and readers of transformers happen to meet in files of anyone
        raise CheckpointError(f"{name}: {error or type(error).__name__}") from error
    if lacking := [head for head in heads or () if head not in model.jobs]:
        raise CheckpointError(
            f"{name} has no head {', '.join(lacking)}; it has: {', '.join(model.jobs)}. Train one on top of it"
        )
    for source in model.sources.values():
        source |= {"source": name, "revision": revision}
    published = PublishedConfig(name=model.backbone.model.config.model_type, source=name, revision=revision)
    backbone = replace(model.config.backbone, published=published)
    if (captioning := model.config.captioning) is not None and captioning.language_model is not None:
        language_model = replace(captioning.language_model, source=name, revision=revision)
        model.config = replace(model.config, captioning=replace(captioning, language_model=language_model))
    model.config = replace(model.config, backbone=backbone)
    return model, processor


def _open(folder: Path, heads: Sequence[str] | None) -> tuple[UnimodalModel, Processor]:
    require_vocabulary(folder)
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    published = PublishedConfig(name=settings.model_type, source=str(folder))
    if settings.model_type == "qwen3_vl":
        model, processor = _open_qwen(settings, published, folder, heads)
    else:
        open_model = _open_blip2 if settings.model_type == "blip-2" else _open_pair
        model = open_model(settings, published)
        processor = open_processor(folder, model.backbone)
        if model.config.captioning is not None:
            processor.writer = open_writer(folder, model.config.captioning, model.head("captioning"))
    require_filled(folder, processor.tokenizer, model.backbone.vocab_size)
    return model, processor


def _require_bounded(folder: Path) -> int:
    """Hold config.json against the weights before anything is built; returns how many tensors these are.

    Raises:
        CheckpointError: there are none, or they cannot be those of such a model.
        ValueError: as `require_bounded`.
    """
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise CheckpointError(f"{folder} holds no safetensors weights; give a revision or a repository that has them")
    tensors = sum(len(open_weights(path).keys()) for path in files)
    require_bounded(read_json(folder / "config.json"), "config.json", tensors)
    return tensors


def _open_pair(settings: Any, published: PublishedConfig) -> UnimodalModel:
    clip = settings.model_type == "clip"
    dim = settings.projection_dim if clip else settings.text_config.projection_size
    embedding = EmbeddingConfig(kind="backbone", dim=dim, gate=False, bias=None if clip else 0.0)
    config = ModelConfig(backbone=BackboneConfig(width=None, published=published), bridge=None, embedding=embedding)
    model = UnimodalModel(config, pretrained=True)
    scale, bias = math.exp(model.log_scale.item()), None if clip else model.bias.item()
    model.config = replace(config, embedding=replace(embedding, scale=scale, bias=bias))
    return model


@torch.no_grad()
def _open_blip2(settings: Any, published: PublishedConfig) -> UnimodalModel:
    """BLIP-2 for retrieval (its first stage) or with a language model that writes captions (its second)."""
    kinds = settings.architectures or []
    if kinds not in (["Blip2ForImageTextRetrieval"], ["Blip2ForConditionalGeneration"]):
        raise ValueError(
            f"config.json names the architecture {', '.join(kinds) or '(none)'}; of BLIP-2, Blip2ForImageTextRetrieval and "
            "Blip2ForConditionalGeneration can be opened"
        )
    retrieves = kinds == ["Blip2ForImageTextRetrieval"]
    reader, written = settings.qformer_config, settings.text_config
    if (reader.hidden_act, reader.layer_norm_eps) != ("gelu", 1e-12):
        raise ValueError(
            f"its Q-Former has hidden_act {reader.hidden_act!r} and layer_norm_eps {reader.layer_norm_eps}; expected 'gelu' and 1e-12, "
            "as in every published BLIP-2"
        )
    bridge = BridgeConfig(
        width=reader.hidden_size,
        layers=reader.num_hidden_layers,
        heads=reader.num_attention_heads,
        intermediate=reader.intermediate_size,
        cross_attention_every=reader.cross_attention_frequency,
        dropout=reader.hidden_dropout_prob,
        queries={"image": settings.num_query_tokens},
        text_branch=retrieves,
        positions=reader.max_position_embeddings,
    )
    # The temperature of its embeddings is not released; their training began at 0.07.
    embedding = EmbeddingConfig(
        dim=settings.image_text_hidden_size, pool="query", text="words", gate=False, scale=1 / 0.07
    )
    language_model = LanguageModelConfig(name=written.model_type, source=published.source)
    config = ModelConfig(
        backbone=BackboneConfig(width=None, published=published),
        bridge=bridge,
        embedding=embedding if retrieves else None,
        matching=MatchingConfig(kind="bridge") if retrieves else None,
        captioning=None if retrieves else CaptioningConfig(kind="language_model", language_model=language_model),
    )
    model = UnimodalModel(config, pretrained=True)
    weights = _read_weights(Path(str(published.source)), leaving_out=("vision_model.", "language_model."))
    model.bridge.load_blip2(weights)
    layers = (
        {"language_projection": model.head("captioning").projection}
        if not retrieves
        else {
            "vision_projection": model.head("image_embedding").bridge_projection,
            "text_projection": model.head("text_embedding").bridge_projection,
            "itm_head": model.head("matching").score,
        }
    )
    for name, layer in layers.items():
        _fill(layer, weights, name)
    return model


def _read_weights(folder: Path, *, leaving_out: tuple[str, ...]) -> dict[str, Tensor]:
    files = [open_weights(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file.get_tensor(name) for file in files for name in file.keys() if not name.startswith(leaving_out)}  # noqa: SIM118


def _fill(layer: Any, weights: dict[str, Tensor], name: str) -> None:
    """Weight and bias `name` of a published model into a linear layer."""
    for part in ("weight", "bias"):
        ours, theirs = getattr(layer, part), weights.get(f"{name}.{part}")
        if theirs is None or theirs.shape != ours.shape:
            found = "nothing" if theirs is None else f"the shape {list(theirs.shape)}"
            raise ValueError(
                f"{name}.{part}: expected the shape {list(ours.shape)}, the weights have {found}; get it again"
            )
        ours.copy_(theirs)


def qwen_heads(folder: Path) -> tuple[str, ...]:
    """What a Qwen3-VL was trained for. All of them have the same kind of weights; the embedder and the reranker are told by the modules
    that their folder lists for sentence-transformers, and what lists none writes."""
    path = folder / "modules.json"
    modules = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "LogitScore" in modules:
        return ("matching",)
    return ("embedding",) if "Pooling" in modules else ("captioning",)


def _open_qwen(
    settings: Any, published: PublishedConfig, folder: Path, heads: Sequence[str] | None
) -> tuple[UnimodalModel, Processor]:
    wanted = qwen_heads(folder) if heads is None else tuple(heads)
    processor = open_conversations(folder, settings, heads=wanted)
    width = settings.text_config.hidden_size
    widths = tuple(dim for dim in WIDTHS if dim < width)
    config = ModelConfig(
        backbone=BackboneConfig(width=None, published=published),
        bridge=None,
        embedding=EmbeddingConfig(kind="backbone", dim=width, gate=False, matryoshka=widths)
        if "embedding" in wanted
        else None,
        matching=MatchingConfig(kind="backbone") if "matching" in wanted else None,
        captioning=CaptioningConfig(kind="backbone") if "captioning" in wanted else None,
        scoring=ScoringRule(first="pair" if "matching" in wanted and "embedding" not in wanted else "embed"),
    )
    words = {word: single_token(processor, word) for word in ("yes", "no")} if "matching" in wanted else {}
    model = UnimodalModel(config, pretrained=True)
    if words:
        model.head("matching").score.weight.data.copy_(model.backbone.answer_row(**words))
    return model, processor
