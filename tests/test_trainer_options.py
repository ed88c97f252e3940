"""What users of Lightning's trainer expect: each of its options works to the end of a run, with the model saved in float32 and one line per
step in the log, or is refused in a sentence before anything trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from toy import toy_config
from toyrun import plain, scenes, tiny_stage, write_recipe

from unimodal import cli
from unimodal.config import to_dict
from unimodal.data.module import PairData
from unimodal.data.scenes import Scenes
from unimodal.hub import load_checkpoint
from unimodal.tasks import EvaluationSettings, Joint, LossLog, OptimizerSettings
from unimodal.tasks.evaluation import MEASURES, beginning
from unimodal.tasks.retrieval import ITC

TWO_EPOCHS = {"max_steps": -1, "max_epochs": 2}  # of three batches
EVERY_EPOCH = {**TWO_EPOCHS, "limit_val_batches": 1.0}


def monitoring(callback: str, monitor: str, **settings: Any) -> dict[str, Any]:
    return {"callbacks": [{"class_path": callback, "init_args": {"monitor": monitor, "mode": "max", **settings}}]}


WORK: dict[str, tuple[dict[str, Any], int]] = {
    "a trial": ({"fast_dev_run": True, "limit_val_batches": None}, 1),
    "a trial of two": ({"fast_dev_run": 2}, 2),
    "overfitting": ({"overfit_batches": 1}, 2),
    "a share of the data": ({"limit_train_batches": 0.7, "limit_val_batches": 0.5, **TWO_EPOCHS}, 4),
    "validation amid an epoch": ({"val_check_interval": 0.5, **EVERY_EPOCH, "max_epochs": 1}, 3),
    "validation by steps": ({"val_check_interval": 2, "num_sanity_val_steps": 1, **EVERY_EPOCH, "max_epochs": 1}, 3),
    "validation every other epoch": ({"check_val_every_n_epoch": 2, "num_sanity_val_steps": -1, **EVERY_EPOCH}, 6),
    "bfloat16": ({"precision": "bf16-true", **EVERY_EPOCH, "max_epochs": 1}, 3),
    "double": ({"precision": "64-true", **EVERY_EPOCH, "max_epochs": 1}, 3),
    "mixed": ({"precision": "16-mixed"}, 2),
    "accumulated gradients": ({"accumulate_grad_batches": 2, **TWO_EPOCHS, "gradient_clip_val": 0.1}, 4),
    "averaged weights": (
        {
            "callbacks": [
                {
                    "class_path": "StochasticWeightAveraging",
                    "init_args": {"swa_lrs": 0.01, "swa_epoch_start": 1},
                }
            ],
            **TWO_EPOCHS,
        },
        6,
    ),
    "stopping early": (
        {**EVERY_EPOCH, "max_epochs": 9, **monitoring("EarlyStopping", "val/t2i_r1_first", patience=1, min_delta=1.0)},
        6,
    ),
    "what watches": (
        {
            "profiler": "simple",
            "detect_anomaly": True,
            "deterministic": True,
            "logger": True,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_model_summary": True,
            "reload_dataloaders_every_n_epochs": 1,
            "gradient_clip_val": 0.1,
            "gradient_clip_algorithm": "value",
            "callbacks": [{"class_path": "LearningRateMonitor"}],
        },
        2,
    ),
    "own checkpoints": ({**EVERY_EPOCH, **monitoring("ModelCheckpoint", "val/t2i_r1_first")}, 6),
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "half": ({"precision": "16-true"}, "trainer.precision is 16-true, in which"),
    "no end": ({"max_steps": -1}, "nothing ends this training, and the learning rate follows how far it is; set"),
    "no steps": ({"max_steps": 0}, "trainer.max_steps is 0, so this run would train nothing"),
    "no epochs": ({"max_steps": -1, "max_epochs": 0}, "trainer.max_epochs is 0, so this run would train nothing"),
    "no batch a step": ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches is 0; expected at least 1"),
    "a negative norm": ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val is -1.0; expected the largest norm"),
    "no batches": ({"limit_train_batches": 0}, "trainer.limit_train_batches is 0, so this run would train nothing"),
    "misspelt": (
        {**EVERY_EPOCH, **monitoring("EarlyStopping", "val/t2i_r1_frist")},
        "EarlyStopping monitors 'val/t2i_r1_frist', which this run does not log; did you mean 'val/t2i_r1_first'?",
    ),
    "misspelt in a checkpoint": (
        {**EVERY_EPOCH, **monitoring("ModelCheckpoint", "val_loss")},
        "ModelCheckpoint monitors 'val_loss', which this run does not log; known: epoch, itc, step, val/i2t_r1_first",
    ),
    "of a head that is not there": (
        {**EVERY_EPOCH, **monitoring("EarlyStopping", "val/cider_d")},
        "EarlyStopping monitors 'val/cider_d', which this run does not log",
    ),
    "without validation": (
        monitoring("EarlyStopping", "val/t2i_r1_first"),
        "and nothing is validated: trainer.limit_val_batches is 0; set it to 1.0",
    ),
    "another way to write": (
        {"plugins": {"class_path": "pytorch_lightning.plugins.io.AsyncCheckpointIO"}},
        "trainer.plugins has AsyncCheckpointIO, and checkpoints are written by unimodal.tasks.LocalCheckpoints",
    ),
    "a misspelt accelerator": ({"accelerator": "gpuu"}, "trainer: You selected an invalid accelerator name"),
    "no device": ({"devices": 0}, "trainer: `Trainer(devices='0')` value is not a valid input"),
    "a misspelt profiler": ({"profiler": "quick"}, "trainer: When passing string value for the `profiler` parameter"),
    "a share of nothing": ({"limit_train_batches": 0.1}, "Please increase the `limit_train_batches` argument"),
    "no logger": ({"callbacks": [{"class_path": "LearningRateMonitor"}]}, "Cannot use `LearningRateMonitor` callback"),
}  # fmt: skip


def train(folder: Path, trainer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("unimodal.cli.schedule._final_scores", lambda *_: None)
    monkeypatch.chdir(folder)
    data = {"val": scenes("val", 12)}
    return cli.main(
        write_recipe(folder / "recipe.yaml", tiny_stage(folder / "out", data, **{"max_steps": 2, **trainer}))
    )


@pytest.mark.parametrize("name", WORK)
def test_an_option_works_to_the_end(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    options, steps = WORK[name]
    assert train(tmp_path, options, monkeypatch) == 0, capsys.readouterr().err
    stage = tmp_path / "out/align"
    rows = [json.loads(line) for line in (stage / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(steps))
    weights = load_file(stage / "model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert {"t2i_r1_first", "swap_accuracy_embed"} <= json.loads((stage / "done.json").read_text())["scores"].keys()


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_is_refused_before_anything_trains(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    options, told = REFUSED[name]
    monkeypatch.setattr("unimodal.tasks.Task.training_step", lambda *_: pytest.fail("a step was trained"))
    assert train(tmp_path, options, monkeypatch) in (1, 2)
    error = " ".join(capsys.readouterr().err.split())
    assert told in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["trainer.default_root_dir", "output"])
def test_a_run_leaves_what_it_makes_on_this_machine(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_stage(tmp_path)
    recipe = recipe if name == "output" else plain(recipe, tmp_path)
    assert cli.main([*write_recipe(tmp_path / "recipe.yaml", recipe), f"--{name}", "s3://bucket/run"]) == 2
    assert f"{name} is s3://bucket/run, which is an address; give the path of a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("verb", "advice"), [("validate", "--split val"), ("test", "--split test"), ("predict", "embed")]
)
def test_a_schedule_is_for_fit_alone(verb: str, advice: str, tmp_path: Path, capsys: Any) -> None:
    command = write_recipe(tmp_path / "recipe.yaml", tiny_stage(tmp_path / "out"))
    assert cli.main([verb, *command[1:]]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "this is a schedule of stages, which only fit runs; `unimodal " in error and advice in error
    words = error.split("`unimodal ")[1].split("`")[0]
    assert f"--model {tmp_path}/out/model" in words


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("validate", {}),
        ("validate", {"limit_val_batches": 0.5}),
        ("test", {"limit_test_batches": 1}),
        ("test", {"fast_dev_run": True}),
        ("predict", {"limit_predict_batches": 1}),
    ],
)
def test_a_plain_configuration_is_scored_whole_and_in_part(
    verb: str, options: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = plain(tiny_stage(tmp_path, {"val": scenes("val", 12), "test": scenes("test", 12)}, **options), tmp_path)
    if not options:
        del recipe["trainer"]["limit_val_batches"]
    assert cli.main([verb, *write_recipe(tmp_path / "plain.yaml", recipe)[1:]]) == 0
    if verb != "predict":
        assert f"{'val' if verb == 'validate' else 'test'}/t2i_r1_first" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_every_head_is_trained_and_scored_in_any_precision(precision: str, tmp_path: Path, monkeypatch: Any) -> None:
    names = ("itc", "itm", "itg", "flow")
    options = {"precision": precision, "limit_val_batches": 1.0, "max_steps": -1, "max_epochs": 1}
    recipe = tiny_stage(tmp_path / "out", {"val": scenes("val", 10), "target_size": 32}, **options)
    recipe["model"]["init_args"] |= {
        "config": to_dict(toy_config()),
        "objectives": {
            name: {"class_path": f"unimodal.tasks.{name.upper() if name != 'flow' else 'Flow'}"} for name in names
        },
        "evaluation": {"rerank_k": 3, "captions": 2, "pictures": 2, "steps": 2},
    }
    monkeypatch.setattr("unimodal.cli.schedule._final_scores", lambda *_: None)
    assert cli.main(write_recipe(tmp_path / "recipe.yaml", recipe)) == 0
    asked_at_the_end = {f"generation_attribute_accuracy_{name}" for name in ("chosen", "known")}
    scores = json.loads((tmp_path / "out/align/done.json").read_text())["scores"]
    assert scores.keys() == MEASURES.keys() - asked_at_the_end
    model, _ = load_checkpoint(tmp_path / "out/align/model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# What the options do.


class Read(pl.Callback):
    """Which pictures and captions each step read, and the random number that followed."""

    def __init__(self) -> None:
        self.rows: list[tuple[list[int], list[int]]] = []
        self.draws: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
        self.rows.append((batch["image_id"].tolist(), batch["text_id"].tolist()))

    def on_after_backward(self, *_: Any) -> None:
        self.draws.append(float(torch.rand(())))


def fit(folder: Path, **options: Any) -> tuple[Joint, Read, pl.Trainer]:
    """Trains the embedding on three batches of four an epoch."""
    task = Joint(
        toy_config(matching=None, captioning=None, generation=None),
        {"itc": ITC()},
        optimizer=OptimizerSettings(lr=1e-3),
        evaluation=EvaluationSettings(),
        pretrained=False,
    )
    seen = Read()
    settings: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0, "callbacks": [seen], **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(task, datamodule=PairData(Scenes("train", count=12), Scenes("val", count=8), batch_size=4))
    return task, seen, trainer


def test_a_limited_epoch_is_followed_by_another(tmp_path: Path) -> None:
    rows = fit(tmp_path, limit_train_batches=2)[1].rows
    whole = fit(tmp_path)[1].rows
    assert rows == [*whole[:2], *whole[3:5]]  # an epoch is another order, whether or not it is read to its end


def test_loaders_made_anew_go_on_with_the_next_epoch(tmp_path: Path) -> None:
    assert fit(tmp_path, reload_dataloaders_every_n_epochs=1)[1].rows == fit(tmp_path)[1].rows


def test_overfitting_reads_the_same_batches_again(tmp_path: Path) -> None:
    rows = fit(tmp_path, overfit_batches=2)[1].rows
    assert len(rows) == 4 and rows[:2] == rows[2:] and rows[0] != rows[1]


def test_accumulated_batches_draw_differently_and_are_logged_as_one_step(tmp_path: Path) -> None:
    seen = Read()
    fit(tmp_path / "two", accumulate_grad_batches=2, callbacks=[LossLog(), seen])
    assert len(set(seen.draws)) == 6
    fit(tmp_path / "each", accumulate_grad_batches=2, callbacks=[losses := Losses()])
    rows = [json.loads(line) for line in (tmp_path / "two/losses.jsonl").read_text().splitlines()]
    steps = [losses.values[part] for part in (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6))]
    assert [row["itc"] for row in rows] == [pytest.approx(sum(step) / len(step)) for step in steps]


class Losses(pl.Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, *_: Any) -> None:
        self.values.append(task.step_losses["itc"])


def test_a_run_that_time_ends_follows_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a tenth of a second; the run ends after five seconds of them, its rate near nothing."""
    clock = iter(range(10**6))
    monkeypatch.setattr("pytorch_lightning.callbacks.timer.time.monotonic", lambda: next(clock) / 10)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    _, _, trainer = fit(tmp_path, max_epochs=-1, max_time={"seconds": 5}, callbacks=[Rates()])
    assert trainer.global_step == len(rates) > 3
    assert rates[-1] < 0.2 * max(rates)


def test_a_run_without_an_end_says_so_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing ends this training, .* set max_steps, max_epochs or max_time"):
        fit(tmp_path, max_epochs=-1)


def test_the_beginning_of_a_split_is_a_split_of_its_own() -> None:
    whole = Scenes("val", count=6)
    part = beginning(whole, 2)
    assert len(whole) == 6 and len(part) == 2 and part.fingerprint() == Scenes("val", count=2).fingerprint()
    with pytest.raises(
        ValueError, match="2 of 6 images of mine val were read, and Mine cannot be cut; set limit_val_batches"
    ):
        beginning(type("Mine", (), {"name": "mine", "split": "val", "__len__": lambda self: 6})(), 2)
