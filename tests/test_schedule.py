"""Schedules: a toy run of three stages ends in its report and page; the same command again skips what is done; a run that
is killed in the middle of a stage, early or late, repeats the losses of an uninterrupted one to the last digit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy import toy_config

from unimodal import cli
from unimodal.cli.cost import machine
from unimodal.config import to_dict

STAGES = {"align": 5, "sharpen": 4, "generate": 6}


def schedule(output: Path) -> dict[str, Any]:
    """The quickstart's three stages at toy size: dropout, drawn negatives, mining, noise and averaging included."""

    def reader(split: str, count: int) -> dict[str, Any]:
        return {"class_path": "unimodal.data.Scenes", "init_args": {"split": split, "count": count}}

    def objective(name: str, **settings: Any) -> dict[str, Any]:
        return {"class_path": f"unimodal.tasks.{name}", "init_args": settings}

    align = {name.lower(): objective(name) for name in ("ITC", "ITM", "ITG")}
    sharpen = {"itc": objective("ITC", matryoshka=True), "itm": objective("ITM", ramp=0.0)}
    parts = {
        "align": (align, {"*": 1.0, "heads.generation.*": 0.0, "bridge.query_sets.generate": 0.0}, {}),
        "sharpen": (sharpen, {"bridge.*": 1.0, "heads.*": 1.0, "heads.generation.*": 0.0}, {"hard_neighbours": 3}),
        "generate": (
            {"flow": objective("Flow", handover=0.5)},
            {"bridge.query_sets.generate": 1.0, "heads.generation.*": 1.0},
            {"target_size": 32},
        ),
    }
    evaluation = {"rerank_k": 3, "captions": 2, "pictures": 2, "steps": 2}
    stages = {
        name: {
            "about": f"the stage {name}",
            "model": {"init_args": {"objectives": objectives, "trainable": trainable}},
            "data": data,
            "trainer": {"max_steps": STAGES[name]},
        }
        for name, (objectives, trainable, data) in parts.items()
    }
    average = {"class_path": "unimodal.tasks.EMA", "init_args": {"decay": 0.9}}
    stages["generate"]["trainer"]["callbacks"] = [average]
    return {
        "name": "toy",
        "output": str(output),
        "checkpoint_every": 2,
        "model": {
            "class_path": "unimodal.tasks.Joint",
            "init_args": {"config": to_dict(toy_config()), "evaluation": evaluation, "pretrained": False},
        },
        "data": {"train": reader("train", 24), "val": reader("val", 6), "test": reader("test", 6), "batch_size": 8},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
        },
        "stages": stages,
    }


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "schedule.yaml"
    path.write_text(yaml.safe_dump(schedule(folder / "out"), sort_keys=False))
    return path


