"""A cache of what a frozen backbone makes of a split: its towers run once per picture and once per caption, every later epoch reads.

Kept are the towers' raw features, so that projections, bridge and heads still train. The cache knows the data by the split's fingerprint
(which names its folder), the tower by a hash of its weights and the preprocessing by a hash of its settings: it is refused where either is
another. An interrupted build goes on where it stopped (`unimodal.data.store`).

Legend: B images, M texts, T tokens of an image, L text length, C width of a tower.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unimodal.backbones import Backbone, move_pixels
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.data.store import Precision, TokenStore
from unimodal.tuning import fingerprint, in_use, own

IMAGES, TEXTS = 32, 256  # read at a time


def _tower(backbone: Backbone, names: Any, kind: str) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in backbone.tower(kind))]


def trained(backbone: Backbone, kind: str) -> list[str]:
    """Parameters that require a gradient among those that the features of `kind` depend on."""
    return _tower(backbone, [name for name, p in backbone.named_parameters() if p.requires_grad], kind)


def tower_fingerprint(backbone: Backbone, kind: str) -> str:
    """Hash of what the features of `kind` depend on, adapters in use included: 16 hex digits."""
    state = own(backbone.state_dict(), in_use(backbone))
    return fingerprint({name: state[name] for name in _tower(backbone, state, kind)})


def preprocessing_fingerprint(processor: Processor, kind: str) -> str:
    """Hash of the settings, for texts of the tokenizer too: 16 hex digits."""
    parts: list[Any] = [processor.settings()]
    if kind == "text":
        tokenizer: Any = processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts.append(tokenizer.get_vocab() if backend is None else json.loads(backend.to_str()))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class _Features:
    """Features of one kind of item of a split, opened or built on construction.

    Args:
        folder: where caches live.
        pairs: the split.
        backbone: what reads it.
        processor: its preprocessing.
        kind: `image` or `text`.
        count: rows.
        precision: see `TokenStore`.
        variant: what else is special about the items, for the folder's name.
        device: where the backbone runs.
        autocast: the lower precision in which the backbone runs, as it would in the training that reads the cache; None is float32.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Pairs,
        backbone: Backbone,
        processor: Processor,
        *,
        kind: str,
        count: int,
        precision: Precision,
        variant: str = "",
        device: torch.device | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.pairs, self.processor = pairs, processor
        self.what = f"{kind} features of {pairs.name} {pairs.split}{variant}"
        about = {
            "features": self.what,
            "split": pairs.fingerprint(),
            "backbone": tower_fingerprint(backbone, kind),
            "preprocessing": preprocessing_fingerprint(processor, kind),
        }
        if autocast is not None:
            about["computed"] = str(autocast)
        name = re.sub(r"\W+", "-", f"{kind} {pairs.name} {pairs.split}{variant} {about['split']} {precision}")
        self.store = TokenStore(folder / name, about, count, precision)
        if self.store.done < count:
            with self.store.writing(), _reading(backbone, device, autocast) as place:
                self._build(backbone, place)

    def _build(self, backbone: Backbone, device: torch.device) -> None:
        raise NotImplementedError(f"{type(self).__name__} is a cache that builds nothing; implement _build")

    def _batches(self, size: int) -> Iterator[range]:
        """The rows that are not there yet."""
        starts = range(self.store.done, self.store.count, size)
        for start in track(starts, description=self.what, console=Console(stderr=True)):
            yield range(start, min(start + size, self.store.count))


