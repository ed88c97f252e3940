"""A published language model, alone or inside a BLIP-2 (arXiv 2301.12597, second stage), for a captioning head to write with."""

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from unimodal.backbones.blip2 import Blip2Language
from unimodal.backbones.published import load_published, published_settings
from unimodal.config import LanguageModelConfig, PublishedConfig, nearest

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_language_model(
    config: LanguageModelConfig, *, pretrained: bool
) -> tuple[Any, dict[str, dict[str, str | None]]]:
    """A decoder-only language model, and the description of its source under `language_model`.

    Of what it may say about generation only its special tokens are kept, in its configuration: captions are the likeliest ones unless a
    call asks to draw.

    Args:
        config: which one.
        pretrained: as in `load_published`.

    Raises:
        FileNotFoundError: as `find_published`.
        ValueError: it is no decoder-only language model, it has no end token, or what `load_published` raises.
    """
    _require_known(config.name)
    whole = published_settings(config, pretrained=pretrained)
    inside = whole.model_type == "blip-2"
    settings = whole.text_config if inside else whole
    _require_decoder(settings)
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
        model, sources = load_published(MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)], config, pretrained=pretrained)
    special = {name: getattr(model.generation_config, name) for name in SPECIAL}
    if special["eos_token_id"] is None:
        raise ValueError(
            f"the language model {config.source or config.name} names no end token, so no caption would end; "
            "set eos_token_id in captioning.language_model.kwargs"
        )
    for name, value in special.items():
        setattr(model.config, name, value)
    if special["pad_token_id"] is None:  # something has to stand behind the end of a row
        special["pad_token_id"] = ends[0] if isinstance(ends := special["eos_token_id"], list) else ends
    model.generation_config = GenerationConfig(**special)
    return model, {"language_model": sources["published"]} if sources else {}


def _require_known(name: str) -> None:
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"captioning.language_model.name: {name!r} is no decoder-only language model of transformers; "
            f"{nearest(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )


def _require_decoder(settings: Any) -> None:
    encodes = getattr(settings, "is_encoder_decoder", False)
    # A BERT-like model says itself whether it is a decoder; others do not ask.
    if encodes or type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(settings, "is_decoder", True) is False:
        what = "reads with an encoder and writes with a decoder" if encodes else "does not write from left to right"
        raise ValueError(
            f"a language model of type {settings.model_type!r} {what}; captions need a decoder-only one, such as opt, gpt2, llama or qwen3"
        )
