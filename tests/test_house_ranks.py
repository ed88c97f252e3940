"""Every system trains on two processes as on one: weights and whatever it keeps of its training, after two steps of each stage.

Steps are those of plain gradient descent. Adam divides a gradient by its own size: where the true gradient is zero, as that of a bias of
keys, it would compare two roundings.
"""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import ranks
import torch
from pytorch_lightning.utilities import rank_zero_only
from test_house import small, stages_of
from toy import toy_config

from unimodal.config import ModelConfig
from unimodal.data import Scenes
from unimodal.data.module import PairData
from unimodal.systems import SYSTEMS
from unimodal.tasks import FSDP2, Joint, LossLog, SystemLosses

ROWS, STEPS = 8, 2
STAGES = [(name, stage) for name in SYSTEMS for stage in stages_of(name)]
CUT = [("vlmo", "joint"), ("oscar", "retrieval")]  # also with weights that are cut among the processes


class Plain(Joint):
    """Steps along the gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.model.parameters() if p.requires_grad), lr=0.1)


def train(folder: Path, name: str, stage: str, world: int, strategy: Any) -> None:
    config = ModelConfig(backbone=toy_config().backbone, system=small(name))
    task = Plain(config, {"own": SystemLosses(stage)}, stages_of(name)[stage])
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # two processes draw other masks than one
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=[LossLog()], default_root_dir=folder, accelerator="cpu", devices=world, strategy=strategy,
        limit_val_batches=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    data = PairData(Scenes("train", count=16), Scenes("val", count=2), batch_size=ROWS // world, captions_per_image=2)
    trainer.fit(task, datamodule=data)
    weights = task.whole_model().state_dict()
    torch.save(weights, folder / f"weights-{trainer.global_rank}.pt")


def each(rank: int, world: int, folder: Path) -> None:
    """What each of the two processes does."""
    rank_zero_only.rank = rank
    for name, stage in STAGES:
        train(folder / name / stage, name, stage, world, "ddp")
    for name, stage in CUT:
        train(folder / "cut" / name, name, stage, world, FSDP2())
    try:
        train(folder / "cut" / "albef", "albef", "joint", world, FSDP2())
    except ValueError as error:
        (folder / "cut" / "albef" / f"refused-{rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name, stage in STAGES:
        (folder / name / stage).mkdir(parents=True)
    for name in ("vlmo", "oscar", "albef"):
        (folder / "cut" / name).mkdir(parents=True)
    ranks.start(each, folder, world=2)
    return folder


@pytest.mark.timeout(900)  # two processes that import everything
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_two_ranks_learn_as_one(name: str, stage: str, together: Path, tmp_path: Path) -> None:
    train(tmp_path, name, stage, 1, "auto")
    one = torch.load(tmp_path / "weights-0.pt", weights_only=True)
    for rank in range(2):
        found: dict[str, Any] = torch.load(together / name / stage / f"weights-{rank}.pt", weights_only=True)
        assert found.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(
                found[key], value, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "stage"), CUT)
def test_weights_that_are_cut_learn_as_whole_ones(name: str, stage: str, together: Path) -> None:
    whole, cut = (
        torch.load(folder / "weights-0.pt", weights_only=True)
        for folder in (together / name / stage, together / "cut" / name)
    )
    assert whole.keys() == cut.keys()
    for key, value in whole.items():
        torch.testing.assert_close(cut[key], value, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_a_teacher_is_not_cut_apart_from_its_student(together: Path) -> None:
    for rank in range(2):
        refusal = (together / "cut" / "albef" / f"refused-{rank}.txt").read_text()
        assert "which FSDP2 would cut apart from them; train it with strategy ddp" in refusal
