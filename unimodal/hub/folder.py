"""Replacing a checkpoint folder: the old one stays whole until the new one is on the disk.

The new folder is filled beside the old one, flushed, and put in its place by renaming. A full disk or an exception
leaves the old folder as it was. A kill does too, except between two renames, where it leaves the old folder under
another name; the next save or load puts it back (`restore`).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from unimodal.data.writer import WRITER_FOLDER

TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
# Everything a checkpoint may consist of: what is replaced when saving, and what goes up to and comes down from the Hub.
FILES = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "example.safetensors",
    "calibration.json",
    "README.md",
    "preprocessor_config.json",
    "chat_template.jinja",
    *TOKENIZER,
    *(f"{WRITER_FOLDER}/{name}" for name in TOKENIZER),
)
# What another library reads beside a checkpoint (`unimodal.adapters`): it goes up to the Hub along with one.
COMPANIONS = ("modules.json", "config_sentence_transformers.json")


def is_checkpoint_file(name: str) -> bool:
    """Whether a file or folder of this name may be part of a checkpoint."""
    return name == WRITER_FOLDER or any(fnmatch(name, pattern) for pattern in FILES)


@contextmanager
def replacing(folder: str | Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends without an exception.

    What else lies in `folder` (reports, logs, other checkpoints' folders) moves along into the new one.

    Args:
        folder: the place; its parents are made where missing.
        is_ours: whether an existing folder holds a checkpoint of ours, which may be replaced.

    Raises:
        FileExistsError: if `folder` is a file, or files with a checkpoint's names that are not ours.
        OSError: if the disk is full or writing fails otherwise; the old checkpoint is intact.
    """
    folder = Path(folder).resolve()
    restore(folder)
    foreign = [path.name for path in folder.iterdir() if is_checkpoint_file(path.name)] if folder.is_dir() else []
    if (folder.exists() and not folder.is_dir()) or (foreign and not is_ours(folder)):
        what = f"a folder with {', '.join(sorted(foreign))} that unimodal did not write" if foreign else "a file"
        raise FileExistsError(f"{folder} is {what}; saving there would overwrite it, give another folder")
    fresh, old = _beside(folder)
    _remove(fresh)
    if old.exists():
        _clear_away(old, folder)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint could not be written to {folder}: {error}; "
            "what was there before is intact. Make room or give another folder, and save again"
        ) from error
    finally:
        restore(folder)
        _remove(fresh)
    _flush(folder.parent)
    if old.exists():
        _clear_away(old, folder)


def restore(folder: Path) -> None:
    """Put back the old folder where a kill between the two renames left none."""
    _, old = _beside(folder)
    if old.exists() and not folder.exists():
        with suppress(FileNotFoundError):  # another process was first
            old.rename(folder)


def _beside(folder: Path) -> tuple[Path, Path]:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _clear_away(old: Path, folder: Path) -> None:
    """Remove the old checkpoint; what was not part of it moves to the new folder."""
    for path in old.iterdir():
        if not is_checkpoint_file(path.name) and not (folder / path.name).exists():
            path.rename(folder / path.name)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
