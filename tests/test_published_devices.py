"""A published backbone with LoRA under two processes learns as under one: FSDP2 with recomputed blocks, DDP with compiled ones."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import ranks
import torch
from pytorch_lightning.utilities import rank_zero_only
from test_published import bridged, saved

from unimodal.config import AdapterConfig
from unimodal.data import Scenes
from unimodal.data.module import PairData
from unimodal.tasks import FSDP2, ITC, Joint, LossLog, OptimizerSettings

ROWS = 4  # of a step of all processes together
LORA = AdapterConfig(target=("backbone.model.*.q_proj", "backbone.model.*.v_proj"), r=4)
UNUSED = ("backbone.model.*", "bridge.*text_mlp*", "bridge.*_embedding.*", "bridge.lm_*", "bridge.query_sets.generate")
TRAINABLE = {"*": 1.0, **dict.fromkeys(UNUSED, 0.0), "adapters.news": 1.0}


def train(folder: Path, world: int, published: Path, strategy: Any, **settings: Any) -> None:
    config = replace(bridged(published, "clip", matching=None, captioning=None), adapters={"news": LORA})
    object.__setattr__(config.bridge, "dropout", 0.0)  # two processes draw other masks than one
    optimizer = OptimizerSettings(lr=0.01, warmup=0.0)
    task = Joint(config, {"itc": ITC()}, TRAINABLE, optimizer=optimizer, **settings)
    trainer = pl.Trainer(
        max_steps=2, callbacks=[LossLog()], default_root_dir=folder, accelerator="cpu", devices=world, strategy=strategy,
        limit_val_batches=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=PairData(Scenes("train", count=8), Scenes("val", count=2), batch_size=ROWS // world))
    weights = task.whole_model().state_dict()
    if trainer.is_global_zero:
        torch.save({name: weight for name, weight in weights.items() if ".news." in name}, folder / "adapter.pt")


def both(rank: int, world: int, folder: Path) -> None:
    """What each of the two processes does."""
    rank_zero_only.rank = rank
    train(folder / "fsdp2", world, folder / "clip", FSDP2(), gradient_checkpointing=True)
    torch.compile = functools.partial(torch.compile, backend="eager")  # all but the time that a compiler takes
    train(folder / "ddp", world, folder / "clip", "ddp", compile=True)


@pytest.mark.timeout(900)  # two processes that import everything
def test_it_learns_as_under_one(tmp_path: Path) -> None:
    saved("clip", tmp_path / "clip")
    ranks.start(both, tmp_path, world=2)
    train(tmp_path / "one", 1, tmp_path / "clip", "auto")
    one, fsdp2, ddp = (
        [json.loads(line) for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
        for name in ("one", "fsdp2", "ddp")
    )
    assert len(one) == 2
    for rows in (fsdp2, ddp):
        assert [row["itc"] for row in rows] == pytest.approx([row["itc"] for row in one], rel=1e-4)
    ours, theirs = (torch.load(tmp_path / name / "adapter.pt", weights_only=True) for name in ("fsdp2", "one"))
    assert ours.keys() == theirs.keys() and any(
        weight.abs().max() > 1e-3 for name, weight in ours.items() if "lora_B" in name
    )
    for name, weight in ours.items():
        torch.testing.assert_close(
            weight, theirs[name], rtol=0, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
