"""What a verb writes: results on standard output, messages on standard error, and files that take nobody's place.

A verb checks its output before it works. It makes the folders that lead to its output, writes beside it and renames. It replaces what is
there only under `--overwrite`, and what it was given to read never.
"""

import argparse
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def say(message: str) -> None:
    """A line on standard error."""
    print(message, file=sys.stderr)


def print_json(content: Any) -> None:
    """One JSON document on standard output, in UTF-8 whatever the locale; a number that is none is null."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    print(json.dumps(_plain(content), ensure_ascii=False, indent=1, allow_nan=False))


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, Path):
        return str(content)
    return None if isinstance(content, float) and not math.isfinite(content) else content


def add_json(verb: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    verb.add_argument("--json", action="store_true", help="print the results as one JSON document, all digits kept")


def add_overwrite(verb: argparse.ArgumentParser) -> None:
    """Add `--overwrite`."""
    verb.add_argument("--overwrite", action="store_true", help="replace what is at --out")


def require_free_file(
    path: Path, suffixes: Sequence[str], *, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Refuse a file that a verb cannot write, or that would take the place of another.

    Args:
        path: the file; a device or a pipe is free.
        suffixes: what its name may end in, whatever the case.
        overwrite: whether it may replace a file.
        inputs: what the verb reads; it may be text, too. A file of these is never replaced.

    Raises:
        ValueError: another ending, or an input.
        FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError: what is there stays as it is.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the path of a file")
    _require_no_input(path, inputs)
    if os.path.lexists(path) and not overwrite and (path.is_file() or not path.exists()):
        raise FileExistsError(f"{path} exists; give another --out, or --overwrite to replace it")
    _require_writable(path.parent)


def require_free_folder(
    folder: Path,
    names: Sequence[str] | None,
    *,
    overwrite: bool | None = None,
    inputs: Iterable[str | Path | None] = (),
    is_ours: Callable[[Path], bool] = lambda folder: False,
) -> None:
    """Refuse a folder that a verb cannot write to, or where it would take the place of something.

    Args:
        folder: the folder, which need not be there.
        names: what the verb writes in it; what else is there stays. None for a verb that wants an empty folder.
        overwrite: whether entries of these names may be replaced; None where the verb has no such option.
        inputs: what the verb reads; none of these is written to.
        is_ours: whether entries of these names are what an earlier run of the verb left, which is replaced.

    Raises:
        ValueError: an input.
        FileExistsError, NotADirectoryError, PermissionError: what is there stays as it is.
    """
    _require_no_input(folder, inputs)
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
    if folder.is_dir():
        held = sorted(path.name for path in folder.iterdir() if names is None or path.name in names)
        if held and not overwrite and not is_ours(folder):
            advice = "give another folder" + ("" if overwrite is None else ", or --overwrite to replace them")
            raise FileExistsError(f"{folder} holds {', '.join(held[:5])}; {advice}")
    _require_writable(folder)


def _require_no_input(path: Path, inputs: Iterable[str | Path | None]) -> None:
    for one in inputs:
        if one is not None and os.path.exists(one) and path.exists() and os.path.samefile(one, path):
            raise ValueError(f"{path} is what is read; give another place")


def _require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to or, where it is not there, cannot be made."""
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder; give another place")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(f"{there} cannot be written to ({error.strerror}); give another place") from error
