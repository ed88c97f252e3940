"""What a recipe will take, told before it trains: the forecast against what training then took, and what the doctor says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import ranks
import torch
import yaml
from test_tasks import OBJECTIVES
from test_tasks import task as task_of
from toy import toy_config

from unimodal import cli
from unimodal.cli import forecast as report
from unimodal.config import to_dict
from unimodal.data.module import PairData
from unimodal.data.scenes import Scenes
from unimodal.tasks import Joint, OptimizerSettings, Task
from unimodal.tasks.memory import _step, forecast

FROZEN_VISION = {"*": 1.0, "backbone.vision.*": 0.0}


def bound(task: Task, rows: int) -> PairData:
    """Data of `rows` scenes, all in one batch, as the doctor binds them."""
    module = PairData(Scenes("train", count=rows), Scenes("val", count=8), batch_size=rows, target_size=32)
    task.processor = module.bind(task.config, task.model.backbone)
    return module


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "32-true"),
        ({}, "bf16-mixed"),
        ({"gradient_checkpointing": True}, "32-true"),
        ({"mini_batch_size": 16, "trainable": FROZEN_VISION}, "32-true"),
    ],
    ids=["float32", "bfloat16", "recomputed", "in chunks"],
)
def test_eight_rows_tell_of_many(settings: dict[str, Any], precision: str) -> None:
    """Within a tenth, from 8 rows to 64."""
    names = ["itc"] if "mini_batch_size" in settings else list(OBJECTIVES)
    task = task_of(names, **settings)
    module = bound(task, 64)
    foretold = forecast(task, module, precision=precision)
    low = torch.bfloat16 if precision == "bf16-mixed" else None
    measured, _ = _step(task.train(), next(iter(module.train_dataloader())), 64, low)  # type: ignore[arg-type]
    assert foretold.activations == pytest.approx(measured, rel=0.1)
    assert foretold.rows_within(foretold.total) == 64 and foretold.rows_within(foretold.total - foretold.per_row) == 63


def test_states_are_counted() -> None:
    """By hand for a model of which one matrix and one vector train: Muon keeps one copy of its matrix, AdamW two of the rest."""
    only = {"heads.matching.score.*": 1.0}
    task = task_of(["itm"], only, optimizer=OptimizerSettings(muon=1.0))
    module = bound(task, 4)
    whole = sum(t.nbytes for t in (*task.model.parameters(), *task.model.buffers()))
    one = forecast(task, module, averages=True)
    trained = 4 * (32 + 1)
    assert (one.whole, one.weights, one.gradients) == (whole, whole, trained)
    assert one.optimizer == 4 * (32 + 2 * 1) + trained
    assert (one.exchange, forecast(task, module, strategy="ddp", devices=2).exchange) == (0, trained)
    half = forecast(task, module, strategy="fsdp2", devices=2)
    assert (half.whole, half.weights, half.gradients) == (whole, -(-whole // 2), trained // 2)
    sizes = [sum(p.numel() for p in block.parameters()) for block in report_blocks(task)]
    count = sum(p.numel() for p in task.model.parameters())
    assert half.exchange == 2 * 4 * (count - sum(sizes) + 2 * max(sizes))


def report_blocks(task: Task) -> list[torch.nn.Module]:
    model = task.model
    lists = (model.backbone.text.encoder.layer, model.bridge.layers, model.heads["matching"].blocks)
    generator = model.heads["generation"].transformer.transformer_blocks
    return [block for blocks in (*lists, model.heads["captioning"].blocks, generator) for block in blocks]


def test_parameters_that_no_loss_reaches_are_named() -> None:
    task = task_of(["itc"], {"heads.*": 1.0})
    names = set(forecast(task, bound(task, 4)).unreached)
    assert names and all(name.startswith(("heads.matching", "heads.captioning", "heads.generation")) for name in names)
    task = task_of(["itc"], {"heads.image_embedding.*": 1.0})
    assert forecast(task, bound(task, 4)).unreached == ()


# What a real run takes.


def kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


def train(rank: int, world: int, folder: Path) -> None:
    """Two steps at full size; notes what was foretold and how much larger the process grew."""
    task = Joint(toy_config(), OBJECTIVES, pretrained=False)
    foretold = forecast(task, bound(task, 256))
    module = PairData(Scenes("train", count=256), batch_size=256, target_size=32)
    trainer = pl.Trainer(
        max_steps=2,
        limit_val_batches=0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = kilobytes("VmRSS")
    trainer.fit(task, datamodule=module)
    grown = 1024 * (kilobytes("VmHWM") - before)
    (folder / "memory.json").write_text(json.dumps([foretold.total - foretold.weights, grown]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process how large it was")
def test_a_process_grows_by_what_was_foretold(tmp_path: Path) -> None:
    """Within a factor of 1.5: an allocator keeps and rounds up what the forecast counts exactly."""
    ranks.start(train, tmp_path, world=1)
    foretold, grown = json.loads((tmp_path / "memory.json").read_text())
    assert foretold / 1.5 < grown < 1.5 * foretold


# The doctor.


def recipe(folder: Path, **trainer: Any) -> Path:
    """A schedule with all that a stage may still wait for: weights, a cache, neighbours and mined negatives of earlier stages."""
    model = {"config": to_dict(toy_config()), "pretrained": False, "objectives": objective("ITC")}
    reader = {"class_path": "unimodal.data.Scenes", "init_args": {"split": "train", "count": 8}}
    content = {
        "output": str(folder / "out"),
        "model": {"class_path": "unimodal.tasks.Joint", "init_args": model},
        "data": {"train": reader, "batch_size": 8, "feature_cache": str(folder / "cache")},
        "trainer": {"accelerator": "cpu", **trainer},
        "stages": {
            "align": {"about": "the first"},
            "mined": {"mine": {}},
            "distil": {
                "model": {
                    "init_args": {
                        "objectives": objective("Distillation", teacher="file"),
                        "trainable": {"bridge.*": 1.0, "bridge.token_embedding.*": 0.0},
                    }
                },
                "data": {"negatives": "mined", "hard_neighbours": 3},
                "trainer": {"callbacks": [{"class_path": "unimodal.tasks.EMA"}]},
            },
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def objective(name: str, **settings: Any) -> dict[str, Any]:
    return {name.lower(): {"class_path": f"unimodal.tasks.{name}", "init_args": settings}}


def doctor(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = cli.main(["doctor", *map(str, words)])
    out, error = capsys.readouterr()
    return status, out, error


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def test_the_doctor_reads_a_whole_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = doctor(capsys, "--config", recipe(tmp_path), "--data.batch_size", 4)
    assert status == 0
    for text in ("torch", "stage align: the first", "bridge.layers", "mined: mine; it trains nothing", "stage distil"):
        assert text in out
    assert out.count("activations of 4 rows") == 2 and out.count("fits: ") == 2 and "no loss reaches them" in out
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_the_doctor_says_what_does_not_fit_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "program_size", lambda: 0)
    monkeypatch.setattr(report, "available_memory", lambda: 2 * (2 << 20))
    path = recipe(tmp_path, devices=2, strategy="ddp")
    status, out, _ = doctor(capsys, "--config", path, "--data.batch_size", 4)
    assert status == 1 and out.count("does not fit") == 2
    assert "ddp on 2 cpus, 32-true" in out and "DDP's buckets" in out
    for advice in (
        "data.batch_size: 1 at most",
        "mini_batch_size",
        "gradient_checkpointing: true",
        "bf16.yaml",
        "fsdp2.yaml",
        "train less",
    ):
        assert advice in out, advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
@pytest.mark.parametrize(("fragment", "strategy"), [("ddp", "ddp"), ("fsdp2", "fsdp2"), ("one_gpu", "single")])
def test_fragments_are_read_for_machines_that_are_not_this_one(
    fragment: str, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Path(__file__).parent.parent / f"configs/trainer/{fragment}.yaml"
    words = [
        "--config",
        recipe(tmp_path),
        "--trainer",
        trainer,
        "--trainer.num_nodes",
        2 if strategy != "single" else 1,
    ]
    status, out, _ = doctor(capsys, *words)
    assert status == 0 and f"{strategy} on {2 if strategy != 'single' else 1} gpu" in out and "bf16-mixed" in out
    assert "this machine has 0 GPUs, so nothing says whether it fits" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.strategy", "fsdp"], "trainer.strategy is fsdp; expected auto, ddp or unimodal.tasks.FSDP2"),
        (["--trainer.precision", "16-true"], "trainer.precision is 16-true, in which"),
        (["--data.batch_size", "9"], "9"),
        (["--data.batch_sise", "9"], "did you mean 'batch_size'?"),
    ],
)
def test_a_recipe_that_cannot_train_is_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = doctor(capsys, "--config", recipe(tmp_path), *words)
    assert status == 2 and error.startswith("unimodal doctor: ") and message in error


def test_overrides_need_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor(capsys, "--data.batch_size", "4")
    assert "--data.batch_size changes a recipe; give it with --config" in capsys.readouterr().err