class ImageFeatures(_Features):
    """Features of the pictures of a split, or of their mirror images; arguments as `_Features`."""

    def __init__(
        self,
        folder: Path,
        pairs: Pairs,
        backbone: Backbone,
        processor: Processor,
        *,
        mirrored: bool = False,
        **settings: Any,
    ) -> None:
        self.mirrored = mirrored
        variant = " mirrored" if mirrored else ""
        super().__init__(
            folder, pairs, backbone, processor, kind="image", count=len(pairs), variant=variant, **settings
        )
        lengths = {int(length) for length in self.store.offsets[1:] - self.store.offsets[:-1]}
        self.longest, self.ragged = max(lengths), len(lengths) > 1

    def _build(self, backbone: Backbone, device: torch.device) -> None:
        for rows in self._batches(IMAGES):
            arrays = [self.processor.image_array(self.pairs.image(i)) for i in rows]
            pixels = self.processor.pixels([array.flip(-1) for array in arrays] if self.mirrored else arrays)
            pixels = move_pixels(pixels, device)
            if isinstance(pixels, Tensor):  # convolutions on a CPU are several times faster so
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            features, mask = backbone.image_features(pixels).float(), backbone.image_mask(pixels)
            real = list(features) if mask is None else [row[kept] for row, kept in zip(features, mask)]
            self.store.write(real, [self.pairs.key(i) for i in rows])

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Features [T, C] of the pictures in these rows."""
        return self.store.read(rows)


class TextFeatures(_Features):
    """Features of every different caption of a split; arguments as `_Features`."""

    def __init__(self, folder: Path, pairs: Pairs, backbone: Backbone, processor: Processor, **settings: Any) -> None:
        self.captions = list(dict.fromkeys(text for i in range(len(pairs)) for text in pairs.captions(i)))
        self.row = {text: row for row, text in enumerate(self.captions)}
        # A tower that reads its padding (SigLIP) gets every text in one length, and all of it counts.
        self.padded = not bool(processor.texts(["a"])[1].all())
        super().__init__(folder, pairs, backbone, processor, kind="text", count=len(self.captions), **settings)

    def _build(self, backbone: Backbone, device: torch.device) -> None:
        for rows in self._batches(TEXTS):
            ids, mask = self.processor.texts(self.captions[rows.start : rows.stop])
            features = backbone.text_features(ids.to(device), mask.to(device)).float().cpu()
            real = list(features) if self.padded else [row[kept] for row, kept in zip(features, mask)]
            self.store.write(real, [f"caption {self.captions[row]!r}" for row in rows])

    def read(self, texts: Sequence[str], mask: Tensor) -> Tensor | None:
        """Features [M, L, C] at the places of `mask` [M, L], zeros elsewhere; None where a text is no caption of the split."""
        if not all(text in self.row for text in texts):
            return None
        rows = self.store.read([self.row[text] for text in texts])
        if self.padded:
            return torch.stack(rows)
        out = torch.zeros(*mask.shape, self.store.width)
        out[mask] = torch.cat(rows)
        return out


class SplitFeatures:
    """What is cached of a split.

    Args:
        images: features of its pictures, if any.
        mirrored: features of their mirror images, if any.
        texts: features of its captions, if any.
    """

    def __init__(
        self,
        images: ImageFeatures | None = None,
        mirrored: ImageFeatures | None = None,
        texts: TextFeatures | None = None,
    ) -> None:
        self.images, self.mirrored, self.texts = images, mirrored, texts

    def image(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> dict[str, Tensor]:
        """Batch keys `image_features` [B, T, C] and, where pictures have different numbers of tokens, `image_features_mask` [B, T]; T is
        the longest of the split."""
        assert self.images is not None
        flags = [False] * len(rows) if mirrored is None else mirrored
        kinds = [self.mirrored if flag and self.mirrored else self.images for flag in flags]
        tokens = [kind.read([row])[0] for kind, row in zip(kinds, rows)]
        if not self.images.ragged:
            return {"image_features": torch.stack(tokens)}
        longest = max(kind.longest for kind in (self.images, self.mirrored) if kind is not None)
        padded = pad_sequence([*tokens, tokens[0].new_zeros(longest, tokens[0].shape[1])], batch_first=True)[:-1]
        lengths = torch.tensor([len(row) for row in tokens])
        return {"image_features": padded, "image_features_mask": torch.arange(longest) < lengths[:, None]}

    def text(self, texts: Sequence[str], mask: Tensor) -> Tensor | None:
        """Features [M, L, C] of texts with their mask [M, L]; None where they are not all cached."""
        return None if self.texts is None else self.texts.read(texts, mask)


@contextmanager
def _reading(backbone: Backbone, device: torch.device | None, autocast: torch.dtype | None) -> Iterator[torch.device]:
    """The backbone as it reads a frozen split: on a device, in evaluation mode, without gradient, in the precision of the training."""
    modes = {module: module.training for module in backbone.modules()}
    home = next(backbone.parameters()).device
    place = home if device is None else device
    try:
        _lay_out(backbone.eval().to(place), torch.channels_last)
        with torch.no_grad(), torch.autocast(place.type, autocast, enabled=autocast is not None):
            yield place
    finally:
        _lay_out(backbone.to(home), torch.contiguous_format)
        for module, mode in modes.items():
            module.training = mode


def _lay_out(backbone: Backbone, layout: torch.memory_format) -> None:
    for parameter in backbone.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
