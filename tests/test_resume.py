"""What an interruption leaves: a kill at any write keeps a checkpoint that goes on, a signal saves first, a damaged file is told or
replaced by the one before it, and what comes from elsewhere runs no code."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from toyrun import STEPS, plain, tiny_stage, write_recipe

from unimodal import cli, files
from unimodal.hub import load_checkpoint
from unimodal.hub.training import check_training_checkpoint
from unimodal.tasks import LocalCheckpoints, Resume
from unimodal.tasks.resume import NEWEST, PREVIOUS, find_resume

KILLED = 77


class Kill(BaseException):
    """Ends a training in the middle, as a kill does: nothing is saved on the way out."""


class At(pl.Callback):
    """Does something after so many steps of a training."""

    step, action = 0, staticmethod(lambda: None)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == At.step:
            At.action()


def _raise() -> None:
    raise Kill


def recipe(folder: Path, **trainer: Any) -> list[str]:
    callbacks = [{"class_path": f"{__name__}.At"}, *trainer.pop("callbacks", [])]
    return write_recipe(folder / "recipe.yaml", tiny_stage(folder / "out", callbacks=callbacks, **trainer))


def run(command: list[str], step: int = -1, action: Callable[[], Any] = _raise, *words: str) -> int:
    """Train, doing something after a step; a killed run has the status of a killed process."""
    At.step, At.action = step, staticmethod(action)
    try:
        return cli.main([*command, *words])
    except Kill:
        return -signal.SIGKILL


def losses(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/align/losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The losses of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(recipe(folder)) == 0
    assert [row["step"] for row in losses(folder)] == list(range(STEPS))
    return losses(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after step 5, with checkpoints of steps 4 and 2."""
    folder = tmp_path_factory.mktemp("killed")
    assert run(recipe(folder), 5) == -signal.SIGKILL
    return folder


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """A copy of that folder, whose recipe runs in it."""
    shutil.copytree(killed, tmp_path / "run")
    recipe(tmp_path / "run")
    return tmp_path / "run"


def again(folder: Path) -> list[str]:
    return ["fit", "--config", str(folder / "recipe.yaml")]


# Kills.


@pytest.mark.parametrize("operation", ["replace", "link", "fsync"])
def test_a_kill_at_any_change_of_a_file_leaves_a_checkpoint(operation: str, tmp_path: Path) -> None:
    """The process ends at the n-th such call, for every n, while it saves one checkpoint after another."""
    io, real = LocalCheckpoints(), getattr(os, operation)

    class Saving:
        is_global_zero, fast_dev_run, default_root_dir, strategy = (
            True,
            False,
            tmp_path,
            type("S", (), {"barrier": lambda self: None})(),
        )

        def save_checkpoint(self, path: Path, weights_only: bool) -> None:
            io.save_checkpoint({"state_dict": {}, "step": self.step}, path)

    def end_at(calls: int) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls == 0:
                os._exit(KILLED)
            return real(*given, **named)

        return counted

    def step(path: Path | None) -> int:
        return 0 if path is None else io.load_checkpoint(path)["step"]

    saving, before, call, ended = Saving(), 0, 0, False
    while not ended:
        call += 1
        child = os.fork()
        if child == 0:
            setattr(os, operation, end_at(call))
            for saving.step in range(before + 1, before + 4):
                Resume()._save(saving)  # type: ignore[arg-type]
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        found = step(find_resume(tmp_path))
        assert before <= found <= before + 3
        if before:
            assert find_resume(tmp_path) == tmp_path / NEWEST  # a reader never meets a folder without one
        before = found
    assert call > 3 and before > 1


