"""config.json: what a checkpoint's model is, in words that only choose among known parts.

It comes from anyone, so it can neither name code nor a file to read: unknown keys are refused, and so is whatever timm
or transformers would take as an order to fetch weights or kernels by themselves.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from unimodal import __version__
from unimodal.backbones.published import sha256
from unimodal.config import ModelConfig, from_dict, nearest
from unimodal.data.writer import WRITER_FOLDER
from unimodal.files import BOOKKEEPING, require_readable
from unimodal.hub.folder import CALIBRATION, EXAMPLE, FILES, PROCESSOR
from unimodal.hub.weights import CheckpointError, read_json
from unimodal.model import UnimodalModel
from unimodal.tuning import fingerprint

LIBRARY = "unimodal"
FORMAT = 3  # raised when an older version could not read a newer folder
OPTIONAL_HEADS = ("matching", "captioning", "generation")
TIMM_LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
NO_ARCHITECTURE = {"transformers_version", "architectures", "dtype"}
# What a model type's configuration takes without listing it; without these a Flan-T5 would be read back as another model.
UNLISTED = {"t5": {"bos_token_id", "decoder_start_token_id", "dense_act_fn", "scale_decoder_outputs"}}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a tower's first weights came from.

    Args:
        source: Hub id; of a local file or folder only the name, since its path means nothing elsewhere.
        revision: the commit of a Hub id.
        sha256: of the weights file.
        local: whether it was local.
    """

    source: str
    revision: str | None
    sha256: str
    local: bool = False


@dataclass(frozen=True, kw_only=True)
class BackboneContents:
    """Whether the towers' weights are in the folder, where they first came from, and where they are not in the folder their hash."""

    included: bool
    sources: dict[str, Source]
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The content of config.json.

    Args:
        library, format, version: what wrote it.
        model: what the model is.
        backbone: what is there of its towers.
        prompts: what to put before texts, by name.
        files: every other file that outputs depend on and the sha256 of its content; null for the calibration, which names its model
            itself. Checkpoints of format 1 have none.
        mark: of this checkpoint, in the headers of its safetensors files, so that those of two checkpoints are not taken for one.
    """

    library: str
    format: int
    version: str
    model: ModelConfig
    backbone: BackboneContents
    prompts: dict[str, str] = field(default_factory=dict)
    files: dict[str, str | None] = field(default_factory=dict)
    mark: str | None = None


def describe(model: UnimodalModel, include_backbone: bool) -> Contents:
    """The content of config.json for a model, complete even where a source brought the text tower's configuration."""
    backbone = model.config.backbone
    sources = {part: _as_source(source) for part, source in model.sources.items()}
    captioning = model.config.captioning
    if backbone.published is not None:
        published = replace(backbone.published, kwargs=_architecture(model.backbone.model.config.to_diff_dict()))
        if "published" in sources:
            published = replace(published, source=sources["published"].source)
        backbone = replace(backbone, published=published)
    for part in ("vision", "beside"):
        if part in sources:
            tower = replace(getattr(backbone, part), source=sources[part].source)
            backbone = replace(backbone, **{part: tower})
    if "text" in sources:
        settings = model.backbone.text.config.to_diff_dict()
        known = _settings(backbone.text.name) - NO_ARCHITECTURE
        kwargs = {name: value for name, value in settings.items() if name in known}
        backbone = replace(backbone, text=replace(backbone.text, source=sources["text"].source, kwargs=kwargs))
    if captioning is not None and captioning.language_model is not None and model.language_captioner is not None:
        settings = model.language_captioner.language_model.config.to_diff_dict()
        language_model = replace(captioning.language_model, kwargs=_architecture(settings))
        if "language_model" in sources:
            language_model = replace(language_model, source=sources["language_model"].source)
        captioning = replace(captioning, language_model=language_model)
    adapters = {name: replace(adapter, active=name in model.active) for name, adapter in model.config.adapters.items()}
    towers = None if include_backbone else fingerprint(model.tower_state())
    return Contents(
        library=LIBRARY,
        format=FORMAT,
        version=__version__,
        model=replace(model.config, backbone=backbone, captioning=captioning, adapters=adapters),
        backbone=BackboneContents(included=include_backbone, sources=sources, fingerprint=towers),
    )


def read_contents(folder: Path) -> Contents:
    """Read and check config.json.

    Raises:
        CheckpointError: if there is none, or it is another library's, a newer format's, or says what it may not say.
    """
    path = folder / "config.json"
    if not path.exists():
        names = sorted({entry.name for entry in folder.iterdir()} - BOOKKEEPING)
        found = ", ".join(names[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no config.json (it holds: {found}); expected a folder that save_pretrained wrote"
        )
    values = read_json(path)
    if values.get("library") != LIBRARY:
        other = values.get("library") or values.get("model_type") or values.get("_class_name") or "an unknown library"
        raise CheckpointError(
            f"{path} describes a checkpoint of {other}, expected one of {LIBRARY}; load it with the library it is of"
        )
    if isinstance(number := values.get("format"), int) and number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, written by unimodal {values.get('version')}; this is unimodal {__version__}, "
            f"which reads formats up to {FORMAT}: upgrade unimodal"
        )
    try:
        contents = from_dict(Contents, _with_scoring(values), "config.json")
        _refuse_orders(contents.model)
        _refuse_code(folder)
        _refuse_places(contents.files)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return contents


def _with_scoring(values: dict[str, Any]) -> dict[str, Any]:
    """Up to format 2 the matching head's settings say how its score counts, and nothing says how deep a search goes."""
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(matching := model.get("matching"), dict):
        return values
    told = {name: matching[name] for name in ("combine", "scale") if name in matching}
    if not told or "scoring" in model:
        return values
    rest = {name: value for name, value in matching.items() if name not in told}
    return {**values, "model": {**model, "matching": rest, "scoring": told}}


