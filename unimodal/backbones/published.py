"""Published models as their authors released them: found, loaded whole, named by source and hash.

Only weights in safetensors are read, and no code that a repository may carry.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig

from unimodal.config import LanguageModelConfig, PublishedConfig
from unimodal.files import require_readable

LAYER = re.compile(r"(layers|blocks)\.\d+\.")
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def sha256(*paths: str | Path) -> str:
    """Hex digest of the content of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def find_published(
    source: str | Path, revision: str | None = None, *, files: Iterable[str] = FILES, **options: Any
) -> Path:
    """The folder of a published model: the one given, or a Hub id's in the cache, downloaded where needed.

    Args:
        source: local folder or Hub id.
        revision: branch, tag or commit of a Hub id.
        files: patterns of what is downloaded.
        options: `cache_dir`, `local_files_only`, `token`, as huggingface_hub takes them.

    Raises:
        FileNotFoundError: no such folder, no such model or revision, or no network and not in the cache.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(files), **options))
    except (OSError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{source}{at}: no such folder here, and not from the Hub or its cache ({type(error).__name__}: {error}). Give the "
            "path of a folder or a Hub id like owner/name; without a network, fetch it once where there is one"
        ) from error


def published_settings(config: PublishedConfig | LanguageModelConfig, *, pretrained: bool) -> Any:
    """The transformers configuration of `config.kwargs`, or the source's where its weights are wanted or kwargs are empty.

    Raises:
        FileNotFoundError: as `find_published`.
        ValueError: transformers cannot read the source's config.json.
    """
    if config.source is None or (not pretrained and config.kwargs):
        return CONFIG_MAPPING[config.name](**config.kwargs)
    folder = find_published(config.source, config.revision)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{config.source} holds no config.json of a known model: {error}") from error


def tensor_names(files: Iterable[Path]) -> set[str]:
    """What the tensors in safetensors files are called.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is cut short or no safetensors.
    """
    names: set[str] = set()
    for path in files:
        require_readable(path)
        try:
            with safe_open(path, framework="pt") as file:
                names |= set(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is incomplete or damaged: {error}; get it again") from error
    return names


@contextmanager
def loading_in(dtype: torch.dtype | None) -> Iterator[None]:
    """A block in which published weights are loaded in this precision, never in a wider one before; None loads them in torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_published(
    model_class: Any,
    config: PublishedConfig | LanguageModelConfig,
    *,
    pretrained: bool,
    adjust: Callable[[Any, set[str]], None] | None = None,
) -> tuple[Any, dict[str, dict[str, str | None]]]:
    """A transformers model, from its source or from random numbers, and the source's description for `Backbone.sources`.

    Its weights are in torch's default precision (`loading_in`), whatever they were published in.

    Args:
        model_class: the transformers class its weights are for.
        config: which model.
        pretrained: load the weights of `config.source`; otherwise build `config.kwargs`, or the source's shape where kwargs are empty.
        adjust: called with the source's configuration and the names of the tensors in its files before they are loaded.

    Raises:
        FileNotFoundError: as `find_published`.
        ValueError: the folder is another kind of model, has no safetensors, or its weights are not all of the model's.
    """
    settings = published_settings(config, pretrained=pretrained)
    if settings.model_type != config.name:
        raise ValueError(
            f"{config.source} is a model of type {settings.model_type!r}, expected {config.name!r}; set published.name"
        )
    if not pretrained or config.source is None:
        return model_class._from_config(settings, dtype=torch.get_default_dtype()), {}
    folder = find_published(config.source, config.revision)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        require_readable(path)
    if not files:
        raise ValueError(f"{config.source} holds no safetensors weights; give a revision or a repository that has them")
    if adjust is not None:
        adjust(settings, tensor_names(files))
    try:
        model, report = model_class.from_pretrained(
            folder,
            config=settings,
            dtype=torch.get_default_dtype(),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{config.source} is incomplete or damaged: {error}; get it again") from error
    # A configuration of fewer layers than the weights have would leave the rest out without a word.
    if beyond := sorted(name for name in map(str, report["unexpected_keys"]) if LAYER.search(name)):
        raise ValueError(
            f"{config.source} holds layers that its config.json does not name, for example {beyond[0]}: that is another model's, get it "
            "again"
        )
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "mismatched_keys") if report[kind]}
    if wrong:
        raise ValueError(
            f"{config.source} does not hold all weights of {model_class.__name__}: {wrong}; it is incomplete, or its config.json "
            "is another model's: get it again"
        )
    described = {"source": config.source, "revision": config.revision, "sha256": sha256(*files)}
    return model, {"published": described}
