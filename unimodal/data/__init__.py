"""Data: readers of image-text pairs, the embedded scenes, images and the processor.

Names are loaded on first use (PEP 562), so that importing one reader loads neither Lightning nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Pairs": "pairs",
    "Problem": "pairs",
    "check": "pairs",
    "Scenes": "scenes",
    "KarpathyJson": "readers",
    "CocoCaptions": "coco",
    "ImageFolder": "readers",
    "CsvTable": "tables",
    "JsonLines": "tables",
    "WebDatasetTars": "shards",
    "HuggingFaceDataset": "huggingface",
    "PascalSentence": "labelled",
    "Wikipedia": "labelled",
    "NusWide": "labelled",
    "label_matrix": "labelled",
    "Finding": "findings",
    "audit": "findings",
    "open_splits": "guess",
    "write_karpathy": "writers",
    "write_webdataset": "writers",
    "load_image": "images",
    "Processor": "processor",
    "scenes_tokenizer": "processor",
    "word_tokenizer": "processor",
    "words_of": "tokens",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
