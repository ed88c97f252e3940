"""What a training starts from: a checkpoint, or a published model, with its configuration, processor and prompts.

A training's own configuration says only what differs. It may add a head, an adapter, learned queries or a bias, and it may change the
settings in `FREE`, which belong to no tensor. Whatever else differs would make another model of the same weights, so it is refused.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from unimodal.config import ModelConfig
from unimodal.data.processor import Processor
from unimodal.hub import find_prompts, load_checkpoint
from unimodal.model import UnimodalModel

# Settings that weights do not depend on; a training may choose them anew.
FREE = (
    "*drop*",
    "*.source",
    "*.revision",
    "backbone.vision.image_size",
    "backbone.beside.image_size",
    "backbone.text.max_length",
    "embedding.matryoshka",
    "scoring.*",
    "captioning.prompt",
    "generation.null_probability",
    "adapters.*.active",
    "system.words",
)
# What a model may get that the checkpoint lacks.
ADDED = (
    *("bridge", "embedding", "matching", "captioning", "generation", "system"),
    *("backbone.width", "backbone.embedding", "embedding.bias", "embedding.quantise"),
)


class StartError(ValueError):
    """A training cannot start from this checkpoint as its configuration asks; the message names settings, values and the cure."""


@dataclass(frozen=True)
class Start:
    """A model to start from, by the name that the configuration gives it, with its processor and its prompts."""

    name: str
    model: UnimodalModel
    processor: Processor
    prompts: dict[str, str]

    @classmethod
    def open(cls, name: str) -> "Start":
        """Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
        """
        return cls(name, *load_checkpoint(name), find_prompts(name))

    def configuration(self, given: ModelConfig | None) -> ModelConfig:
        """The configuration of the model that starts here.

        Args:
            given: what the training says, whole; None takes the checkpoint's. Mappings (adapters, queries, kwargs) may be in part.

        Raises:
            StartError: a setting differs that must not.
        """
        held = self.model.config
        if given is None:
            return held
        refused = [
            line
            for name, there, here in _differing(given.chosen, self._beside(given))
            if (line := _refusal(name, there, here))
        ]
        if refused:
            raise StartError(
                f"init_from {self.name}: {'; '.join(refused)}. Leave out what differs, and the checkpoint's own is taken; to train "
                "another model, leave init_from out"
            )
        whole = _completed(given, held)
        if whole.system is None or held.system is None:
            return whole
        return dataclasses.replace(whole, system=dataclasses.replace(whole.system, words=held.system.words))

    def _beside(self, given: ModelConfig) -> ModelConfig:
        """The checkpoint's configuration; without its backbone's own embedding, which has no weights of a head, where a configuration
        has another one beside it."""
        held, embeds = self.model.config, self.model.embeds
        if given.system is not None:
            return held.chosen
        if embeds is None or not embeds.by_backbone or held.embedding is None or given.embedding is None:
            return held
        return held if given.embedding.kind == held.embedding.kind else dataclasses.replace(held, embedding=None)

    def fill(self, model: UnimodalModel) -> list[str]:
        """Give a model the checkpoint's weights; returns the names of its tensors that the checkpoint lacks.

        Raises:
            StartError: the checkpoint has a tensor that the model lacks, or has in another shape.
        """
        there, here = self.model.state_dict(), model.state_dict()
        unfit = [name for name, tensor in there.items() if name not in here or here[name].shape != tensor.shape]
        if unfit:
            name = unfit[0]
            shape = f"the shape {list(here[name].shape)}" if name in here else "nothing"
            settings = [
                f"{setting} is {_shown(theirs)} there and {_shown(ours)} here"
                for setting, theirs, ours in _differing(model.config.chosen, self._beside(model.config))
            ]
            raise StartError(
                f"init_from {self.name}: {len(unfit)} of its tensors do not fit this model, for example {name}, which has the shape "
                f"{list(there[name].shape)} there and {shape} here. {'; '.join(settings)}. Leave out what differs, and the checkpoint's "
                "own is taken"
            )
        model.load_state_dict(there, strict=False)
        model.sources = self.model.sources
        return [name for name in here if name not in there]

    def processor_of(self, config: ModelConfig) -> Processor:
        """The checkpoint's processor, for the size of pictures and the length of texts that a configuration names."""
        vision, text = config.backbone.vision, config.backbone.text
        held, own = self.model.config.backbone, self.processor
        same = (vision.image_size, text.max_length) == (held.vision.image_size, held.text.max_length)
        if same or config.backbone.published is not None:
            return own
        return Processor(
            own.tokenizer, image_size=vision.image_size, mean=own.mean, std=own.std, max_length=text.max_length
        )


def _differing(given: Any, held: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every setting that is another one, with its value in the checkpoint and its value here; of mappings, what is in both."""
    if _is_part(given) and type(given) is type(held):
        for field in dataclasses.fields(given):
            inner = f"{name}.{field.name}" if name else field.name
            yield from _differing(getattr(given, field.name), getattr(held, field.name), inner)
    elif isinstance(given, dict) and isinstance(held, dict):
        for key in given.keys() & held.keys():
            yield from _differing(given[key], held[key], f"{name}.{key}")
    elif _plain(given) != _plain(held):
        yield name, held, given


def _refusal(name: str, there: Any, here: Any) -> str | None:
    """Why a setting may not differ; None where it may."""
    if any(fnmatch(name, pattern) for pattern in FREE):
        return None
    if (there is None or there is False) and name in ADDED:
        return None
    return f"{name} is {_shown(there)} in the checkpoint and {_shown(here)} here"


def _shown(value: Any) -> str:
    return "present" if _is_part(value) else "absent" if value is None else repr(_plain(value))


def _completed(given: Any, held: Any) -> Any:
    """`given` with the entries of mappings that only `held` has."""
    if _is_part(given) and type(given) is type(held):
        fields = [field.name for field in dataclasses.fields(given)]
        return dataclasses.replace(
            given, **{name: _completed(getattr(given, name), getattr(held, name)) for name in fields}
        )
    if isinstance(given, dict) and isinstance(held, dict):
        return {**held, **{key: _completed(value, held[key]) if key in held else value for key, value in given.items()}}
    return given


def _is_part(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
