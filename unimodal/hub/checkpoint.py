"""Save, load, verify and push a checkpoint folder.

    config.json               what the model is: typed, names only, no import path
    model.safetensors         its weights, in shards with an index where they are large
    tokenizer*, preprocessor_config.json
    README.md                 the model card
    calibration.json          what match logits mean, where it was measured
    example.safetensors       an input and the outputs of every head, to replay

A configuration that comes from elsewhere chooses among known parts and can neither name code nor a file to load.
"""

import copy
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, get_args

import torch
from huggingface_hub import CommitInfo, HfApi, save_torch_state_dict
from safetensors.torch import load_file, save_file

from unimodal import __version__, arguments
from unimodal.backbones.published import find_published, loading_in
from unimodal.config import ModelConfig, to_dict
from unimodal.data.processor import Processor
from unimodal.files import replacing_contents, write_json
from unimodal.hub import towers
from unimodal.hub.building import build, require_bounded, sketch
from unimodal.hub.card import Card, Measured, render_card
from unimodal.hub.contents import (
    Contents,
    choose_heads,
    describe,
    is_ours,
    list_files,
    read_contents,
    require_files,
)
from unimodal.hub.example import differences, example_inputs, example_outputs
from unimodal.hub.folder import (
    CALIBRATION,
    COMPANIONS,
    EXAMPLE,
    FILES,
    read_whole,
    replacing,
    require_readable_files,
    restore,
)
from unimodal.hub.precision import Precision, rounded, shrink
from unimodal.hub.processing import open_saved_processor
from unimodal.hub.published import PUBLISHED_FILES, is_published, open_published
from unimodal.hub.weights import MARK, CheckpointError, StoredWeights, open_weights
from unimodal.model import UnimodalModel
from unimodal.tuning import remove_adapters, renamed

logger = logging.getLogger(__name__)


class Calibrated(Protocol):
    """What match logits mean: `unimodal.search.Calibration`."""

    def save(self, path: str | Path) -> None: ...


