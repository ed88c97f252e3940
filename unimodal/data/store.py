"""Rows of tokens on disk, written one after another and read in any order, each as long as it is: what a feature cache is made of.

    manifest.json    what the rows are of, their number and width
    tokens.bin       [sum of T, C]: float16, or int8 codes
    scales.bin       [sum of T] float32: what a token's codes are multiplied by (int8 only)
    lengths.bin      [rows written] int32: T of each row

A row counts once its length is written, which happens after its tokens are on the disk. Whatever a kill leaves behind the last such row
is cut off before writing goes on.

Legend: T tokens of a row, C width.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unimodal import files

Precision = Literal["half", "int8"]
LARGEST_HALF = 65504.0


class TokenStore:
    """Opened on construction, with what is there.

    Args:
        folder: where it lives; made where missing.
        about: what the rows are of, JSON values. A folder with rows of something else is refused.
        count: how many rows there will be.
        precision: `half` keeps float16; `int8` keeps 127 steps up to the largest value of each token, in half the space.

    Raises:
        ValueError: the folder holds rows of something else; names what differs.
    """

    def __init__(self, folder: Path, about: dict[str, Any], count: int, precision: Precision) -> None:
        self.folder, self.count, self.precision = folder, count, precision
        self.about = {**about, "precision": precision, "rows": count}
        folder.mkdir(parents=True, exist_ok=True)
        self.width = 0
        self.offsets = np.zeros(1, dtype=np.int64)
        self._views: dict[str, np.memmap] = {}
        self._open()

    @property
    def done(self) -> int:
        """Rows written."""
        return len(self.offsets) - 1

    @property
    def _files(self) -> list[Path]:
        names = (
            ["tokens.bin", "scales.bin", "lengths.bin"] if self.precision == "int8" else ["tokens.bin", "lengths.bin"]
        )
        return [self.folder / name for name in names]

    @property
    def _dtype(self) -> Any:
        return np.int8 if self.precision == "int8" else np.float16

    def _open(self) -> None:
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            return
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):  # a full disk or a kill left it: the cache is made anew, which loses time alone
            return
        differing = [key for key in self.about if found.get(key) != self.about[key]]
        if differing:
            told = "; ".join(f"{key} {found.get(key)!r} there, {self.about[key]!r} here" for key in differing)
            raise ValueError(
                f"the feature cache {self.folder} was made by something else ({told}): its features would be wrong here. Remove it, or "
                "name another folder in data.feature_cache"
            )
        self.width = found["width"]
        self.offsets, self._views = self._whole_rows(), {}

    def _whole_rows(self) -> np.ndarray:
        """Offsets [rows + 1] of the rows whose tokens are all there."""
        tokens, *scales, lengths = self._files
        if not all(path.exists() for path in self._files):
            return np.zeros(1, dtype=np.int64)
        size = lengths.stat().st_size // 4
        offsets = np.concatenate([[0], np.cumsum(np.fromfile(lengths, dtype=np.int32, count=size), dtype=np.int64)])
        held = tokens.stat().st_size // (self.width * np.dtype(self._dtype).itemsize)
        held = min([held, *(path.stat().st_size // 4 for path in scales)])
        return offsets[: np.searchsorted(offsets, held, side="right")]

    # Writing.

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone in the folder: another process that wants to write waits here, and then finds what this one wrote."""
        with files.locked(self.folder / "lock", f"the feature cache {self.folder}", timeout=-1):
            self._open()
            yield

    def write(self, rows: Sequence[Tensor], names: Sequence[str]) -> None:
        """Append rows [T, C], inside `writing`; `names` are for messages.

        Raises:
            ValueError: for a value that is not finite, or that half precision cannot hold; names the row.
        """
        if self.done == 0:
            self.width = rows[0].shape[1]
            for path in self._files:
                path.unlink(missing_ok=True)
            files.write_json(self.folder / "manifest.json", {**self.about, "width": self.width})
        coded = [self._code(row.float().cpu(), name) for row, name in zip(rows, names, strict=True)]
        parts = [np.concatenate(column) for column in zip(*coded)]  # tokens, and scales of int8
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        end = int(self.offsets[-1])
        starts = [end * self.width * np.dtype(self._dtype).itemsize, end * 4, self.done * 4]
        if self.precision == "half":
            del starts[1]
        with ExitStack() as stack:
            for path, part, start in zip(self._files, [*parts, lengths], starts, strict=True):
                file = stack.enter_context(open(path, "r+b" if path.exists() else "w+b"))
                file.truncate(start)  # what a kill left behind the last whole row
                file.seek(start)
                file.write(np.ascontiguousarray(part).tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.offsets = np.concatenate([self.offsets, end + np.cumsum(lengths, dtype=np.int64)])
        self._views = {}

    def _code(self, row: Tensor, name: str) -> tuple[np.ndarray, ...]:
        largest = row.abs().amax(dim=1)  # [T]
        if not torch.isfinite(largest).all():
            raise ValueError(
                f"{name}: the backbone's features are not finite; look at the item, or run the backbone in float32"
            )
        if self.precision == "half":
            if largest.max() > LARGEST_HALF:
                raise ValueError(
                    f"{name}: features up to {float(largest.max()):.3g} are beyond half precision ({LARGEST_HALF:g}); "
                    "set data.feature_precision to int8, which has a scale for each token"
                )
            return (row.half().numpy(),)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        return (row / scale[:, None]).round().to(torch.int8).numpy(), scale.numpy()

    # Reading.

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Rows [T, C], float32."""
        tokens = self._view("tokens.bin", self._dtype, (-1, self.width))
        out = []
        for row in rows:
            part = slice(self.offsets[row], self.offsets[row + 1])
            values = torch.from_numpy(tokens[part].astype(np.float32))
            if self.precision == "int8":
                values *= torch.from_numpy(self._view("scales.bin", np.float32, (-1, 1))[part].copy())
            out.append(values)
        return out

    def _view(self, name: str, dtype: Any, shape: tuple[int, int]) -> np.ndarray:
        if name not in self._views:
            self._views[name] = np.memmap(self.folder / name, dtype=dtype, mode="r")
        return self._views[name].reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}  # a loader's process opens the files itself, and copies none of them