@pytest.mark.parametrize("kept", [0, 1000], ids=["empty", "cut"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(left: Path, kept: int, whole: list[Any]) -> None:
    resume = left / "out/align" / NEWEST
    resume.write_bytes(resume.read_bytes()[:kept])
    with pytest.warns(
        UserWarning, match=r"resume.ckpt \(\d+ bytes\) is cut short .* the training goes on from .*previous"
    ):
        assert run(again(left)) == 0
    assert losses(left) == whole


def test_when_both_are_damaged_the_run_says_so(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (NEWEST, PREVIOUS):
        (left / "out/align" / name).write_bytes(b"")
    assert run(again(left)) == 2
    error = capsys.readouterr().err
    assert error.count("is cut short or no training checkpoint") == 2
    assert (
        "resume.ckpt, and the same command trains from the start" in " ".join(error.split())
        and "Traceback" not in error
    )


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "resume.ckpt")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError):
        check_training_checkpoint(left / "out/align" / NEWEST)


def test_what_a_kill_left_half_written_is_no_matter(left: Path, whole: list[Any]) -> None:
    stage = left / "out/align"
    (stage / "resume.unfinished.ckpt").write_bytes(b"half")
    with open(stage / "losses.jsonl", "a") as log:
        log.write('{"step": 5, "itc"')
    assert run(again(left)) == 0
    assert losses(left) == whole
    assert not [path.name for path in stage.iterdir() if "resume" in path.name or "unfinished" in path.name]


# Signals.


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 3)])
def test_a_signal_saves_and_has_its_status(
    number: signal.Signals, step: int, tmp_path: Path, whole: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    command = recipe(tmp_path)
    assert run(command, step, lambda: os.kill(os.getpid(), number)) == 128 + number
    assert signal.getsignal(number) == handler
    told = capsys.readouterr()
    assert "a second signal ends it at once" in told.out
    assert f"{number.name} stopped the training after step {step}; the same command goes on from" in told.err
    assert run(command) == 0
    assert losses(tmp_path) == whole


def test_a_signal_in_the_last_step_saves_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = recipe(tmp_path)
    assert run(command, STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert "that was the last one, its weights are in" in capsys.readouterr().err
    load_checkpoint(tmp_path / "out/align/model")
    assert run(command, 1, _raise) == 0, "the stage was trained once more"


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)

    child = os.fork()
    if child == 0:
        run(recipe(tmp_path), 1, twice)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_plain_run_goes_on_from_the_path_that_it_names(
    tmp_path: Path, whole: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = plain(tiny_stage(tmp_path, callbacks=[{"class_path": f"{__name__}.At"}]), tmp_path / "out/align")
    command = write_recipe(tmp_path / "plain.yaml", settings)
    assert run(command, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    path = str(tmp_path / "out/align" / NEWEST)
    assert f"--ckpt_path {path} goes on from there" in capsys.readouterr().err
    assert run(command, -1, _raise, "--ckpt_path", path) == 0
    assert losses(tmp_path) == whole


# Checkpoints from elsewhere.


class Code:
    """Pickles to a call of the system's shell."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plain")
    return write_recipe(folder / "plain.yaml", plain(tiny_stage(folder), folder / "out"))[1:]


@pytest.mark.parametrize(
    ("verb", "path", "told"),
    [
        *((verb, f"{scheme}x/y.ckpt", "is an address, expected the path of a training checkpoint on this machine")
          for verb, scheme in (("fit", "http://"), ("validate", "https://"), ("test", "s3://"), ("predict", "hf://"), ("fit", "file://"),
                               ("validate", "registry:"), ("validate", "memory://"))),
        ("fit", "code.ckpt", "without running code: it asks for posix.system"),
        ("fit", "old.ckpt", "is cut short or no training checkpoint"),
        ("validate", "empty.ckpt", r"(0 bytes) is cut short or no training checkpoint"),
        ("test", "other.ckpt", "holds no weights of a model in training"),
        ("predict", "list.ckpt", "holds no weights of a model in training"),
        ("validate", "gone.ckpt", "no such checkpoint; give the file or folder that a run left"),
        ("validate", "folder", "has no .metadata, the index of a sharded checkpoint"),
        ("fit", "best", "no such checkpoint"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_is_refused_before_any_work(
    verb: str,
    path: str,
    told: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unimodal.tasks.Joint.__init__", lambda *_, **__: pytest.fail("a model was built"))
    torch.save({"state_dict": {}, "x": Code(tmp_path / "ran")}, "code.ckpt")
    torch.save({"state_dict": {}, "x": Code(tmp_path / "ran")}, "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"weights": {}}, "other.ckpt")
    torch.save([1], "list.ckpt")
    Path("empty.ckpt").touch()
    Path("folder").mkdir()
    assert cli.main([verb, *settings, "--ckpt_path", path]) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith(f"unimodal {verb}: --ckpt_path") and "Traceback" not in error
    assert not (tmp_path / "ran").exists()


def test_nobody_is_asked_whether_a_checkpoint_may_run_code(settings: list[str], capsys: Any) -> None:
    assert cli.main(["validate", *settings, "--weights_only", "false"]) == 2
    assert "weights_only" in capsys.readouterr().err


# One run at a time.


def test_a_second_run_in_the_same_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        recipe(tmp_path),
        write_recipe(tmp_path / "plain.yaml", plain(tiny_stage(tmp_path), tmp_path / "out")),
    ]
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out/.unimodal.run.lock", "the run"):
        for command in commands:
            assert run(command) == 1
            assert "the folder of this run is being written by another process" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".unimodal.run.lock"]