def list_files(folder: Path) -> dict[str, str | None]:
    """The files of a folder that outputs depend on beside configuration and weights, as `Contents.files` has them."""
    names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    return {
        name: None if name == CALIBRATION else sha256(folder / name)
        for name in names
        if any(fnmatch(name, pattern) for pattern in (*PROCESSOR, EXAMPLE, CALIBRATION))
    }


def require_files(folder: Path, contents: Contents) -> None:
    """Compare the files of a folder with those that were saved there.

    Raises:
        CheckpointError: one is missing, or is another.
        OSError: one cannot be read.
    """
    for name, digest in contents.files.items():
        path = folder / name
        if not path.exists():
            without = f", or take {name} out of `files` in config.json to go without" if digest is None else ""
            raise CheckpointError(
                f"{folder} lacks {name}, which was saved there; get the checkpoint again, or {name} from the original{without}"
            )
        require_readable(path)
        if digest is not None and sha256(path) != digest:
            raise CheckpointError(
                f"{path} is not the file that was saved in this checkpoint, so the model would compute something else: it was changed, cut "
                "short, or taken from another checkpoint. Get the checkpoint again; to change the preprocessing, change the processor of "
                "an open model and save that"
            )


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of this library."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("library") == LIBRARY


def choose_heads(config: ModelConfig, heads: Sequence[str] | None) -> tuple[ModelConfig, list[str]]:
    """The configuration with only these heads, and the names of those left out.

    Raises:
        ValueError: for a head that does not exist or that the checkpoint lacks.
    """
    present = [name for name in OPTIONAL_HEADS if getattr(config, name) is not None]
    asked = present if heads is None else heads
    for name in asked:
        if name not in ("embedding", *present):
            raise ValueError(f"heads: the checkpoint has no {name!r}; {nearest(name, ['embedding', *present])}")
    dropped = [name for name in present if name not in asked]
    nothing: dict[str, Any] = dict.fromkeys(dropped)
    apart = tuple(f"heads.{name}" for name in dropped)
    adapters = {}
    for name, adapter in config.adapters.items():
        if target := tuple(pattern for pattern in adapter.target if not pattern.startswith(apart)):
            adapters[name] = replace(adapter, target=target)
    return replace(config, adapters=adapters, **nothing), dropped


def _as_source(source: dict[str, Any]) -> Source:
    local = source.get("local", Path(source["source"]).exists())
    name = Path(source["source"]).name if local else source["source"]
    return Source(source=name, revision=source["revision"], sha256=source["sha256"], local=local)


def _settings(name: str) -> set[str]:
    """The settings of a transformers model type; any other could make it fetch kernels, which is code, from the Hub."""
    if name not in CONFIG_MAPPING:
        raise ValueError(f"model: {name!r} is no transformers model type; {nearest(name, CONFIG_MAPPING.keys())}")
    listed = set(inspect.signature(CONFIG_MAPPING[name].__init__).parameters) - {"self", "kwargs"}
    return listed | UNLISTED.get(name, set())


def _architecture(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a published model that say what it is, those of its parts included; not who saved it, nor how."""
    known = _settings(values["model_type"]) - NO_ARCHITECTURE
    kept = {name: value for name, value in values.items() if name in known}
    for name, value in _parts(values):
        kept[name] = {"model_type": value["model_type"], **_architecture(value)}
    return kept


def _parts(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The settings of a published model's parts, such as `text_config`."""
    return [(name, value) for name, value in values.items() if isinstance(value, dict) and "model_type" in value]


def _orders(name: str, values: dict[str, Any]) -> set[str]:
    """Settings that are none of this model type's, nor of its parts'."""
    found = values.keys() - _settings(name) - {"model_type"}
    for part, part_values in _parts(values):
        found |= {f"{part}.{order}" for order in _orders(part_values["model_type"], part_values)}
    return found


def _refuse_orders(config: ModelConfig) -> None:
    vision, text, published = config.backbone.vision, config.backbone.text, config.backbone.published
    found = {"vision": vision.kwargs.keys() & TIMM_LOADING, "text": _orders(text.name, text.kwargs)}
    if config.backbone.beside is not None:
        found["beside"] = config.backbone.beside.kwargs.keys() & TIMM_LOADING
    if published is not None:
        found["published"] = _orders(published.name, published.kwargs)
    named = {f"backbone.{part}": orders for part, orders in found.items()}
    if config.captioning is not None and (written := config.captioning.language_model) is not None:
        named["captioning.language_model"] = _orders(written.name, written.kwargs)
    for part, orders in named.items():
        if orders:
            raise ValueError(
                f"model.{part}.kwargs: {', '.join(sorted(orders))} is no setting of the architecture, and a "
                "checkpoint may not say how to load anything; do not use it unless you know who wrote it"
            )


def _refuse_places(names: Iterable[str]) -> None:
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in FILES) or len(Path(name).parts) > 2 or ".." in name:
            raise ValueError(f"config.json lists {name!r}, which is no file of a checkpoint; get the checkpoint again")


def _refuse_code(folder: Path) -> None:
    """transformers would offer to run what `auto_map` names."""
    for path in sorted([*folder.glob("*config.json"), *(folder / WRITER_FOLDER).glob("*config.json")]):
        if code := read_json(path).get("auto_map"):
            raise ValueError(
                f"{path.name} names code to run (auto_map: {code}), which a checkpoint may not; "
                "do not use it unless you know who wrote it, and then without auto_map"
            )
