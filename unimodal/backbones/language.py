"""A published language model, alone or inside a BLIP-2 (arXiv 2301.12597, second stage), for a captioning head to write with."""

from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Blip2Config,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.blip_2.modeling_blip_2 import Blip2PreTrainedModel

from unimodal.backbones.published import load_published, published_settings
from unimodal.config import LanguageModelConfig, PublishedConfig, nearest

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
ENCODER_DECODERS = {T5Config: T5ForConditionalGeneration}  # of BLIP-2's releases: Flan-T5


class Blip2Language(Blip2PreTrainedModel):
    """Only the language model of a published BLIP-2."""

    _keys_to_ignore_on_load_unexpected = [r"^(?!language_model\.)"]

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.language_model: Any = _class(config.text_config)._from_config(config.text_config)
        self.post_init()


def load_language_model(
    config: LanguageModelConfig, *, pretrained: bool
) -> tuple[Any, dict[str, dict[str, str | None]]]:
    """A decoder-only language model or a T5, and the description of its source under `language_model`.

    Of what it may say about generation only its special tokens are kept, in its configuration: captions are the likeliest ones unless a
    call asks to draw.

    Args:
        config: which one.
        pretrained: as in `load_published`.

    Raises:
        FileNotFoundError: as `find_published`.
        ValueError: it is another kind of model, it names no end token or its decoder no first one, or what `load_published` raises.
    """
    _require_known(config.name)
    whole = published_settings(config, pretrained=pretrained)
    inside = whole.model_type == "blip-2"
    settings = whole.text_config if inside else whole
    model_class = _class(settings)
    if settings.model_type != config.name:
        raise ValueError(
            f"{config.source} holds a language model of type {settings.model_type!r}, expected {config.name!r}; "
            "set captioning.language_model.name"
        )
    if inside:
        published = PublishedConfig(name="blip-2", source=config.source, revision=config.revision)
        loaded, sources = load_published(Blip2Language, published, pretrained=pretrained)
        model = loaded.language_model
    else:
        model, sources = load_published(model_class, config, pretrained=pretrained)
    special = {name: getattr(model.generation_config, name) for name in SPECIAL}
    if special["eos_token_id"] is None:
        raise ValueError(
            f"the language model {config.source or config.name} names no end token, so no caption would end; "
            "set eos_token_id in captioning.language_model.kwargs"
        )
    if model.config.is_encoder_decoder:
        if special["decoder_start_token_id"] is None:
            raise ValueError(
                f"the language model {config.source or config.name} names no token that its decoder starts with; set "
                "decoder_start_token_id in captioning.language_model.kwargs, for T5 to that of its padding"
            )
        _untie(model)
    for name, value in special.items():
        setattr(model.config, name, value)
    if special["pad_token_id"] is None:  # something has to stand behind the end of a row
        special["pad_token_id"] = ends[0] if isinstance(ends := special["eos_token_id"], list) else ends
    model.generation_config = GenerationConfig(**special)
    return model, {"language_model": sources["published"]} if sources else {}


def _require_known(name: str) -> None:
    known = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(settings.model_type for settings in ENCODER_DECODERS)]
    if name not in known:
        raise ValueError(
            f"captioning.language_model.name: {name!r} is no decoder-only language model of transformers, and not t5; "
            f"{nearest(name, known)}"
        )


def _class(settings: Any) -> Any:
    """The transformers class of a language model that can write captions."""
    encodes = getattr(settings, "is_encoder_decoder", False)
    classes = ENCODER_DECODERS if encodes else MODEL_FOR_CAUSAL_LM_MAPPING
    # A BERT-like model says itself whether it is a decoder; others do not ask.
    if type(settings) not in classes or (not encodes and getattr(settings, "is_decoder", True) is False):
        what = "reads with an encoder and writes with a decoder" if encodes else "does not write from left to right"
        raise ValueError(
            f"a language model of type {settings.model_type!r} {what}; captions need a decoder-only one, such as opt, gpt2, llama or "
            "qwen3, or a t5"
        )
    return classes[type(settings)]


def _untie(model: Any) -> None:
    """Flan-T5 writes with other vectors than it reads; transformers' configuration of it cannot say so, only that its outputs are not
    scaled, and builds a model that shares them."""
    if not model.config.scale_decoder_outputs:
        model.config.tie_word_embeddings = False
        if model.lm_head.weight is model.shared.weight:
            model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
