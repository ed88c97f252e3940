"""A toy model of the real classes for every test that needs one: two towers, bridge, four heads, 200,000 parameters."""

import functools
from typing import Any

import torch

from unimodal.config import ModelConfig, from_dict
from unimodal.data import Processor, scenes_tokenizer
from unimodal.model import UnimodalModel

IMAGE_SIZE = 32
MAX_LENGTH = 32


@functools.cache
def _tokenizer() -> Any:
    return scenes_tokenizer()


def toy_config(**overrides: Any) -> ModelConfig:
    """A small model with all four heads; overrides replace its parts, for example `generation=None`."""
    tokenizer = _tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "max_position_embeddings": MAX_LENGTH, "pad_token_id": tokenizer.pad_token_id}
    parts: dict[str, Any] = {
        "backbone": {
            "width": 32,
            "vision": {"name": "test_resnet", "stage": 1, "image_size": IMAGE_SIZE},
            "text": {"name": "bert", "kwargs": text, "max_length": MAX_LENGTH},
        },
        "bridge": {
            "width": 32,
            "layers": 2,
            "heads": 2,
            "intermediate": 64,
            "queries": {"image": 4, "text": 3, "generate": 4},
        },
        "embedding": {"dim": 16, "matryoshka": [8]},
        "matching": {"hidden": 32, "layers": 1, "heads": 2},
        "captioning": {
            "hidden": 32,
            "layers": 1,
            "heads": 2,
            "max_length": MAX_LENGTH,
            "bos_id": tokenizer.cls_token_id,
            "eos_id": tokenizer.sep_token_id,
            "unk_id": tokenizer.unk_token_id,
        },
        "generation": {
            "transformer": "sana",
            "transformer_kwargs": {
                "num_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "patch_size": 4,
            },
            "size": IMAGE_SIZE,
        },
    }
    return from_dict(ModelConfig, parts | overrides)


def toy_model(seed: int = 0, **overrides: Any) -> UnimodalModel:
    """The toy configuration's model from this seed, in evaluation mode; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UnimodalModel(toy_config(**overrides)).eval()


def toy_processor() -> Processor:
    """The processor that fits the toy model."""
    vision = toy_config().backbone.vision
    return Processor(
        _tokenizer(), image_size=vision.image_size, mean=vision.mean, std=vision.std, max_length=MAX_LENGTH
    )
