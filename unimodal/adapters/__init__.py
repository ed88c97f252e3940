"""Our models as other programs expect theirs: mteb and CLIP_benchmark to evaluate them, sentence-transformers to use them."""

from unimodal.adapters.evaluation import ClipModel, MtebModel, clip_benchmark_model
from unimodal.adapters.sentence_transformers import (
    CrossEncoderModule,
    SentenceTransformerModule,
    export_cross_encoder,
    export_sentence_transformer,
)

__all__ = [
    "ClipModel",
    "CrossEncoderModule",
    "MtebModel",
    "SentenceTransformerModule",
    "clip_benchmark_model",
    "export_cross_encoder",
    "export_sentence_transformer",
]
