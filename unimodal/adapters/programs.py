"""The command lines of `mteb` and CLIP_benchmark with a checkpoint of this library: both load models from lists of their own.

python -m unimodal.adapters mteb run -m checkpoints/demo/model -t Flickr30kT2IRetrieval
python -m unimodal.adapters clip_benchmark eval --model_type unimodal --pretrained checkpoints/demo/model --dataset mscoco_captions

Everything after the program's name is the program's own. `-m` and `--pretrained` take a folder or a Hub id of ours.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from unimodal.adapters.evaluation import MtebModel, clip_benchmark_model
from unimodal.inference import Unimodal

EXTRAS = {"mteb": "mteb", "clip_benchmark": "clip-benchmark"}


def register_with_mteb(name_or_path: str, revision: str | None = None) -> str:
    """Put a checkpoint on mteb's list of models; returns its name there, `owner/name`, of a folder the last two parts of its path.

    Raises:
        ImportError: mteb is not installed.
        FileNotFoundError: no such checkpoint.
        unimodal.hub.CheckpointError: it cannot be read.
    """
    registry = _library("mteb", "models.model_implementations").MODEL_REGISTRY
    folder = Path(name_or_path)
    name = "/".join(("local", *folder.resolve().parts[1:])[-2:]) if folder.is_dir() else name_or_path
    model = Unimodal.from_pretrained(name_or_path, revision=revision)
    adapter = MtebModel(model, name, revision or model.encoder.fingerprint())

    def load(name: str, revision: str | None = None, device: Any = None, **options: Any) -> MtebModel:
        if device is not None:
            model.to(device)
        return adapter

    registry[name] = adapter.mteb_model_meta.model_copy(update={"loader": load})
    return name


def register_with_clip_benchmark() -> None:
    """Put the kind `unimodal` on CLIP_benchmark's list of kinds of models; its `pretrained` is a folder or a Hub id.

    Raises:
        ImportError: CLIP_benchmark is not installed.
    """
    models = _library("clip_benchmark", "models")

    def load(model_name: str, pretrained: str, cache_dir: str | None = None, device: Any = "cpu") -> Any:
        model = Unimodal.from_pretrained(pretrained, cache_folder=cache_dir, device=device, heads=("embedding",))
        return clip_benchmark_model(model)

    if "unimodal" not in models.MODEL_TYPES:
        models.MODEL_TYPES.append("unimodal")
    models.TYPE2FUNC["unimodal"] = load


def main(arguments: Sequence[str]) -> int:
    """Run one of the programs with arguments of its own; returns the exit status."""
    program, *rest = arguments or ("",)
    try:
        if program == "mteb":
            rest = _named_in_mteb(rest)
            run = _library("mteb", "cli").main
        elif program == "clip_benchmark":
            register_with_clip_benchmark()
            run = _library("clip_benchmark", "cli").main
        else:
            print(
                f"usage: python -m unimodal.adapters {{{','.join(EXTRAS)}}} ARGUMENTS OF THE PROGRAM", file=sys.stderr
            )
            return 2
    except (ImportError, OSError, ValueError) as error:
        print(f"unimodal.adapters: {error}", file=sys.stderr)
        return 1
    before, sys.argv = sys.argv, [program, *rest]
    try:
        return int(run() or 0)
    finally:
        sys.argv = before


def _named_in_mteb(arguments: Sequence[str]) -> list[str]:
    """mteb's arguments, the model under the name that it has on mteb's list."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--model")
    parser.add_argument("--model-revision", "--model_revision")
    known, rest = parser.parse_known_args(arguments)
    if known.model is None:
        return list(arguments)
    return [*rest, "-m", register_with_mteb(known.model, known.model_revision)]


def _library(name: str, part: str) -> ModuleType:
    try:
        importlib.import_module(name)
        return importlib.import_module(f"{name}.{part}")
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}); pip install 'unimodal[{EXTRAS[name]}]'") from error
