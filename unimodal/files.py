"""Files and folders that change whole or not at all, and locks between processes.

A file is written beside its place, flushed to the disk and renamed, so that a full disk, an exception or a kill leaves the old file.
The contents of a folder are exchanged inside the folder itself, so that a mount point, the working folder and a folder whose parent
cannot be written are replaced like any other. New files follow the umask, whatever mode the library that wrote them gave them.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# Inside a folder whose contents are being exchanged: what is being written; what is whole and takes its place; what it replaces.
UNFINISHED, READY, OLD = ".unimodal.unfinished", ".unimodal.ready", ".unimodal.old"
LOCK = ".unimodal.lock"
BOOKKEEPING = frozenset({UNFINISHED, READY, OLD, LOCK})


class InUseError(OSError):
    """Another process or thread is writing the same thing."""


@contextmanager
def locked(path: str | Path, what: str, timeout: float = 0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs. The system lets go of the lock when the process ends, in whatever way.

    Args:
        path: the lock file; it is made where missing, and stays.
        what: names in the error what the lock guards, for example "the index photos/index".
        timeout: seconds to wait for another holder; -1 waits for ever.

    Raises:
        InUseError: another process or thread holds the lock.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise InUseError(f"{what} is being written by another process or thread; try again when it is done") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file there takes the place of `path` when the block ends without an exception.

    The path to write to has the suffix of `path`. A link is followed, and a device or a pipe is written directly.

    Raises:
        FileNotFoundError: the folder of `path` is not there.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it, or give another path")
    if path.exists() and not path.is_file():  # /dev/stdout
        yield path
        return
    descriptor, name = tempfile.mkstemp(prefix=".unfinished-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    unfinished = Path(name)
    try:
        yield unfinished
        follow_umask(unfinished)
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. What UTF-8 cannot hold, as of a file name in another encoding, becomes an escape such
    as `\\udce9`, which JSON reads back as it was."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


@contextmanager
def replacing_contents(folder: str | Path, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder to fill. Its entries take the place of the entries of `folder` that are ours when the block ends without an exception.

    What else lies in `folder` stays. An exception leaves `folder` as it was; after a kill, `restore` finishes or undoes the exchange.

    Args:
        folder: the place; it and its parents are made where missing.
        is_ours: whether an entry of this name in `folder` may be replaced.

    Raises:
        InUseError: another process is saving there.
        OSError: the disk is full, or writing fails otherwise; what was there is intact.
    """
    folder = Path(folder).resolve()
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, str(folder)):
        _settle(folder)
        fresh = folder / UNFINISHED
        try:
            fresh.mkdir()
            yield fresh
            filled = [*fresh.rglob("*"), fresh]
            for path in filled:
                if path.is_file():
                    follow_umask(path)
            with ThreadPoolExecutor() as pool:  # a disk takes many files together as fast as a few
                list(pool.map(flush, filled))
            _exchange(folder, is_ours)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if made and {path.name for path in folder.iterdir()} <= {LOCK}:
                shutil.rmtree(folder, ignore_errors=True)


def restore(folder: str | Path) -> None:
    """Finish or undo the exchange of a folder's contents that a kill interrupted, and wait for one that is going on. A folder without one
    is not touched.

    Raises:
        InUseError: the exchange is still going on after a minute.
        OSError: the folder cannot be written, and its contents are not whole.
    """
    folder = Path(folder).resolve()
    if is_changing(folder):
        try:
            with locked(folder / LOCK, str(folder), timeout=60):
                _settle(folder)
        except PermissionError as error:
            raise PermissionError(
                error.errno,
                "a save was interrupted here, and this user may not write the folder to finish it; open it as a user who may",
                str(folder),
            ) from error


def is_changing(folder: Path) -> bool:
    """Whether the contents of a folder are being exchanged, or a kill interrupted that."""
    return (folder / READY).is_dir() or (folder / OLD).is_dir()


def require_readable(path: str | Path) -> None:
    """Meet whatever keeps a file from being read before its content is judged: what cannot be read need not be damaged.

    Raises:
        PermissionError: this user may not read it; the error names the file, its mode and its owner.
        OSError: the system's own error: there is no such file (FileNotFoundError), it is a folder (IsADirectoryError), the disk fails.
    """
    try:
        with open(path, "rb") as file:
            file.read(1)
    except PermissionError as error:
        raise PermissionError(error.errno, f"this user may not read the file{_rights(path)}", str(path)) from error


def in_words(error: BaseException) -> str:
    """The message of an error; of the system's own, such as `[Errno 13] Permission denied: 'x'`, the file, what is wrong and what to do."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | Path) or error.filename2 is not None:
        return str(error)
    why = error.strerror or type(error).__name__
    if why == os.strerror(error.errno or 0):
        why = f"{why[:1].lower()}{why[1:]}"
        if isinstance(error, PermissionError):
            why = _closed(error.filename)
        elif isinstance(error, FileNotFoundError):
            why += "; check the path"
        elif error.errno == errno.ENOSPC:
            why += "; free some of it, or write elsewhere"
    return f"{error.filename}: {why}"


def _closed(path: str | Path) -> str:
    """Why this user may not use a path: a folder above it that may not be entered, or its own mode."""
    for folder in reversed(Path(path).absolute().parents):
        if not os.access(folder, os.X_OK):
            return f"this user may not enter the folder {folder}; ask its owner for the right to do so"
    return f"this user may not read or write it{_rights(path)}"


def _rights(path: str | Path) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "; ask the owner of its folder for the right to enter it"
    return f" (mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}); ask its owner for the right to read it"


def _exchange(folder: Path, is_ours: Callable[[str], bool]) -> None:
    fresh, ready, old = folder / UNFINISHED, folder / READY, folder / OLD
    arriving = {path.name for path in fresh.iterdir()}
    leaving = [path.name for path in folder.iterdir() if path.name not in BOOKKEEPING]
    leaving = [name for name in leaving if name in arriving or is_ours(name)]
    old.mkdir()
    try:
        for name in leaving:
            os.rename(folder / name, old / name)
        os.rename(fresh, ready)  # from here on, a kill leads to the new contents; before, to the old ones
    except OSError:
        _take_back(folder)
        raise
    _settle(folder)


def _settle(folder: Path) -> None:
    """Bring the contents of a folder that is locked to the new state where that is whole, to the old one where not."""
    ready, old = folder / READY, folder / OLD
    if ready.is_dir():
        for path in list(ready.iterdir()):
            os.rename(path, folder / path.name)
        flush(folder)
        ready.rmdir()
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        _take_back(folder)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _take_back(folder: Path) -> None:
    old = folder / OLD
    for path in list(old.iterdir()):
        os.rename(path, folder / path.name)
    old.rmdir()
    flush(folder)


def follow_umask(path: Path) -> None:
    """Give a file the mode of a newly made file: some libraries make files that only their owner can read."""
    probe = path.with_name(f".probe-{os.getpid()}-{os.urandom(4).hex()}")
    descriptor = os.open(
        probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666
    )  # os.umask would change the mask of other threads
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    with suppress(PermissionError):  # a file system without modes
        os.chmod(path, mode)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder, and keeps its names safe by itself
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
