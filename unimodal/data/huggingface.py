"""Image-text pairs from Hugging Face `datasets` (Lhoest et al. 2021, arXiv:2109.02846): in memory, on disk or from the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimodal import arguments
from unimodal.data.captions import as_captions, is_missing, usual_captions
from unimodal.data.readers import Listed, OnError, Sample


class HuggingFaceDataset(Listed):
    """A `datasets.Dataset`, read at random places. No code of a dataset is run.

    Args:
        dataset: a `datasets.Dataset`; a folder that `save_to_disk` wrote; or what `datasets.load_dataset` takes, a folder
            of files or a Hub id.
        name: configuration of a dataset that has several.
        split: such as "test" or "train[:1000]"; needed where there are several, and the name of a dataset in memory.
        revision: branch, tag or commit on the Hub.
        image: column of the picture, of type `datasets.Image`.
        captions: column of a caption or of a list of them, or several columns, of which some cells may be empty; by default as for
            `CsvTable`.
        labels: column of the picture's category or of a list of them; class numbers become their names.
        key: column that names the picture: rows of equal key are one image with several captions. By default each row is
            an image of its own, named by its number.
        on_error: as for `KarpathyJson`.

    Raises:
        ImportError: the package `datasets` is not installed.
        TypeError: a streamed dataset, or another object.
        ValueError: no such column or split, a column that holds no pictures, a bad caption.
    """

    def __init__(
        self,
        dataset: Any,
        name: str | None = None,
        *,
        split: str | None = None,
        revision: str | None = None,
        image: str = "image",
        captions: str | list[str] | None = None,
        labels: str | None = None,
        key: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{error}; pip install 'unimodal[datasets]' to read Hugging Face datasets") from error
        for value, argument in (
            (name, "name"),
            (split, "split"),
            (revision, "revision"),
            (labels, "labels"),
            (key, "key"),
        ):
            arguments.optional(arguments.text, value, argument)
        arguments.text(image, "image")
        if captions is not None and not isinstance(captions, str):
            columns = arguments.listed(captions, "captions", "columns")
            captions = [arguments.text(one, f"captions[{i}]") for i, one in enumerate(columns)]
        table = _one_split(_load(dataset, name, split, revision), split)
        if not isinstance(table, datasets.Dataset):
            raise TypeError(
                f"expected a datasets.Dataset, a folder or a Hub id, got {type(table).__name__}; a streamed dataset has no "
                "random access, load it with streaming=False"
            )
        table = table.with_format(None)
        texts = (
            [captions]
            if isinstance(captions, str)
            else list(captions or usual_captions(table.column_names, "the dataset"))
        )
        for column in (image, *texts, *filter(None, (labels, key))):
            if column not in table.column_names:
                raise ValueError(f"there is no column {column!r}; the columns are {table.column_names}")
        if not isinstance(table.features[image], datasets.Image):
            raise ValueError(
                f"column {image!r} holds {table.features[image]}, not pictures; "
                f"dataset.cast_column({image!r}, datasets.Image()) makes pictures of paths and bytes"
            )
        # Undecoded: load_image has limits and messages of its own.
        self.pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self.column = image
        found: dict[str, tuple[int, list[Any], set[str]]] = {}
        for row, (group, said, tags) in enumerate(_rows(table, texts, labels, key)):
            _, all_said, all_tags = found.setdefault(group, (row, [], set()))
            all_said += said
            all_tags |= tags
        samples = [
            Sample(group, said, Path(), start=row, labels=frozenset(tags)) for group, (row, said, tags) in found.items()
        ]
        source = str(dataset) if isinstance(dataset, str | Path) else table.info.dataset_name or "dataset"
        super().__init__(Path(source).name, split or str(table.split or "all"), samples, on_error)

    def source(self, sample: Sample) -> Path | bytes:
        picture = self.pictures[sample.start][self.column]
        if picture is None:
            raise ValueError(f"{sample.key}: column {self.column!r} holds no picture")
        return Path(picture["path"]) if picture["bytes"] is None else picture["bytes"]


def _load(dataset: Any, name: str | None, split: str | None, revision: str | None) -> Any:
    import datasets

    if not isinstance(dataset, str | Path):
        return dataset
    if is_saved(Path(dataset)):
        return datasets.load_from_disk(str(dataset))
    return datasets.load_dataset(str(dataset), name, split=split, revision=revision)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _one_split(dataset: Any, split: str | None) -> Any:
    if not isinstance(dataset, dict):
        return dataset
    if split is None and len(dataset) == 1:
        return next(iter(dataset.values()))
    if split not in dataset:
        raise ValueError(f"there is no split {split!r}; it has: {', '.join(map(str, dataset))}")
    return dataset[split]


def _rows(
    table: Any, texts: list[str], labels: str | None, key: str | None
) -> Iterator[tuple[str, list[Any], set[str]]]:
    """(key, captions, labels) of every row."""
    feature = table.features[labels] if labels else None
    names = getattr(getattr(feature, "feature", feature), "int2str", str)  # of class numbers, alone or in a list
    columns = [*texts, *filter(None, (labels, key))]
    for row, record in enumerate(table.select_columns(list(dict.fromkeys(columns)))):
        cells = [record[column] for column in texts]
        if len(cells) > 1:  # one of several columns may have nothing to say
            cells = [cell for cell in cells if not is_missing(cell)]
        said = [text for cell in cells for text in as_captions(cell)]
        if key and is_missing(record[key]):
            raise ValueError(f"row {row}: column {key!r} is {record[key]!r}; give every picture a name")
        tags = _listed(record[labels]) if labels else []
        tagged = {names(tag) if isinstance(tag, int) else str(tag) for tag in tags if tag is not None}
        yield str(record[key]) if key else f"{row:06d}", said, tagged


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
