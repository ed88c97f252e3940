"""Image-text pairs into files, from any reader: Karpathy's JSON with a folder of pictures, or tar shards.

Pictures are written as PNG, so that what `unimodal.data.readers` reads back is equal to the last pixel.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unimodal.data.pairs import Pairs, require_captions
from unimodal.data.readers import Listed
from unimodal.files import BOOKKEEPING, replacing_contents, write_json


def write_karpathy(pairs_by_split: Mapping[str, Pairs], folder: str | Path) -> Path:
    """Write splits as `dataset.json` and PNG files in `images/`, for `KarpathyJson`; gives the path of the JSON file.

    Raises:
        ValueError: no split is given, or one has no captions.
        FileExistsError: the folder holds something already.
    """
    if not pairs_by_split:
        raise ValueError("write_karpathy: got no split; give at least one")
    for pairs in pairs_by_split.values():
        require_captions(pairs, "write_karpathy")
    images: list[dict[str, Any]] = []
    with _new_folder(folder) as fresh:
        (fresh / "images").mkdir()
        for split, pairs in pairs_by_split.items():
            for i in range(len(pairs)):
                filename = f"{split}-{i:06d}.png"
                pairs.image(i).save(fresh / "images" / filename)
                sentences: list[dict[str, Any]] = [{"raw": caption} for caption in pairs.captions(i)]
                entry = {"filename": filename, "split": split, "imgid": len(images), "sentences": sentences}
                if isinstance(pairs, Listed) and pairs.samples[i].coco_ids:
                    entry["cocoid"], ids = pairs.coco_ids(i)
                    sentences[:] = [{**one, "sentid": number} for one, number in zip(sentences, ids)]
                images.append(entry | _labels(pairs, i))
        write_json(fresh / "dataset.json", {"dataset": next(iter(pairs_by_split.values())).name, "images": images})
    return Path(folder) / "dataset.json"


def write_webdataset(pairs: Pairs, folder: str | Path, shard_size: int = 1000) -> list[Path]:
    """Write a split as tar shards of `shard_size` samples (PNG and JSON), for `WebDatasetTars`; gives their paths.

    Raises:
        ValueError: shard_size is less than 1, or the split has no captions.
        FileExistsError: the folder holds something already.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
    require_captions(pairs, "write_webdataset")
    names = [f"{pairs.split}-{shard:05d}.tar" for shard in range(-(-len(pairs) // shard_size))]
    with _new_folder(folder) as fresh:
        for shard, name in enumerate(names):
            with tarfile.open(fresh / name, "w") as tar:
                for i in range(shard * shard_size, min((shard + 1) * shard_size, len(pairs))):
                    picture = io.BytesIO()
                    pairs.image(i).save(picture, "PNG")
                    words = {"captions": pairs.captions(i)} | _labels(pairs, i)
                    text = json.dumps(words, ensure_ascii=False).encode()
                    for suffix, content in (("json", text), ("png", picture.getvalue())):
                        member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return [Path(folder) / name for name in names]


def _labels(pairs: Pairs, i: int) -> dict[str, list[str]]:
    labels = sorted(pairs.labels(i))
    return {"labels": labels} if labels else {}


@contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, whose contents come to lie in `folder` all at once, when the block ends without an exception."""
    folder = Path(folder)
    if folder.exists() and any(path.name not in BOOKKEEPING for path in folder.iterdir()):
        raise FileExistsError(f"{folder} holds files already; choose a new folder")
    with replacing_contents(folder, lambda name: False) as fresh:
        yield fresh
