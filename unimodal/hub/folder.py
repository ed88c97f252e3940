"""The folder of a checkpoint: which files are part of it, how it is replaced, and how it is read while others may replace it.

What is saved takes the place of the older checkpoint inside the folder (`unimodal.files.replacing_contents`), so that the folder itself may
be a mount point, the working folder, or lie in one that cannot be written.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from unimodal import files
from unimodal.data.writer import WRITER_FOLDER

T = TypeVar("T")

TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
# What a processor writes: what it reads depends on every byte of it.
PROCESSOR = (
    "preprocessor_config.json",
    "chat_template.jinja",
    *TOKENIZER,
    *(f"{WRITER_FOLDER}/{name}" for name in TOKENIZER),
)
EXAMPLE, CALIBRATION = "example.safetensors", "calibration.json"
# Everything a checkpoint may consist of: what is replaced when saving, and what goes up to and comes down from the Hub.
FILES = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    EXAMPLE,
    CALIBRATION,
    "README.md",
    *PROCESSOR,
)
# What another library reads beside a checkpoint (`unimodal.adapters`): it goes up to the Hub along with one.
COMPANIONS = ("modules.json", "config_sentence_transformers.json")


def is_checkpoint_file(name: str) -> bool:
    """Whether a file or folder of this name may be part of a checkpoint."""
    return name == WRITER_FOLDER or any(fnmatch(name, pattern) for pattern in FILES)


@contextmanager
def replacing(folder: str | Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder to fill; its files take the place of the checkpoint in `folder` when the block ends without an exception.

    What else lies in `folder` (reports, logs, other checkpoints' folders) stays.

    Args:
        folder: the place; it and its parents are made where missing.
        is_ours: whether an existing folder holds a checkpoint of ours, which may be replaced.

    Raises:
        FileExistsError: if `folder` is a file, or files with a checkpoint's names that are not ours.
        unimodal.files.InUseError: another process is saving there.
        OSError: if the disk is full or writing fails otherwise; the old checkpoint is intact.
    """
    folder = Path(folder).resolve()
    restore(folder)
    foreign = [path.name for path in folder.iterdir() if is_checkpoint_file(path.name)] if folder.is_dir() else []
    if (folder.exists() and not folder.is_dir()) or (foreign and not is_ours(folder)):
        what = f"a folder with {', '.join(sorted(foreign))} that unimodal did not write" if foreign else "a file"
        raise FileExistsError(f"{folder} is {what}; saving there would overwrite it, give another folder")
    try:
        with files.replacing_contents(folder, is_checkpoint_file) as fresh:
            yield fresh
    except files.InUseError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint could not be written to {folder}: {error}; "
            "what was there before is intact. Make room or give another folder, and save again"
        ) from error


def restore(folder: str | Path) -> None:
    """Finish or undo a save that was interrupted, and wait for one that is going on.

    Raises:
        OSError: as `unimodal.files.restore`.
    """
    folder = Path(folder).resolve()
    # Former versions renamed the folder itself, and left it under this name when a kill came between two renames.
    former = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and former.is_dir():
        os.rename(former, folder)
    files.restore(folder)


def require_readable_files(folder: Path) -> None:
    """Meet whatever keeps a file of a checkpoint, or of a published model, from being read before anything is judged.

    Raises:
        OSError: as `unimodal.files.require_readable`.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja"):
            files.require_readable(path)


def read_whole(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of a folder, read again where a save replaced its files meanwhile: never a mixture of two checkpoints."""
    while True:
        restore(folder)
        before = _state(folder)
        try:
            result = read()
        except (OSError, ValueError):
            if _state(folder) == before:
                raise
        else:
            if _state(folder) == before:
                return result


def _state(folder: Path) -> tuple[bool, tuple[int, ...]]:
    """Whether a save is replacing files, and which config.json there is: every save writes a new one."""
    try:
        status = os.stat(folder / "config.json")
    except OSError:
        return files.is_changing(folder), ()
    return files.is_changing(folder), (status.st_ino, status.st_mtime_ns, status.st_size)
