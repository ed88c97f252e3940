"""Image-text pairs from COCO's own annotation files, `captions_train2017.json` and the like."""

from pathlib import Path
from typing import Any

from unimodal import arguments
from unimodal.data.readers import Listed, OnError, Sample, first_captions, inside, relative
from unimodal.data.text import parse_json


class CocoCaptions(Listed):
    """COCO Captions as published (Chen et al. 2015, arXiv:1504.00325), and sets in its format such as nocaps: `images` with an `id` and a
    `file_name`, `annotations` with an `id`, an `image_id` and a `caption`.

    Images come in the order of the file, the captions of each likewise: five of most images, six or seven of some. Karpathy's split of
    COCO, which the literature compares on, is another file (`KarpathyJson`).

    Args:
        path: the file, which holds one split.
        root: folder of the pictures; by default `../val2017` of `annotations/captions_val2017.json`, where there is one, else `val2017`
            beside the file.
        split: what the split is called; by default `val2017` in `captions_val2017.json`.
        captions_per_image: as for `KarpathyJson`.
        on_error: as for `KarpathyJson`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, two entries of one id, a caption of no image, a bad caption, or a path outside the root.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        *,
        split: str | None = None,
        captions_per_image: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        path = arguments.path(path, "path")
        split = arguments.optional(arguments.text, split, "split")
        name = split_of(path)
        beside = path.absolute().parent
        places = [folder / name for folder in (beside.parent, beside)]
        root = (
            arguments.path(root, "root")
            if root is not None
            else next((place for place in places if place.is_dir()), places[-1])
        )
        data = parse_json(path.read_bytes(), str(path))
        images, annotations = (_entries(data, part, keys, path) for part, keys in PARTS.items())
        captions: dict[int, list[tuple[int, Any]]] = {one["id"]: [] for one in images}
        for i, one in enumerate(annotations):
            if one["image_id"] not in captions:
                raise ValueError(
                    f"{path}: annotations[{i}] is of image {one['image_id']}, which is not among the images"
                )
            captions[one["image_id"]].append((one["id"], one["caption"]))
        samples = []
        for one in images:
            key = relative(one["file_name"], root)
            ids, texts = [list(part) for part in zip(*captions[one["id"]])] or ([], [])
            samples.append(Sample(key, texts, inside(root, key), coco_ids=(one["id"], *ids)))
        split = split or name
        super().__init__("coco", split, first_captions(samples, captions_per_image, f"coco {split}"), on_error)


PARTS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "annotations": {"id": int, "image_id": int, "caption": object},
}


def split_of(path: Path) -> str:
    """What the name of a file calls its split: `val2017` in `captions_val2017.json`."""
    return path.stem.removeprefix("captions_")


def _entries(data: Any, part: str, keys: dict[str, type], path: Path) -> list[dict[str, Any]]:
    """A list of COCO's file, of whose entries none lacks a key and no two have one id."""
    entries = data.get(part) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected an object with the lists 'images' and 'annotations', got {data!r:.60}")
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(
            key in entry and isinstance(entry[key], kind) for key, kind in keys.items()
        ):
            raise ValueError(
                f"{path}: {part}[{i}] needs {', '.join(keys)}, got {entry!r:.80}; COCO's captions are in captions_train2017.json and "
                "captions_val2017.json, other annotations have none"
            )
        if entry["id"] in seen:
            raise ValueError(f"{path}: {part}[{i}] has the id {entry['id']} of an earlier entry; give each its own")
        seen.add(entry["id"])
    return entries
