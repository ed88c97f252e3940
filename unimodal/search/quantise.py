"""Vectors in few bits.

int8 keeps each vector's own scale (its largest value becomes 127), so a code does not depend on what else is in the
batch and needs no calibration; a cosine does not even need the scale. uint8 is int8 + 128. binary keeps one sign bit
per dimension, packed eight to a byte (ubinary), or that byte minus 128 (binary): the names and layouts of
sentence-transformers.

Shapes: n vectors, E width.
"""

from typing import Literal, get_args

import numpy as np
import torch

from unimodal import arguments

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


def int8_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float rows [n, E] -> codes int8 [n, E] and scales float32 [n], with row ~ code * scale."""
    scale = np.abs(x).max(-1, initial=0).astype(np.float32) / 127
    return np.rint(x / np.where(scale, scale, 1)[..., None]).astype(np.int8), scale


def quantise(x: np.ndarray, precision: Precision) -> np.ndarray:
    """Vectors [..., E] -> codes [..., E], or [..., E / 8] for the binary kinds.

    Raises:
        TypeError: anything but floating-point numbers.
        ValueError: an unknown precision, values that are not finite, or a width that does not divide into bytes.
    """
    arguments.choice(precision, "precision", get_args(Precision))
    x = arguments.vectors(x, "quantise", dimensions=(1, 2, 3)).float().cpu().numpy()
    if precision == "float32":
        return x
    if precision in ("int8", "uint8"):
        codes = int8_rows(x)[0]
        return codes if precision == "int8" else (codes.astype(np.int16) + 128).astype(np.uint8)
    if x.shape[-1] % 8:
        raise ValueError(
            f"precision {precision!r} packs eight dimensions to a byte, got {x.shape[-1]}; choose a multiple of 8"
        )
    packed = np.packbits(x > 0, axis=-1)
    return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def dequantise(codes: np.ndarray, precision: Precision) -> np.ndarray:
    """Codes of `quantise` -> unit vectors [..., E], float32.

    Raises:
        TypeError: numbers of another kind than the precision's codes.
        ValueError: an unknown precision, no codes, or values that are not finite.
    """
    arguments.choice(precision, "precision", get_args(Precision))
    if precision == "float32":
        x = arguments.vectors(codes, "dequantise", dimensions=(1, 2, 3)).float().cpu().numpy()
    else:
        x = _codes(codes, precision)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.asarray(x / np.where(norm, norm, 1), np.float32)


def _codes(codes: np.ndarray, precision: Precision) -> np.ndarray:
    """Codes as vectors that are not unit yet, float32."""
    dtype = np.int8 if precision in ("int8", "binary") else np.uint8
    expected = f"codes of quantise(..., {precision!r}): {np.dtype(dtype)} [..., E]"
    found = arguments.tensor(codes, "dequantise", expected)
    if found.dtype != (torch.int8 if dtype is np.int8 else torch.uint8):
        raise TypeError(arguments.refused("dequantise", expected, codes))
    array = found.cpu().numpy()
    if array.ndim == 0 or not array.shape[-1]:
        raise ValueError(arguments.refused("dequantise", expected, codes))
    if precision in ("binary", "ubinary"):
        packed = (array.astype(np.int16) + 128).astype(np.uint8) if precision == "binary" else array
        return np.unpackbits(packed, axis=-1).astype(np.float32) * 2 - 1
    return array.astype(np.float32) - (128 if precision == "uint8" else 0)
