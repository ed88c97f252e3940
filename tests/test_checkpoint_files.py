"""Whatever happens to a file of a checkpoint folder, opening it gives the same outputs or says in words what is wrong: one file at a time
is removed, emptied, cut, replaced by other JSON or by that of another checkpoint, in every kind of folder that can be opened."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip2 import save_captioner
from PIL import Image
from test_published import saved as save_pair
from toy import toy_model, toy_processor
from toyqwen import toy_qwen

import unimodal
from unimodal.config import AdapterConfig
from unimodal.files import BOOKKEEPING
from unimodal.hub import CheckpointError, save_adapter
from unimodal.search import Calibration

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))
TEXTS = ["a red circle", "the blue square is left of the circle"]
NO_GENERATION: dict[str, Any] = {"generation": None}


def bridged(folder: Path, seed: int = 0) -> None:
    model = unimodal.Unimodal(toy_model(seed, **NO_GENERATION), toy_processor(), prompts={"query": "find "})
    curve = ((0.1, 0.5), (0.9, 0.8))
    fingerprint = model.encoder.fingerprint()
    model.encoder.calibration = Calibration(0.3, 0.1, 9, 4, 0.1, 0.1, curve, fingerprint)
    model.save_pretrained(folder)


def writes(folder: Path, seed: int = 0) -> None:
    """A checkpoint whose captions a language model writes, which has a tokenizer of its own."""
    source = folder.with_name(f"{folder.name}-source")
    save_captioner(source)
    unimodal.from_pretrained(source).save_pretrained(folder)


def old(folder: Path, seed: int = 0) -> None:
    """A checkpoint as former versions saved it: without marks and without a list of its files."""
    bridged(folder, seed)
    (folder / "calibration.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for key in ("files", "mark", "prompts"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config | {"format": 1}))


def adapters(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = toy_model(**NO_GENERATION)
    model.add_adapter("tuned", AdapterConfig(kind="lora", target=("backbone.text.*",)))
    with torch.no_grad():
        model.bridge.query_sets["image"].add_(torch.randn(()))
    save_adapter(model, toy_processor(), folder)


KINDS: dict[str, Callable[[Path], Any]] = {
    "bridged": bridged,
    "old": old,
    "writes": writes,
    "adapters": adapters,
    "clip": lambda folder: save_pair("clip", folder),
    "qwen": lambda folder: toy_qwen(folder, "embedder"),
}


def outputs(folder: Path) -> list[Any]:
    """What a folder makes of a picture and two texts."""
    if folder.name.startswith("adapters"):
        model = unimodal.Unimodal(toy_model(**NO_GENERATION), toy_processor())
        model.set_adapter(model.load_adapter(folder))
    else:
        model = unimodal.from_pretrained(folder)
    found: list[Any] = []
    if "embedding" in model.heads:
        found += [model.encode(PICTURE), model.encode_query(TEXTS)]
    if "matching" in model.heads:
        found.append(model.predict([(PICTURE, text) for text in TEXTS]))
    if "captioning" in model.heads:
        found.append(model.caption(PICTURE, max_new_tokens=6, num_beams=1))
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x == y if isinstance(x, str) else np.array_equal(x, y) for x, y in zip(a, b))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOIL: dict[str, Callable[[Path], Any]] = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": cut,
    "object": lambda path: path.write_text("{}"),
    "list": lambda path: path.write_text("[1, 2]"),
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Any]]]:
    """A folder of each kind and its outputs, made when it is asked for."""

    @functools.cache
    def made(kind: str) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("whole") / kind
        KINDS[kind](folder)
        return folder, outputs(folder)

    return made


def unnoticed(copy: Path, expected: list[Any]) -> str:
    """What is wrong with how a spoilt copy opens; nothing where it gives the same or says so in words."""
    try:
        return "" if same(outputs(copy), expected) else "other outputs, without a word"
    except CheckpointError as error:
        return "" if str(copy) in str(error) else f"the folder is not named: {error}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "removed") for kind in KINDS), *(("bridged", how) for how in ("emptied", "cut", "object", "list"))],
)
def test_a_spoilt_file_is_noticed(kind: str, how: str, wholes: Any, tmp_path: Path) -> None:
    folder, expected = wholes(kind)
    wrong = {}
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        # README.md is for people; without Qwen3-VL's modules.json a folder has other heads, which it says.
        if file.name not in (*BOOKKEEPING, "README.md", "modules.json"):
            copy = Path(shutil.copytree(folder, tmp_path / f"{folder.name}-{'-'.join(file.parts)}"))
            SPOIL[how](copy / file)
            wrong[str(file)] = unnoticed(copy, expected)
    assert not any(wrong.values()), wrong


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_another_checkpoint_is_noticed(wholes: Any, tmp_path: Path) -> None:
    folder, expected = wholes("bridged")
    other = tmp_path / "other"
    bridged(other, seed=1)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"mean": [0.4, 0.4, 0.4]}))
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"red": words["model"]["vocab"]["blue"], "blue": words["model"]["vocab"]["red"]}
    (other / "tokenizer.json").write_text(json.dumps(words))
    for name in (
        "config.json",
        "model.safetensors",
        "example.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    ):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        shutil.copy(other / name, copy / name)
        with pytest.raises(CheckpointError, match=name.partition(".")[0]):
            outputs(copy)
