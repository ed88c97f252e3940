"""The settings of sentence-transformers that a checkpoint has, too; others are refused by name, with what to do in their place."""

from dataclasses import dataclass
from typing import Any

import torch

from unimodal import arguments

# What is so in any case, and may therefore be said.
GIVEN: dict[str, Any] = {"attn_implementation": "sdpa", "num_labels": 1}
TEXT_GIVEN = {"truncation": (True, "longest_first"), "padding": (True, "longest")}


@dataclass(frozen=True)
class LoadSettings:
    """What `SentenceTransformer` and `CrossEncoder` may ask for when they load a checkpoint.

    Args:
        dtype: precision of the weights; None leaves float32.
        device: where the model goes at once; None leaves that to sentence-transformers.
        max_length: longest text in tokens; None leaves the checkpoint's.
    """

    dtype: torch.dtype | None
    device: torch.device | None
    max_length: int | None


def load_settings(
    model_kwargs: dict[str, Any] | None,
    processor_kwargs: dict[str, Any] | None,
    config_kwargs: dict[str, Any] | None,
    backend: str,
) -> LoadSettings:
    """Read the arguments of `SentenceTransformer` and `CrossEncoder` of these names.

    Raises:
        ValueError: a backend other than torch, or a setting that a checkpoint does not have.
    """
    if backend != "torch":
        raise ValueError(
            f"a unimodal checkpoint is loaded as it is, with backend='torch', got backend={backend!r}; `unimodal export onnx` "
            "writes one for ONNX Runtime"
        )
    asked = {**(model_kwargs or {}), **(processor_kwargs or {}), **(config_kwargs or {})}
    asked = {name: value for name, value in asked.items() if value is not None}
    older, dtype = asked.pop("torch_dtype", None), asked.pop("dtype", None)
    dtype, place, length = dtype or older, asked.pop("device_map", None), asked.pop("model_max_length", None)
    if isinstance(place, dict) and set(place) == {""}:
        place = place[""]
    unknown = [f"{name}={value!r}" for name, value in asked.items() if name not in GIVEN or GIVEN[name] != value]
    if unknown:
        raise ValueError(
            f"a unimodal checkpoint is loaded as it is; of model_kwargs it has `dtype` and `device_map`, of processor_kwargs "
            f"`model_max_length`, of config_kwargs `num_labels=1`; got {', '.join(unknown)}: leave that out"
        )
    return LoadSettings(
        dtype=None if dtype in (None, "auto") else arguments.dtype(dtype, "dtype"),
        device=None if place in (None, "auto") else arguments.device(place, "device_map"),
        max_length=length,
    )


def text_length(processing_kwargs: dict[str, Any] | None) -> int | None:
    """The longest text in tokens that `processing_kwargs` of `encode` and `predict` ask for; None where they do not.

    Raises:
        ValueError: anything else is asked for.
    """
    asked = {(part, name): value for part, own in (processing_kwargs or {}).items() for name, value in own.items()}
    length = asked.pop(("text", "max_length"), None)
    unknown = [
        f"{part}: {name}={value!r}"
        for (part, name), value in asked.items()
        if (part, name, value) != ("common", "return_tensors", "pt")
        and not (part == "text" and any(value == known for known in TEXT_GIVEN.get(name, ())))
    ]
    if unknown:
        raise ValueError(
            "processing_kwargs: a unimodal checkpoint preprocesses as it was trained, with "
            f"{{'text': {{'max_length': n}}}} alone to set; got {', '.join(unknown)}: leave that out"
        )
    return length
