"""What models compute stays the same while their code moves: the shipped checkpoint, and a toy model of every kind of backbone and head.

`unchanged.json` holds the numbers. A change that means to change them writes them anew: `python tests/test_unchanged.py`.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toy import toy_config
from unimodal import Unimodal
from unimodal.data import Scenes
from unimodal.hub.example import example_inputs, example_outputs
from unimodal.model import UnimodalModel

REPO, HELD = Path(__file__).parent.parent, Path(__file__).with_name("unchanged.json")
SHOWN = 6  # numbers of each tensor that are held
TOLERANCE = 1e-5  # kernels of other processors differ by up to 2e-6; on one machine 1e-6 holds

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = {"image_size": 32, "patch_size": 8, **TINY}
WORDS = {"vocab_size": 60, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ALONE: dict[str, Any] = {"bridge": None, "matching": None, "captioning": None, "generation": None}
OWN = {"kind": "backbone", "gate": False}


def published(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"width": None, "published": {"name": name, "kwargs": kwargs}}


def pair(name: str, dim: int = 32, **vision: Any) -> dict[str, Any]:
    projection = {"projection_dim": dim} if name == "clip" else {}
    backbone = published(name, text_config=WORDS | TINY, vision_config=PICTURES | vision, **projection)
    return {**ALONE, "backbone": backbone, "embedding": {**OWN, "dim": dim, "bias": -1.0}}


def qwen() -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 48, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    tokens = {"image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}
    backbone = published("qwen3_vl", vision_config=vision, text_config=text, tie_word_embeddings=True, **tokens)
    own = {job: {"kind": "backbone"} for job in ("matching", "captioning")}
    return {**ALONE, "backbone": backbone, "embedding": {**OWN, "dim": 48}, **own}


def blip2() -> dict[str, Any]:
    """The published image tower; the bridge embeds, judges and writes."""
    reader = {**WORDS, **TINY, "use_qformer_text_input": True}
    return {
        "backbone": published("blip-2", vision_config=PICTURES, qformer_config=reader, text_config=None),
        "bridge": {"width": 32, "layers": 2, "heads": 2, "intermediate": 64, "queries": {"image": 4}},
        "embedding": {"dim": 16, "pool": "query", "text": "words", "gate": False},
        "matching": {"kind": "bridge"},
        "captioning": {"kind": "bridge", "bos_id": 4, "eos_id": 2},
        "generation": None,
    }


def language_model(name: str) -> dict[str, Any]:
    sizes = {"opt": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48}}
    sizes["opt"] |= {"word_embed_proj_dim": 24, "max_position_embeddings": 64}
    sizes["t5"] = {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    kwargs = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **sizes[name]}
    kwargs |= {"decoder_start_token_id": 0} if name == "t5" else {}
    writer = {"kind": "language_model", "language_model": {"name": name, "kwargs": kwargs}}
    return {"captioning": writer, "matching": {"kind": "bridge"}, "embedding": {"dim": 16, "pool": "mean"}}


TOWERS = {
    "width": 32,
    "vision": {"name": "test_resnet", "stage": 1, "image_size": 32},
    "text": {"kwargs": WORDS | TINY},
}
MODELS: dict[str, dict[str, Any]] = {
    "two towers, all heads": {},
    "two towers' own embedding": {
        **ALONE,
        "backbone": {**TOWERS, "embedding": {"dim": 16, "hidden": 24, "pool": "mean_gem"}},
        "embedding": {**OWN, "dim": 16},
    },
    "the bridge judges and writes": {
        "matching": {"kind": "bridge"},
        "captioning": {"kind": "bridge", "bos_id": 1, "eos_id": 2},
        "generation": None,
    },
    "a vector for each query": {"embedding": {"dim": 16, "pool": "query"}, "captioning": None, "generation": None},
    "opt writes": language_model("opt"),
    "t5 writes": language_model("t5"),
    "clip": pair("clip", 16),
    "siglip": pair("siglip"),
    "siglip2": pair("siglip2", num_patches=16),
    "a bridge on clip": {
        "backbone": {**pair("clip", 16)["backbone"], "width": 24},
        "embedding": {**OWN, "dim": 16},
        "captioning": None,
        "generation": None,
    },
    "blip-2": blip2(),
    "qwen3_vl": qwen(),
}


class Ids:
    """Two texts of different length, in any vocabulary."""

    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.tensor([[1, 7, 9, 30, 2], [1, 11, 2, 0, 0]]), torch.arange(5) < torch.tensor([[5], [3]])


@torch.no_grad()
def fill(model: UnimodalModel) -> None:
    """Weights that follow from their names and shapes, in whatever order they are made."""
    for name, weight in model.named_parameters():
        if weight.ndim:  # single numbers start at constants
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(weight.shape, generator=generator)
            gain = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(gain + noise * (0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5))


def toy_outputs(kind: str) -> dict[str, Tensor]:
    model = UnimodalModel(toy_config(**MODELS[kind])).eval()
    fill(model)
    return example_outputs(model, example_inputs(model, Ids()))


def shipped_outputs() -> dict[str, Any]:
    """What the shipped checkpoint makes of three drawn scenes and their first captions."""
    model = Unimodal.from_pretrained(REPO / "checkpoints/unimodal-small")
    scenes = Scenes("test", count=3)
    images, texts = [scenes.image(i) for i in range(3)], [scenes.captions(i)[0] for i in range(3)]
    pairs = [(image, text) for image in images for text in texts]
    return {
        "image_embedding": model.encode(images, convert_to_tensor=True),
        "text_embedding": model.encode(texts, convert_to_tensor=True),
        "match": model.predict(pairs, activation_fn=torch.nn.Identity()),
        "captions": model.caption(images, num_beams=1),
    }


def shown(outputs: dict[str, Any]) -> dict[str, Any]:
    """Words and ids whole; of numbers the shape and a few, spread evenly."""
    found: dict[str, Any] = {}
    for name, output in outputs.items():
        if isinstance(output, list) or not torch.as_tensor(output).is_floating_point():
            found[name] = output if isinstance(output, list) else output.tolist()
            continue
        numbers = torch.as_tensor(output)
        places = torch.linspace(0, numbers.numel() - 1, min(SHOWN, numbers.numel())).long()
        found[name] = {
            "shape": list(numbers.shape),
            "numbers": [round(x, 8) for x in numbers.flatten()[places].tolist()],
        }
    return found


def require_equal(found: dict[str, Any], held: dict[str, Any]) -> None:
    assert found.keys() == held.keys()
    for name, output in found.items():
        if isinstance(output, dict):
            assert output["shape"] == held[name]["shape"], name
            assert output["numbers"] == pytest.approx(held[name]["numbers"], rel=TOLERANCE, abs=TOLERANCE), name
        else:
            assert output == held[name], name


@pytest.mark.parametrize("kind", MODELS)
def test_a_toy_model_computes_what_it_did(kind: str) -> None:
    require_equal(shown(toy_outputs(kind)), json.loads(HELD.read_text())[kind])


def test_the_shipped_checkpoint_computes_what_it_did() -> None:
    require_equal(shown(shipped_outputs()), json.loads(HELD.read_text())["shipped"])


if __name__ == "__main__":
    everything = {kind: shown(toy_outputs(kind)) for kind in MODELS} | {"shipped": shown(shipped_outputs())}
    lines = [f"{json.dumps(kind)}: {json.dumps(found)}" for kind, found in everything.items()]
    HELD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