def losses(folder: Path) -> dict[str, str]:
    return {name: (folder / "out" / name / "losses.jsonl").read_text() for name in STAGES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(["fit", "--config", str(write(folder))]) == 0
    return folder


def test_a_run_ends_in_its_report_and_page(finished: Path) -> None:
    report = json.loads((finished / "out" / "report.json").read_text())
    assert list(report["metrics"]) == [
        "t2i_r1_first",
        "t2i_r1_reranked",
        "i2t_r1_first",
        "i2t_r1_reranked",
        "cider_d",
        "bleu_4",
        "swap_accuracy_embed",
        "swap_accuracy_match",
        "caption_exact_attributes",
        "generation_attribute_accuracy",
        "generation_attribute_accuracy_known",
    ]
    assert set(report["metrics"]) <= set(report["protocol"])
    assert all(0 <= value <= 1 for value in report["metrics"].values())
    assert report["wall_seconds"] > 0 and report["peak_memory_mb"] > 0
    assert {name: stage["steps"] for name, stage in report["stages"].items()} == STAGES
    page = (finished / "out" / "index.html").read_text()
    assert all(f"the stage {name}" in page for name in STAGES)
    for name, steps in STAGES.items():
        assert len(losses(finished)[name].splitlines()) == steps
        done = json.loads((finished / "out" / name / "done.json").read_text())
        assert "t2i_r1_reranked" in done["scores"]
    assert done["untouched_heads"] == ["embedding", "matching", "captioning"]
    assert (finished / "out" / "model" / "config.json").exists()
    card = (finished / "out" / "model" / "README.md").read_text()
    cost = card.split("## Cost")[1].split("## Limits")[0]
    minutes = sum(stage["seconds"] for stage in report["stages"].values()) / 60
    assert f"Training took {minutes:.0f} minutes on {torch.get_num_threads()} processor thread" in cost
    stored = (finished / "out" / "model" / "model.safetensors").stat().st_size
    assert float(re.search(r"are ([\d.]+) MB in float32", cost)[1]) == pytest.approx(stored / 1e6, rel=0.05)  # type: ignore[index]
    assert re.search(r"\*\*captions\*\*\. Protocol: .*; rule: caption words: .*; greedy\n", card)
    assert report["protocol"]["cider_d"].endswith("; greedy")
    speeds = re.search(r"embeds (\d+) pictures, (\d+) texts and writes (\d+) captions \(greedy\) a second", cost)
    assert speeds and all(int(speed) > 0 for speed in speeds.groups())


def test_the_machine_is_what_the_model_lies_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    assert machine(torch.device("cpu")) == f"{torch.get_num_threads()} processor thread" + (
        "s" if torch.get_num_threads() > 1 else ""
    )
    assert (machine(torch.device("cuda", 1)), machine(torch.device("mps"))) == ("GPU 1", "mps")


def test_scores_of_untouched_heads_do_not_change(finished: Path) -> None:
    before, after = (json.loads((finished / f"out/{name}/done.json").read_text()) for name in ("sharpen", "generate"))
    for name, value in before["scores"].items():
        if name != "generation_attribute_accuracy":
            assert after["scores"][name] == value, name


def test_the_same_command_again_skips_what_is_done(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = losses(finished)
    assert cli.main(["fit", "--config", str(finished / "schedule.yaml")]) == 0
    output = capsys.readouterr().out
    assert all(f"stage {name}: finished before" in output for name in STAGES)
    assert losses(finished) == before


def test_report_and_page_are_of_one_run_when_the_page_cannot_be_written(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {name: (finished / "out" / name).read_bytes() for name in ("report.json", "index.html")}
    monkeypatch.setattr("unimodal.cli.finish.write_report", full)
    assert cli.main(["fit", "--config", str(finished / "schedule.yaml"), "--title", "Another"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "the traceback is in" in error and "Traceback" not in error
    assert before == {name: (finished / "out" / name).read_bytes() for name in before}
    for path in (finished / "out").glob("traceback-*.txt"):
        path.unlink()


def test_other_settings_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["fit", "--config", str(finished / "schedule.yaml"), "--data.batch_size", "4"])
    error = " ".join(capsys.readouterr().err.split())
    assert status == 2
    assert "holds a run of this stage with other settings; choose another --output, or remove" in error


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    """SIGKILL in the first and in the last stage, each time after a step that no checkpoint holds."""
    command = [sys.executable, "-m", "unimodal", "fit", "--config", str(write(tmp_path))]
    for stage, lines in (("align", 3), ("generate", 5)):
        _run_until(command, tmp_path / "out" / stage / "losses.jsonl", lines)
        assert (tmp_path / "out" / stage / "resume.ckpt").exists()
        assert not (tmp_path / "out" / stage / "done.json").exists()
    assert cli.main(["fit", "--config", str(tmp_path / "schedule.yaml")]) == 0
    assert losses(tmp_path) == losses(finished)


def _run_until(command: list[str], log: Path, lines: int) -> None:
    """Run a command and kill it as soon as `log` has so many lines."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
