"""Evidence for the survey's run, whichever system it is: what comes back from disk is what was trained, a stage that went wrong is no
result, minutes are a budget as steps are, mined batches are read as they were mined, and captions are asked as they stand."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_published import saved
from torch import Tensor, nn
from toy import toy_model, toy_processor
from toysurvey import ToyEncoders, endless, toy_pairs

from unimodal.data import Scenes
from unimodal.data.module import TrainingLoader, TrainingSamples
from unimodal.hub import save_checkpoint
from unimodal.survey import run as runs
from unimodal.survey import train as training
from unimodal.survey.data import SurveyData
from unimodal.survey.encoders import SharedEncoders
from unimodal.survey.run import Run, configs, load_system, run_system
from unimodal.survey.score import all_pairs, embeddings, states
from unimodal.survey.specs import Spec, systems_folder
from unimodal.survey.train import Budget, train
from unimodal.systems import ELIPS, Batch, Encoders, Stage, System

CONFIGS = configs(systems_folder(), None)


def survey_data(encoders: Path, cache: Path) -> SurveyData:
    return SurveyData(Scenes("train", count=24), Scenes("val", count=2), SharedEncoders(encoders, grid=2), cache)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SurveyData:
    folder = tmp_path_factory.mktemp("toy")
    return survey_data(save_checkpoint(toy_model(), toy_processor(), folder / "model"), folder / "cache")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> SurveyData:
    """The same scenes, by encoders with an embedding of their own."""
    folder = tmp_path_factory.mktemp("clip")
    saved("clip", folder / "model")
    return survey_data(folder / "model", folder / "cache")


# From disk.


def scores(spec: Spec, system: System, data: SurveyData) -> dict[str, Tensor]:
    """All that a ranking by the system's rule follows from."""
    images, texts, _, _ = data.gallery(pixels=system.needs_pixels)
    found = {}
    if spec.scoring.first == "embed" and spec.scoring.shortlist is None:
        found["image"], found["text"] = embeddings(system, images, texts)
    if system.scores_pairs:
        found["pairs"] = all_pairs(system, *states(system, images, texts))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_system_from_disk_scores_as_it_did(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as in memory when it was ranked, with the encoders read from disk as well."""
    data = request.getfixturevalue("published" if name == "as_it_comes" else "data")
    ranked = []

    def rank(system: System, *arguments: Any, **settings: Any) -> Any:
        ranked.append(system)
        return rank_as_ever(system, *arguments, **settings)

    rank_as_ever = runs.rank
    monkeypatch.setattr(runs, "rank", rank)
    # The seed is none that `load_system` builds with: what was drawn and is not in the file would differ.
    run_system(name, CONFIGS[name], Run(data, Budget(steps=2), tmp_path, seed=3), lambda line: None)
    spec, again, encoders = load_system(tmp_path / name)
    assert again is not ranked[-1] and encoders is not data.encoders
    before, after = scores(spec, ranked[-1], data), scores(spec, again, data)
    assert before and before.keys() == after.keys()
    for kind, values in before.items():
        assert torch.equal(after[kind], values) and values.std() > 0, kind


# Stages that go wrong, and budgets in minutes.


class Learner(System):
    """One weight that learns beside a frozen layer with running statistics. A step takes ten seconds of its own clock."""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__(encoders)
        self.learns, self.frozen = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(2)
        self.seconds, self.told = 0.0, {}

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        self.told.setdefault(stage, []).append(progress)
        return {"square": self.learns.square().sum(), "steady": torch.ones(())}

    def after_step(self, stage: str) -> None:
        self.seconds += 10


def learn(system: System, steps: int = 4, **settings: Any) -> dict[str, Any]:
    stage = Stage(trainable={"learns": 1.0}, **settings)
    return train(system, {"only": stage}, lambda *_: endless(toy_pairs(4), 2), Budget(steps=steps))["only"]


@pytest.mark.parametrize("name", ["frozen.weight", "frozen.running_mean"])
def test_a_frozen_tensor_that_moves_ends_the_run(name: str) -> None:
    class Leaks(Learner):
        @torch.no_grad()
        def after_step(self, stage: str) -> None:
            self.state_dict()[name].add_(1e-3)

    with pytest.raises(RuntimeError, match=f"stage only froze 1 tensors that moved all the same, first {name}$"):
        learn(Leaks(ToyEncoders()))
    assert learn(Learner(ToyEncoders()))["trained"] == 1


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="^stage only: the loss square is inf; lower the stage's lr$"):
        learn(Learner(ToyEncoders()), lr=1e30)
    assert learn(Learner(ToyEncoders()), lr=1e-3)["losses"]["square"] < 1


def test_minutes_are_shared_by_stages_and_counted_from_their_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    system = Learner(ToyEncoders())
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: system.seconds))

    def slow_to_begin(*_: Any) -> Iterator[Batch]:
        system.seconds += 100
        yield from endless(toy_pairs(4), 2)

    stages = {name: Stage(trainable={"learns": 1.0}, share=share) for name, share in (("short", 1), ("long", 3))}
    done = train(system, stages, slow_to_begin, Budget(minutes=1))
    assert system.told["short"] == pytest.approx([0, 10 / 15])
    assert system.told["long"] == pytest.approx([0, 10 / 45, 20 / 45, 30 / 45, 40 / 45])
    assert [(stage["steps"], stage["seconds"]) for stage in done.values()] == [(2, 120), (5, 150)]


# Mined batches.


def test_elip_trains_on_mined_groups_in_the_order_of_their_file(
    data: SurveyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def losses(self: ELIPS, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        if stage == "elip":
            seen.append(batch.image_id.tolist())
        return losses_as_ever(self, batch, stage, progress)

    losses_as_ever = ELIPS.losses
    monkeypatch.setattr(ELIPS, "losses", losses)
    config = tmp_path / "elip.yaml"
    config.write_text(CONFIGS["elip_s"].read_text().replace("batch_size: 16", "batch_size: 6").replace("4.0", "0.5"))
    run_system("elip", config, Run(data, Budget(steps=9), tmp_path), lambda line: None)
    groups = json.loads((tmp_path / "elip/elip.batches.json").read_text())["batches"]
    assert len(groups) == 4 and seen == groups + groups[:2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_one_mined_group(world: int) -> None:
    """A global batch is one group, each process has a part of its own, and batches come as they are planned."""
    groups = torch.arange(24).view(4, 6)
    neighbours = torch.stack([groups[i // 6][groups[i // 6] != i] for i in range(24)])
    samples = TrainingSamples(
        Scenes("train", count=24), toy_processor(), seed=0, mirror=False, target_size=None, cache=None
    )
    settings: Any = {"batch_size": 6 // world, "workers": 0, "neighbours": neighbours, "world": world}
    loaders = [TrainingLoader(samples, rank=rank, **settings) for rank in range(world)]
    for _ in range(2):
        plans = [[[index for _, index, _ in rows] for rows in loader.plan()] for loader in loaders]
        read = [[batch["image_id"].tolist() for batch in loader] for loader in loaders]
        assert read == plans and len(read[0]) == 4
        together = [sorted(sum(parts, [])) for parts in zip(*read)]
        assert sorted(together) == groups.tolist()


# Prompts.


def test_captions_are_asked_as_they_stand(data: SurveyData) -> None:
    """No system's captions get a prompt that another's do not: the same tokens rank for all of them."""
    _, texts, _, _ = data.gallery()
    captions = [caption for i in range(len(data.val)) for caption in data.val.captions(i)]
    decode = data.encoders.processor.decode
    assert [decode(ids[mask].tolist()) for ids, mask in zip(texts.ids, texts.mask)] == [c.lower() for c in captions]
