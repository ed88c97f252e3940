"""A cache of a frozen image tower's tokens on disk: the tower runs once per image, every later epoch reads.

One float16 array [variants, images, T, C] beside a manifest that names the split, the weights and what is already done, so that an
interrupted build continues and a cache of another split or another tower is refused. Variant 0 is the picture, variant 1 its mirror image.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from unimodal.backbones import TwoTowers
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor


def tower_fingerprint(backbone: TwoTowers) -> str:
    """Hash of the image tower's weights: 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.vision.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class FeatureCache:
    """Opened or built on construction.

    Args:
        folder: where the cache lives.
        pairs: the split to read.
        backbone: the two towers; its image tower is run in evaluation mode without gradient.
        processor: the pictures' preprocessing.
        mirror: also store the mirror image of every picture.
        batch_size: pictures per forward pass.
    """

    def __init__(
        self,
        folder: str | Path,
        pairs: Pairs,
        backbone: TwoTowers,
        processor: Processor,
        *,
        mirror: bool = False,
        batch_size: int = 32,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens, width = len(backbone.image_positions), backbone.vision_width
        self.shape = (2 if mirror else 1, len(pairs), tokens, width)
        name = f"{pairs.name}-{pairs.split}-{pairs.fingerprint()}-{tower_fingerprint(backbone)}-{processor.image_size}-v{self.shape[0]}"
        self.manifest = folder / f"{name}.json"
        self.path = folder / f"{name}.f16"
        done = json.loads(self.manifest.read_text())["done"] if self.manifest.exists() and self.path.exists() else 0
        mode: Literal["r+", "w+"] = "r+" if self.path.exists() else "w+"
        self.array = np.memmap(self.path, dtype=np.float16, mode=mode, shape=self.shape)
        if done < len(pairs):
            self._build(pairs, backbone, processor, done, batch_size)

    @torch.no_grad()
    def _build(self, pairs: Pairs, backbone: TwoTowers, processor: Processor, done: int, batch_size: int) -> None:
        was_training = backbone.vision.training
        backbone.vision.eval().to(
            memory_format=torch.channels_last
        )  # convolutions on a CPU are several times faster so
        starts = range(done, len(pairs), batch_size)
        for start in track(starts, description=f"image features of {pairs.name} {pairs.split}"):
            rows = range(start, min(start + batch_size, len(pairs)))
            pixels = processor.images([pairs.image(i) for i in rows]).contiguous(memory_format=torch.channels_last)
            for variant in range(self.shape[0]):
                features = backbone.image_features(pixels.flip(-1) if variant else pixels)
                self.array[variant, rows.start : rows.stop] = features.half().numpy()
            if start // batch_size % 20 == 0 or rows.stop == len(pairs):
                self.array.flush()
                self.manifest.write_text(json.dumps({"done": rows.stop, "shape": self.shape}))
        backbone.vision.train(was_training).to(memory_format=torch.contiguous_format)

    def read(self, indices: list[int], mirrored: list[bool] | None = None) -> Tensor:
        """Features [B, T, C] of the pictures at `indices`, float32; `mirrored` asks for the mirror image of some."""
        variants = np.asarray(mirrored, dtype=int) if mirrored is not None else np.zeros(len(indices), dtype=int)
        return torch.from_numpy(self.array[variants, indices].astype(np.float32))
