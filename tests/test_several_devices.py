"""Several devices: two processes under DDP and FSDP2 train, validate, mine, average, resume and end like one process on the same rows;
sharded checkpoints merge into the Hub format, and none of them runs code."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import ranks
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import load_file
from toy import toy_config, toy_model

from unimodal import cli, files
from unimodal.cli import schedule as schedules
from unimodal.cli.stage import StagePlan
from unimodal.cli.train import _nodes
from unimodal.config import to_dict
from unimodal.data.module import PairData
from unimodal.data.scenes import Scenes
from unimodal.hub import CheckpointError, load_checkpoint
from unimodal.hub.training import check_training_checkpoint, read_training_weights, refuse_code
from unimodal.tasks import EMA, FSDP2, ITC, ITG, EvaluationSettings, Joint, LossLog, OptimizerSettings, StageProof

WORLD, ROWS = 2, 8  # processes, and rows of a step of all together
UNUSED = ("backbone.vision.*", "bridge.layers.*.text_mlp*", "bridge.*_embedding.*", "bridge.lm_*", "heads.matching.*")
TRAINABLE = {"*": 1.0, **dict.fromkeys(UNUSED, 0.0)}  # DDP insists that losses reach all that trains
OPTIMIZER = {"lr": 0.01, "warmup": 0.0}


def config() -> Any:
    """A smaller toy without dropout, whose masks would differ between one process and two, and without a drawing head."""
    bridge = {"width": 32, "layers": 1, "heads": 2, "intermediate": 64, "queries": {"image": 4, "text": 3}}
    whole = toy_config(generation=None, bridge=bridge)
    whole.backbone.text.kwargs.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=1)
    for part in (whole.bridge, whole.captioning, whole.matching):
        object.__setattr__(part, "dropout", 0.0)
    return whole


# A schedule from the command line: two stages that train, the second on mined neighbours, and one that averages them.


def schedule(output: Path, world: int, trainer: dict[str, Any]) -> dict[str, Any]:
    def reader(split: str, count: int) -> dict[str, Any]:
        return {"class_path": "unimodal.data.Scenes", "init_args": {"split": split, "count": count}}

    objectives = {name.lower(): {"class_path": f"unimodal.tasks.{name}"} for name in ("ITC", "ITG")}
    model = {
        "config": to_dict(config()),
        "objectives": objectives,
        "trainable": TRAINABLE,
        "optimizer": OPTIMIZER,
        "evaluation": {"rerank_k": 2, "captions": 2},
        "pretrained": False,
    }
    average = {"class_path": "unimodal.tasks.EMA", "init_args": {"decay": 0.5}}
    return {
        "output": str(output),
        "checkpoint_every": 2,
        "model": {"class_path": "unimodal.tasks.Joint", "init_args": model},
        "data": {"train": reader("train", 16), "val": reader("val", 3), "batch_size": ROWS // world},
        "trainer": {
            "accelerator": "cpu",
            "devices": world,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "gradient_clip_val": 0.5,
            "enable_progress_bar": False,
            **trainer,
        },
        "stages": {
            "align": {"trainer": {"max_steps": 3, "callbacks": [average]}},
            "sharpen": {"data": {"hard_neighbours": 3}, "trainer": {"max_steps": 2}},
            "soup": {"merge": {"align": 0.5, "sharpen": 0.5}},
        },
    }


def fit(folder: Path, world: int, trainer: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{os.environ.get('RANK', 0)}.yaml"
    path.write_text(yaml.safe_dump(schedule(folder / "out", world, trainer)))
    assert cli.main(["fit", "--config", str(path)]) == 0


# A run by hand: Muon, recomputed blocks, clipping, an average of the weights, the proof, a validation inside, checkpoints.


def train(folder: Path, world: int, strategy: Any, steps: int, start: Path | None = None, **settings: Any) -> None:
    precision = settings.pop("precision", "32-true")
    task = Joint(
        config(),
        {"itc": ITC(matryoshka=True), "itg": ITG()},
        TRAINABLE,
        optimizer=OptimizerSettings(**OPTIMIZER, muon=settings.pop("muon", 0.0)),
        evaluation=EvaluationSettings(rerank_k=2, captions=2),
        pretrained=False,
        **settings,
    )
    kept = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[LossLog(), StageProof(), EMA(0.5), kept],
        default_root_dir=folder,
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision=precision,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, datamodule=data(world), ckpt_path=start)
    model = task.whole_model()
    if trainer.is_global_zero:
        scores = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        torch.save({"state": model.state_dict(), "scores": scores}, folder / "end.pt")


def data(world: int) -> PairData:
    return PairData(Scenes("train", count=16), Scenes("val", count=6), batch_size=ROWS // world)


def error_of(strategy: Any, **settings: Any) -> str:
    """What a validation under this trainer says."""
    task = Joint(config(), {"itc": ITC()}, TRAINABLE, pretrained=False)
    settings |= {"accelerator": "cpu", "devices": WORLD, "logger": False, "enable_progress_bar": False}
    try:
        pl.Trainer(strategy=strategy, **settings).validate(task, datamodule=data(WORLD), verbose=False)
    except ValueError as error:
        return str(error)
    return "no error"


MUON = {"muon": 2.0, "steps": 4}
SHARDED = {"class_path": "unimodal.tasks.FSDP2"}


def everything(rank: int, world: int, folder: Path) -> None:
    """What each of the two processes does."""
    rank_zero_only.rank = rank  # it was read when the server imported it
    fit(folder / "ddp", world, {"strategy": "ddp"})
    fit(folder / "fsdp2", world, {"strategy": SHARDED})
    train(folder / "muon", world, FSDP2(), gradient_checkpointing=True, **MUON)
    train(folder / "resumed", world, FSDP2(), start=folder / "muon/step=2.ckpt", gradient_checkpointing=True, **MUON)
    train(folder / "bf16", world, FSDP2(), steps=2, precision="bf16-mixed", mini_batch_size=2)
    errors = {
        "partial": error_of("ddp", use_distributed_sampler=True),
        "tensor parallel": error_of(
            ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), use_distributed_sampler=False
        ),
    }
    (folder / f"errors{rank}.json").write_text(json.dumps(errors))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did."""
    folder = tmp_path_factory.mktemp("two")
    ranks.start(everything, folder, world=WORLD)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same, done by one process on all rows."""
    folder = tmp_path_factory.mktemp("one")
    fit(folder / "schedule", 1, {})
    train(folder / "muon", 1, "auto", **MUON)
    train(folder / "bf16", 1, "auto", steps=2, precision="bf16-mixed")
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def assert_losses_agree(a: Path, b: Path, within: float) -> None:
    rows = losses(a), losses(b)
    assert len(rows[0]) == len(rows[1]) and rows[0]
    for ours, theirs in zip(*rows):
        assert ours == pytest.approx(theirs, rel=within), f"step {ours['step']}"


def assert_weights_agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], within: float) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if not name.endswith(
            "key.bias"
        ):  # attention ignores it: its gradient is rounding, which Adam blows up to a step
            torch.testing.assert_close(
                tensor, b[name], rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(strategy: str, one: Path, two: Path) -> None:
    ours, theirs = two / strategy / "out", one / "schedule/out"
    for stage in ("align", "sharpen"):
        assert_losses_agree(ours / stage, theirs / stage, 1e-4)
    for stage in ("align", "sharpen", "soup"):
        assert_weights_agree(*(load_file(run / stage / "model/model.safetensors") for run in (ours, theirs)), 1e-3)
        scores = [json.loads((run / stage / "done.json").read_text())["scores"] for run in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4) and "t2i_r1_reranked" in scores[0]
        assert not (ours / stage / "resume.ckpt").exists()
    report = [json.loads((run / "report.json").read_text())["metrics"] for run in (ours, theirs)]
    assert report[0] == pytest.approx(report[1], abs=1e-4)
    folders = [{path.relative_to(run).as_posix() for path in run.rglob("*")} for run in (ours, theirs)]
    assert folders[0] == folders[1]  # rank 1 writes nothing


def test_sharded_muon_and_recomputed_blocks_train_as_one(one: Path, two: Path) -> None:
    """Muon orthogonalises in bfloat16, which turns rounding into some thousandths of a step."""
    assert_losses_agree(two / "muon", one / "muon", 1e-3)
    ends = [torch.load(run / "muon/end.pt", weights_only=True) for run in (two, one)]
    assert_weights_agree(ends[0]["state"], ends[1]["state"], 1e-2)
    assert ends[0]["scores"].keys() == ends[1]["scores"].keys() and ends[0]["scores"]


def test_bfloat16_blocks_in_chunks_train_nearly_as_one(one: Path, two: Path) -> None:
    assert_losses_agree(two / "bf16", one / "bf16", 0.02)


def test_a_sharded_run_resumes_exactly(two: Path) -> None:
    """Weights, both optimizers, their rates, the average and the proof: all from a folder with a part per process."""
    assert sorted(path.name for path in (two / "muon/step=2.ckpt").iterdir() if path.name != files.LOCK) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "meta.pt",
    ]
    assert losses(two / "resumed") == losses(two / "muon")[2:]
    ends = [torch.load(two / run / "end.pt", weights_only=True)["state"] for run in ("muon", "resumed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_checkpoints_in_parts_and_in_one_file_gather_alike(one: Path, two: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = schedule(tmp_path, 1, {})
    del recipe["stages"], recipe["output"], recipe["checkpoint_every"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    gathered = {}
    for name, checkpoint in {"parts": two / "muon/step=4.ckpt", "file": one / "muon/step=4.ckpt"}.items():
        words = ["gather", str(checkpoint), "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / name)]
        assert cli.main(words) == 0, capsys.readouterr().err
        model, _ = load_checkpoint(tmp_path / name / "model")
        gathered[name] = model.state_dict()
        weights = read_training_weights(checkpoint)
        assert all(torch.equal(weights[key], tensor) for key, tensor in gathered[name].items())
    assert_weights_agree(gathered["parts"], gathered["file"], 1e-2)
    assert (
        cli.main(
            [*words, "--model.init_args.config.embedding.dim=8", "--model.init_args.config.embedding.matryoshka=[]"]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert "does not hold the weights of this recipe's model" in error and "size mismatch" in error
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(schedule(tmp_path / "elsewhere", 1, {})))
    assert cli.main(["gather", str(checkpoint), "--config", str(tmp_path / "stages.yaml"), "--out", "x"]) == 1
    assert "lies in no folder of this schedule's stages" in capsys.readouterr().err


def test_what_cannot_be_told_apart_by_rank_is_refused(two: Path) -> None:
    for rank in range(WORLD):
        errors = json.loads((two / f"errors{rank}.json").read_text())
        assert "use_distributed_sampler deals a split out among the processes" in errors["partial"]
        assert "asks for tensor parallelism" in errors["tensor parallel"]
        assert "take the strategy unimodal.tasks.FSDP2" in errors["tensor parallel"]


# Checkpoints from elsewhere.


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.", "asks for posix.system"),
        (b"cposix\nsystem\n(S'true'\ntR.", "asks for GLOBAL posix system"),
        # a name that was remembered long before, and one hidden behind a harmless pair that is dropped again
        (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94]\x94h\x00h\x01\x93.", "asks for posix.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system(\x8c\x05torch\x8c\x04Size1\x93.", "asks for Size.None"),
        (b"no index", "cut short or no index"),
        (b"\x80\x04h\x07.", "cut short or no index"),
        (None, "has no .metadata"),
    ],
)
def test_an_index_that_would_run_code_is_refused_unread(index: bytes | None, message: str, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / ".metadata").write_bytes(index)
    for read in (refuse_code, read_training_weights):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)


def test_files_that_are_no_training_checkpoints(two: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint; give the file or folder that a run left"):
        read_training_weights(tmp_path / "gone.ckpt")
    shutil.copytree(two / "muon/step=2.ckpt", tmp_path / "parts")
    check_training_checkpoint(tmp_path / "parts")
    part = tmp_path / "parts/__1_0.distcp"
    part.write_bytes(part.read_bytes()[:100])
    for read in (check_training_checkpoint, read_training_weights):
        with pytest.raises(
            CheckpointError, match="__1_0.distcp is missing or cut short; give a checkpoint that is whole"
        ):
            read(tmp_path / "parts")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text.ckpt \(13 bytes\) is cut short or no training checkpoint"):
        read_training_weights(tmp_path / "text.ckpt")
    torch.save({"state_dict": {"other.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="holds no weights of a model in training"):
        read_training_weights(tmp_path / "other.ckpt")


# Launchers.


def test_the_launcher_says_on_how_many_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _nodes() == 1
    monkeypatch.setenv("SLURM_NNODES", "3")
    assert _nodes() == 1  # a shell in an allocation is no task of it
    for name, value in {"SLURM_NTASKS": "24", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "5"}.items():
        monkeypatch.setenv(name, value)
    assert _nodes() == 3
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert _nodes() == 2


def test_whoever_waits_for_a_process_that_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([1, 1, 2])
    monkeypatch.setattr(schedules.os, "getppid", lambda: next(parents))
    with pytest.raises(RuntimeError, match="done.json was not written: the process that started this one has ended"):
        schedules._wait_for(StagePlan("align", "", tmp_path, {}, {}, {}, lambda config: None, None))


def test_a_run_goes_on_with_as_many_processes_as_before() -> None:
    module, model = data(1), toy_model()
    module.bind(model.config, model.backbone)
    loader = module.train_dataloader()
    loader.load_state_dict({**loader.state_dict(), "step": 1})
    assert loader.step == 1
    with pytest.raises(ValueError, match="stopped with 2 processes and goes on with 1: .*start as many as before"):
        loader.load_state_dict({**loader.state_dict(), "world": 2})
