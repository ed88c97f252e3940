"""A video as a few of its frames: those of a list, or of a file where PyAV is installed to decode it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

MOST, FEWEST = 64, 4  # frames taken of a file, and at most of a list (Qwen3-VL-Embedding, arXiv 2601.04720)
RATE = 1.0  # frames per second taken of a file

V = TypeVar("V")


def sample_frames(frames: Sequence[V], fps: float) -> tuple[tuple[V, ...], float]:
    """At most 64 frames, evenly spread from the first to the last, and the rate in frames per second that they then have."""
    if len(frames) <= MOST:
        return tuple(frames), fps
    return tuple(frames[i] for i in _spread(len(frames), MOST)), fps * (MOST - 1) / (len(frames) - 1)


def read_video(path: str | Path) -> tuple[tuple[Image.Image, ...], float]:
    """Frames of a file, one for every second but 4 to 64 in all, evenly spread from the first to the last, and their rate.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: the path names nothing.
        ValueError: the file is no video that can be decoded.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r}: decoding a video file takes PyAV; pip install 'unimodal[video]', or pass the frames as a list"
        ) from error
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            rate: Any = stream.average_rate
            # Frames are counted by reading them: what a container says of their number may be missing or wrong.
            total = sum(1 for _ in file.decode(stream))
            wanted = _spread(total, min(max(int(total / float(rate) * RATE), FEWEST), MOST, total))
            file.seek(0)
            frames = tuple(frame.to_image() for i, frame in enumerate(file.decode(stream)) if i in set(wanted))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no video file {str(path)!r}; check the path") from None
    except (av.FFmpegError, IndexError, TypeError, ZeroDivisionError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no video that can be decoded: {error}") from error
    return frames, float(rate) * (len(frames) - 1 or 1) / (total - 1 or 1)


def _spread(total: int, count: int) -> list[int]:
    """`count` of the places 0 ... total - 1, evenly spread."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()
