"""Published models as ready checkpoints: CLIP, SigLIP and the others, opened from the folder or Hub id of their authors.

What such a checkpoint can do at once (embed, match, caption) is what its authors trained; the heads it lacks can be trained on top.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from unimodal.backbones.pair import CLASSES as PAIRS
from unimodal.backbones.published import FILES as PUBLISHED_FILES
from unimodal.config import BackboneConfig, EmbeddingConfig, ModelConfig, PublishedConfig
from unimodal.data.processor import Processor
from unimodal.data.published import open_processor
from unimodal.hub.weights import CheckpointError, read_json
from unimodal.model import UnimodalModel

__all__ = ["PUBLISHED_FILES", "is_published", "open_published"]


def is_published(folder: Path) -> bool:
    """Whether a folder holds a published model of a kind that can be opened."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in PAIRS


def open_published(
    folder: Path, name: str, revision: str | None, heads: Sequence[str] | None
) -> tuple[UnimodalModel, Processor]:
    """The model of a folder with all that its authors trained, and its preprocessing.

    Args:
        folder: local folder of it.
        name: what the user called it: the folder, or a Hub id.
        revision: as the user gave it.
        heads: load only these; None loads all.

    Raises:
        CheckpointError: it is incomplete, or lacks a head that was asked for.
    """
    if folder.parent.name == "snapshots":
        revision = folder.name  # the commit that a branch or tag stood for
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    published = PublishedConfig(name=settings.model_type, source=str(folder))
    try:
        model = _open_pair(settings, published)
        processor = open_processor(folder, model.backbone)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from error
    if lacking := [head for head in heads or () if head not in model.jobs]:
        raise CheckpointError(
            f"{name} has no head {', '.join(lacking)}; it has: {', '.join(model.jobs)}. Train one on top of it"
        )
    for source in model.backbone.sources.values():
        source |= {"source": name, "revision": revision}
    backbone = replace(model.config.backbone, published=replace(published, source=name, revision=revision))
    model.config = replace(model.config, backbone=backbone)
    return model, processor


def _open_pair(settings: Any, published: PublishedConfig) -> UnimodalModel:
    clip = settings.model_type == "clip"
    dim = settings.projection_dim if clip else settings.text_config.projection_size
    embedding = EmbeddingConfig(kind="backbone", dim=dim, gate=False, bias=None if clip else 0.0)
    config = ModelConfig(backbone=BackboneConfig(width=None, published=published), bridge=None, embedding=embedding)
    model = UnimodalModel(config, pretrained=True)
    scale, bias = math.exp(model.log_scale.item()), None if clip else model.bias.item()
    model.config = replace(config, embedding=replace(embedding, scale=scale, bias=bias))
    return model
