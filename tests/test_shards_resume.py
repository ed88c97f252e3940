"""Proves that training over tar shards is shuffled exactly, and that a killed run reads on as if nothing had happened: every batch
that was not yet trained on comes, in the same order and with the same captions, mirroring and cropping, and none comes twice."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_processor

from unimodal.data import Scenes, WebDatasetTars, write_webdataset
from unimodal.data.module import TrainingLoader, TrainingSamples

COUNT, BATCH, STEPS = 11, 2, 12  # five batches an epoch, and an image that each epoch leaves out


def loader(folder: Path, workers: int = 0) -> TrainingLoader:
    """As a new process makes it: the shards are indexed again."""
    pairs = WebDatasetTars(folder / "*.tar", split="train")
    samples = TrainingSamples(pairs, toy_processor(), seed=3, mirror=True, crop=0.5, target_size=None, cache=None)
    return TrainingLoader(samples, batch_size=BATCH, workers=workers, neighbours=None, rank=0, world=1)


def rows(batches: TrainingLoader, steps: int) -> list[dict[str, Any]]:
    """What the next steps read, over as many epochs as they need, and the state after each."""
    seen: list[dict[str, Any]] = []
    while len(seen) < steps:
        for batch in batches:
            row = {key: batch[key].tolist() for key in ("image_id", "text_id", "text")}
            seen.append(row | {"pixels": batch["image"].double().sum().item(), "state": batches.state_dict()})
            if len(seen) == steps:
                break
    return seen


def train_until_killed(folder: Path, log: Path, stop: int) -> None:
    torch.set_num_threads(1)
    for row in rows(loader(folder), stop):
        with open(log, "a") as file:
            file.write(json.dumps(row) + "\n")
    time.sleep(60)  # inside a step


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    write_webdataset(Scenes("train", count=COUNT), folder, shard_size=4)
    return folder


def test_every_epoch_is_a_new_order_over_all_shards(shards: Path) -> None:
    seen = rows(loader(shards), 10)
    epochs = [[image for row in seen[part] for image in row["image_id"]] for part in (slice(5), slice(5, 10))]
    assert all(len(set(epoch)) == 10 for epoch in epochs) and epochs[0] != epochs[1]
    assert any({image // 4 for image in row["image_id"]} != {row["image_id"][0] // 4} for row in seen)  # of two shards
    assert rows(loader(shards, workers=2), 7) == seen[:7]


@pytest.mark.parametrize("stop", [2, 5, 8])  # inside the first epoch, at its end, inside the second
def test_a_killed_run_reads_on(shards: Path, tmp_path: Path, stop: int) -> None:
    whole = rows(loader(shards), STEPS)
    log = tmp_path / "log.jsonl"
    process = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(shards, log, stop))
    process.start()
    while not log.exists() or log.read_text().count("\n") < stop:
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = [json.loads(line) for line in log.read_text().splitlines()]
    again = loader(shards)
    again.load_state_dict(done[-1]["state"])
    assert done + rows(again, STEPS - stop) == whole
