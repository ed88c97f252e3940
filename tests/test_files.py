"""Files and folders change whole or not at all, follow the umask, and are written by one process at a time."""

import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from unimodal import files


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != files.LOCK
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    (place / "words").mkdir(parents=True)
    (place / "config.json").write_text("old")
    (place / "words" / "a.txt").write_text("old")
    (place / "gone.json").write_text("old")
    (place / "notes.txt").write_text("the user's")
    return place


OLD = {"config.json": "old", "words/a.txt": "old", "gone.json": "old", "notes.txt": "the user's"}
NEW = {"config.json": "new", "words/b.txt": "new", "notes.txt": "the user's"}


def is_ours(name: str) -> bool:
    return name.endswith(".json") or name == "words"


def fill(fresh: Path) -> None:
    (fresh / "words").mkdir()
    (fresh / "config.json").write_text("new")
    (fresh / "words" / "b.txt").write_text("new")


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": "é"})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_is_followed_and_a_folder_refused(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    files.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    with pytest.raises(IsADirectoryError, match="give the path of a file"):
        files.write_text(tmp_path, "x")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        files.write_text(tmp_path / "nowhere" / "x.txt", "x")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path: Path, folder: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "a.txt", "x")
        with files.replacing_contents(folder, is_ours) as fresh:
            fill(fresh)
            os.chmod(fresh / "config.json", 0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "a.txt", folder / "config.json", folder / "words" / "b.txt"):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_ours_are_replaced_and_the_users_files_stay(folder: Path) -> None:
    with files.replacing_contents(folder, is_ours) as fresh:
        fill(fresh)
        assert contents(folder).items() >= OLD.items()
    assert contents(folder) == NEW


def test_the_working_folder_can_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with files.replacing_contents(".", is_ours) as fresh:
        fill(fresh)
    assert contents(Path.cwd()) == NEW


@pytest.mark.parametrize("failing", range(1, 6))
def test_any_rename_may_fail_and_old_or_new_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    renames, rename = iter(range(1, 100)), os.rename

    def refuse(source: Path, target: Path) -> None:
        if next(renames) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), files.replacing_contents(folder, is_ours) as fresh:
        fill(fresh)
    monkeypatch.undo()
    files.restore(folder)
    assert contents(folder) == (OLD if failing <= 4 else NEW)


@pytest.mark.parametrize("killed_at", range(1, 8))
def test_a_kill_at_any_rename_leaves_old_or_new_whole(folder: Path, killed_at: int) -> None:
    child = os.fork()
    if child == 0:
        renames, rename = iter(range(1, 100)), os.rename

        def die(source: Path, target: Path) -> None:
            if next(renames) == killed_at:
                os._exit(0)
            rename(source, target)

        os.rename = die  # type: ignore[assignment]
        with files.replacing_contents(folder, is_ours) as fresh:
            fill(fresh)
        os._exit(0)
    os.waitpid(child, 0)
    files.restore(folder)
    assert contents(folder) == (OLD if killed_at <= 4 else NEW)


def test_a_failed_first_save_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.replacing_contents(tmp_path / "new", is_ours):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_the_second_writer_is_told(folder: Path) -> None:
    told: list[str] = []

    def second() -> None:
        try:
            with files.replacing_contents(folder, is_ours):
                pass
        except files.InUseError as error:
            told.append(str(error))

    with files.replacing_contents(folder, is_ours) as fresh:
        fill(fresh)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert told == [f"{folder} is being written by another process or thread; try again when it is done"]
    assert contents(folder) == NEW


# Errors of the system in words.


def raised(work: Callable[[], object]) -> OSError:
    with pytest.raises(OSError) as caught:
        work()
    return caught.value


def test_errors_of_the_system_are_told_in_words(tmp_path: Path) -> None:
    missing = raised((tmp_path / "gone/a.csv").read_text)
    assert files.in_words(missing) == f"{tmp_path}/gone/a.csv: no such file or directory; check the path"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.csv")
    assert files.in_words(full) == "a.csv: no space left on device; free some of it, or write elsewhere"
    assert files.in_words(OSError(errno.EIO, "the tape is torn", "a.csv")) == "a.csv: the tape is torn"
    assert files.in_words(OSError("of our own")) == "of our own"
    assert files.in_words(ValueError("of another kind")) == "of another kind"


def test_a_closed_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "closed/photos/a.jpg"
    path.parent.mkdir(parents=True)
    path.write_text("a")
    path.chmod(0o600)
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    assert files.in_words(error).startswith(f"{path}: this user may not read or write it (mode 0600, owner ")
    monkeypatch.setattr(os, "access", lambda folder, mode: not Path(folder).is_relative_to(tmp_path / "closed"))
    assert files.in_words(error) == (
        f"{path}: this user may not enter the folder {tmp_path}/closed; ask its owner for the right to do so"
    )