def save_checkpoint(
    model: UnimodalModel,
    processor: Processor,
    folder: str | Path,
    *,
    metrics: Sequence[tuple[str, Measured]] = (),
    card: Card | None = None,
    max_shard_size: str = "2GB",
    include_backbone: bool = True,
    example: bool = True,
    precision: Precision = "float32",
    prompts: Mapping[str, str] | None = None,
    calibration: Calibrated | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all.

    Args:
        model: what to save.
        processor: its tokenizer and preprocessing.
        folder: the place; an older checkpoint there is replaced, other files there stay.
        metrics: named results for the card, each with its protocol.
        card: what the card says about training, limits and licence.
        max_shard_size: weights beyond this are split into several files.
        include_backbone: store the towers, and a language model that captions, too; otherwise they are named by source and hash, which
            needs them unchanged.
        example: store an input and its outputs for `verify_checkpoint`.
        precision: how matrices are kept: `float32`, `half`, or `int8` with a scale for each row, in a quarter of the space. `round_weights`
            says what the model will be then.
        prompts: what to put before texts, by name.
        calibration: what its match logits mean.

    Raises:
        FileExistsError: if `folder` holds something of a checkpoint's file names that is not one of ours.
        OSError: if writing fails, for example on a full disk; the older checkpoint is intact.
        ValueError: without the backbone, if a tower has no source or was trained since.
    """
    if not arguments.flag(include_backbone, "include_backbone"):
        towers.require_unchanged(model)
    return _save(
        model,
        processor,
        folder,
        metrics,
        card,
        max_shard_size,
        include_backbone,
        example,
        precision,
        prompts or {},
        calibration,
    )


def round_weights(model: UnimodalModel, precision: Precision) -> UnimodalModel:
    """Give a model the weights that it will have once it was saved in this precision, in place; returns it."""
    model.load_state_dict(rounded(model.state_dict(), precision))
    return model


def save_adapter(
    model: UnimodalModel,
    processor: Processor,
    folder: str | Path,
    *,
    metrics: Sequence[tuple[str, Measured]] = (),
    card: Card | None = None,
) -> Path:
    """Write what was put around a backbone, alone: adapters, bridge and heads, with the hash of the backbone's weights.

    Arguments and errors as `save_checkpoint`; the backbone needs no source, since `load_adapter` puts the folder on a model in hand.
    """
    return _save(model, processor, folder, metrics, card, "2GB", include_backbone=False, example=False)


def _save(
    model: UnimodalModel,
    processor: Processor,
    folder: str | Path,
    metrics: Sequence[tuple[str, Measured]],
    card: Card | None,
    max_shard_size: str,
    include_backbone: bool,
    example: bool,
    precision: Precision = "float32",
    prompts: Mapping[str, str] | None = None,
    calibration: Calibrated | None = None,
) -> Path:
    folder = arguments.path(folder, "folder")
    card = Card() if card is None else card
    if not isinstance(card, Card):
        raise TypeError(arguments.refused("card", "a Card", card, "unimodal.hub.Card(name=...) makes one"))
    for i, row in enumerate(metrics := arguments.listed(metrics, "metrics", "pairs (name, result)")):
        if not isinstance(row, list | tuple) or len(row) != 2 or not hasattr(row[1], "scores"):
            raise TypeError(arguments.refused(f"metrics[{i}]", "a pair (name, result)", row))
        arguments.text(row[0], f"metrics[{i}]")
    if not re.fullmatch(r"[1-9]\d{0,9} *([KMGT]i?B)?", arguments.text(max_shard_size, "max_shard_size"), re.IGNORECASE):
        raise ValueError(arguments.refused("max_shard_size", "a size such as '2GB'", max_shard_size))
    arguments.choice(precision, "precision", get_args(Precision))
    if model.config.system is not None and model.config.system.words is None:
        raise ValueError(
            "this model's system does not know the tokenizer's words, so its texts would mean nothing; tell it first: "
            "model.learn_words(unimodal.data.words_of(processor, unimodal.systems.known_texts(model.config.system)))"
        )
    example = arguments.flag(example, "example")
    apart = () if include_backbone else model.tower_state().keys()
    weights = {name: tensor for name, tensor in model.own_state().items() if name not in apart}
    mark = secrets.token_hex(8)
    with replacing(folder, is_ours) as fresh:
        contents = describe(model, include_backbone)
        stored = shrink(weights, precision)
        save_torch_state_dict(stored, fresh, max_shard_size=max_shard_size, metadata={MARK: mark})
        processor.save_pretrained(fresh)
        readme = render_card(model, contents.backbone, card, metrics)
        (fresh / "README.md").write_text(readme, encoding="utf-8")
        if example:
            inputs = example_inputs(model, processor)
            if precision != "float32":
                model = round_weights(copy.deepcopy(model), precision)
            tensors = {f"input.{name}": tensor for name, tensor in inputs.items()}
            tensors |= {f"output.{name}": tensor for name, tensor in example_outputs(model, inputs).items()}
            save_file(tensors, fresh / EXAMPLE, metadata={MARK: mark})
        if calibration is not None:
            calibration.save(fresh / CALIBRATION)
        contents = replace(contents, prompts=dict(prompts or {}), files=list_files(fresh), mark=mark)
        write_json(fresh / "config.json", to_dict(contents))
    return folder


def keep_calibration(folder: str | Path, calibration: Calibrated) -> Path:
    """Write the calibration of a checkpoint's matching head into its folder, and list it there; returns the file."""
    folder = Path(folder)
    listed = is_ours(folder) and (contents := read_contents(folder)).files
    with replacing_contents(folder, lambda name: False) as fresh:
        calibration.save(fresh / CALIBRATION)
        if listed:
            write_json(fresh / "config.json", to_dict(replace(contents, files={**contents.files, CALIBRATION: None})))
    return folder / CALIBRATION


def load_checkpoint(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    heads: Sequence[str] | None = None,
    backbone_sources: dict[str, str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[UnimodalModel, Processor]:
    """Load a model, in evaluation mode, and its processor: a checkpoint of this library, or a published model.

    Args:
        path_or_id: a local folder, which is read without any network, or a Hub id.
        revision: branch, tag or commit of a Hub id; a commit that was loaded before is read without network.
        cache_dir: where downloads are kept.
        local_files_only: read a Hub id from the cache alone.
        token: access token of the Hub; None takes the stored one.
        heads: load only these (`embedding` comes with them); None loads all.
        backbone_sources: for checkpoints without their towers, where they are: {"vision": file, "text": folder}, or {"published": folder,
            "language_model": folder}.
        device: where to put the model.
        dtype: precision of its floating point weights; None leaves float32. A published model is read in it at once.

    Raises:
        FileNotFoundError: if there is no such folder and no such checkpoint on the Hub or in its cache.
        CheckpointError: if it is not a checkpoint that can be read safely and completely.
        CheckpointMismatch: if the weights are not those of its configuration; every name is listed.
    """
    device = arguments.optional(arguments.device, device)
    dtype = arguments.optional(arguments.dtype, dtype)
    if heads is not None:
        heads = [
            arguments.text(head, f"heads[{i}]") for i, head in enumerate(arguments.listed(heads, "heads", "heads"))
        ]
    folder = find_checkpoint(path_or_id, revision, cache_dir, local_files_only, token)

    def read() -> tuple[UnimodalModel, Processor]:
        require_readable_files(folder)
        if is_published(folder):
            with loading_in(dtype):
                return open_published(folder, str(path_or_id), revision, heads)
        return _read(folder, heads, backbone_sources or {})

    model, processor = read_whole(folder, read)
    return model.to(device=device, dtype=dtype).eval(), processor


def _read(folder: Path, heads: Sequence[str] | None, places: dict[str, str]) -> tuple[UnimodalModel, Processor]:
    contents = read_contents(folder)
    require_files(folder, contents)
    config, dropped = choose_heads(contents.model, heads)
    if config.system is not None and config.system.words is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: system.words is null, so the ids of texts are of no known tokenizer"
        )
    stored = StoredWeights(folder, contents.mark, ignored=[f"heads.{name}." for name in dropped])
    _require_fit(config, contents, stored)
    sources = dict(contents.backbone.sources)
    if "captioning" in dropped:
        sources.pop("language_model", None)
    tensors = len(stored.shapes)
    if contents.backbone.included:
        model = build(config, folder, tensors)
        model.sources = {tower: vars(source) for tower, source in sources.items()}
    else:
        model = build(towers.locate(config, sources, places, folder), folder, tensors, pretrained=True)
        towers.require_same(model, sources, folder)
        parts = towers.named_parts(contents.model, model)
        if contents.backbone.fingerprint is not None and model.parts.keys() >= set(parts):  # it is that of all parts
            towers.require_fingerprint(model, contents.backbone.fingerprint, folder, parts)
    stored.load(_own(model, contents))
    if stored.skipped:
        logger.info("%s: left out as asked: %s (%d tensors)", folder, ", ".join(dropped), len(stored.skipped))
    return model, open_saved_processor(folder, model, contents)


def _own(model: UnimodalModel, contents: Contents) -> dict[str, torch.Tensor]:
    """Those of a model's tensors that its checkpoint holds."""
    provided = () if contents.backbone.included else model.tower_state().keys()
    return {name: tensor for name, tensor in model.own_state().items() if name not in provided}


def _require_fit(config: ModelConfig, contents: Contents, stored: StoredWeights) -> None:
    """Compare a configuration with the weights before anything is allocated.

    Raises:
        CheckpointError: it describes no model, or one of other weights.
    """
    try:
        require_bounded(to_dict(config), "config.json.model", len(stored.shapes))
    except ValueError as error:
        raise CheckpointError(f"{stored.folder}: {error}; get the checkpoint again") from error
    if (model := sketch(config, stored.folder, len(stored.shapes))) is not None:
        stored.require_fit(_own(model, contents))


def load_adapter(
    model: UnimodalModel,
    path_or_id: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> tuple[UnimodalModel, Processor]:
    """A second model from a folder of `save_adapter` and the towers of a first: its own bridge, heads and adapters, shared towers.

    Both stay usable; each reads with its own adapters.

    Args:
        model: the model with the backbone that the folder was saved beside.
        path_or_id, revision, cache_dir, local_files_only, token: as in `load_checkpoint`.
        name: what to call the adapter here; of several, each is called `name_` and its own name. None keeps their names.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: it holds a whole model, or belongs to another backbone; also as in `load_checkpoint`.
        ValueError: the model has an adapter of that name.
    """
    folder = find_checkpoint(path_or_id, revision, cache_dir, local_files_only, token)
    return read_whole(folder, lambda: _read_adapter(model, folder, name))


def _read_adapter(model: UnimodalModel, folder: Path, name: str | None) -> tuple[UnimodalModel, Processor]:
    require_readable_files(folder)
    contents = read_contents(folder)
    if contents.backbone.included:
        raise CheckpointError(
            f"{folder} holds a whole model, not adapters beside a backbone; open it with from_pretrained"
        )
    require_files(folder, contents)
    given = contents.model.adapters
    names = {old: old if name is None else name if len(given) == 1 else f"{name}_{old}" for old in given}
    stored = StoredWeights(folder, contents.mark, renamed=lambda key: renamed(key, names))
    _require_fit(contents.model, contents, StoredWeights(folder))
    parts = towers.named_parts(contents.model, model)
    towers.require_fingerprint(model, contents.backbone.fingerprint or "unknown", folder, parts)
    other = build(replace(contents.model, adapters={}), folder, len(stored.shapes)).to(model.log_scale)
    towers.share(model, other)
    try:
        for old, adapter in given.items():
            other.add_adapter(names[old], adapter)
        stored.load(_own(other, contents))
        processor = open_saved_processor(folder, other, contents)
    except (OSError, ValueError):
        remove_adapters(other, tuple(other.config.adapters))  # the towers are the first model's, too
        raise
    return other.eval(), processor


def find_calibration(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path | None:
    """The calibration file of a checkpoint, None where it has none; arguments as in `load_checkpoint`."""
    path = find_checkpoint(path_or_id, revision, cache_dir, local_files_only, token) / CALIBRATION
    return path if path.exists() else None


def find_prompts(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> dict[str, str]:
    """What a checkpoint puts before texts, by name; arguments as in `load_checkpoint`."""
    folder = find_checkpoint(path_or_id, revision, cache_dir, local_files_only, token)
    return read_contents(folder).prompts if is_ours(folder) else {}


def find_config(path_or_id: str | Path) -> ModelConfig:
    """What a checkpoint, or a published model, is; path and errors as in `load_checkpoint`. A published model is opened for that."""
    folder = find_checkpoint(path_or_id)
    return load_checkpoint(path_or_id)[0].config if is_published(folder) else read_contents(folder).model


def verify_checkpoint(
    folder: str | Path, *, tolerance: float = 1e-5, backbone_sources: dict[str, str] | None = None
) -> dict[str, float]:
    """Replay the stored example.

    Args:
        folder: a local checkpoint.
        tolerance: largest difference allowed, on the scale of `unimodal.hub.example.differences`.
        backbone_sources: as in `load_checkpoint`.

    Returns:
        The largest difference per output; 0 is bit for bit.

    Raises:
        CheckpointError: if there is no example, or the model computes something else than when it was saved.
    """
    folder = Path(folder)
    model, _ = load_checkpoint(folder, backbone_sources=backbone_sources)
    path = folder / EXAMPLE
    if not path.exists():
        raise CheckpointError(f"{folder} has no example.safetensors to replay; save it with example=True")
    open_weights(path)
    stored = load_file(path)
    inputs, outputs = (
        {name.removeprefix(part): tensor for name, tensor in stored.items() if name.startswith(part)}
        for part in ("input.", "output.")
    )
    found = differences(outputs, example_outputs(model, inputs))
    beyond = [f"{name} by {value:.2g}" for name, value in found.items() if not value <= tolerance]
    if beyond:
        raise CheckpointError(
            f"{folder} does not compute what it did when it was saved: {', '.join(beyond)} (allowed {tolerance:g}); "
            "compare the versions of torch, timm, transformers and diffusers, or get the checkpoint again"
        )
    return found


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a unimodal checkpoint",
) -> CommitInfo:
    """Upload a checkpoint folder; nothing but its own files, and those that sentence-transformers reads, leaves the machine.

    Args:
        folder: as written by `save_checkpoint`.
        repo_id: `owner/name`; made if it does not exist.
        private: whether a new repository is private; None takes the account's default.
        token: access token; None takes the stored one.
        revision: branch to commit to, made if it does not exist.
        create_pr: open a pull request instead of committing.
        commit_message: the commit's title.

    Raises:
        CheckpointError: if the folder is not a complete checkpoint.
    """
    folder = Path(folder)
    require_files(folder, contents := read_contents(folder))
    StoredWeights(folder, contents.mark)
    api = HfApi(token=token, library_name="unimodal", library_version=__version__)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        allow_patterns=[*FILES, *COMPANIONS],
        delete_patterns=["model.safetensors*", "model-*.safetensors"],  # shards of an older, larger or smaller model
    )


def find_checkpoint(
    path_or_id: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The folder of a checkpoint, downloaded where it is a Hub id; arguments and errors as in `load_checkpoint`."""
    folder = arguments.path(path_or_id, "path_or_id")
    revision = arguments.optional(arguments.text, revision, "revision")
    cache_dir = arguments.optional(arguments.path, cache_dir, "cache_dir")
    local_only = arguments.flag(local_only, "local_files_only")
    if not isinstance(token, bool):
        token = arguments.optional(arguments.text, token, "token")
    restore(folder)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, expected a checkpoint folder or a Hub id; give the folder it is in")
    return find_published(
        path_or_id,
        revision,
        files=[*FILES, *PUBLISHED_FILES],
        cache_dir=cache_dir,
        local_files_only=local_only,
        token=token,
        library_name="unimodal",
        library_version=__version__,
    )
