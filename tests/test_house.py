"""Every published design is a model like any other: on each kind of backbone it trains, is saved, opened, searched, evaluated, explained.

The matrix is generated from the table of systems and from the stages of their recipes.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from test_published import saved
from toy import toy_config

import unimodal
from unimodal import Unimodal
from unimodal.config import ModelConfig, SystemConfig, from_dict, to_dict
from unimodal.data import Scenes
from unimodal.data.module import EvaluationBatches, PairData
from unimodal.hub import save_checkpoint
from unimodal.survey.specs import read_spec
from unimodal.systems import SYSTEMS, System
from unimodal.systems.hosted import class_of
from unimodal.tasks import Evaluation, EvaluationSettings, Joint, OptimizerSettings, SystemLosses

RECIPES = Path(__file__).parent.parent / "configs" / "systems"
BACKBONES = ("towers", "clip", "siglip")
SMALL = {
    "width": 32,
    "heads": 2,
    "dim": 16,
    "dropout": 0.0,
    "queue": 32,
    "queries": 4,
    "prompts": 2,
    "hidden": 16,
    "tag_count": 2,
}
CATEGORIES = ("circle", "square", "triangle")


def recipe(name: str) -> Path:
    """The file of a system's recipe; SCAN has one for each direction and pool."""
    return RECIPES / f"{'scan_t2i_avg' if name == 'scan' else name}.yaml"


@cache
def stages_of(name: str) -> dict[str, dict[str, float]]:
    """What each stage of a system trains, by patterns over the model's parameter names."""
    return {
        stage: {f"system.{pattern}": factor for pattern, factor in settings.trainable.items()}
        for stage, settings in read_spec(recipe(name)).stages.items()
    }


def small(name: str) -> SystemConfig:
    """The system at toy size."""
    whole = SystemConfig(name=name, categories=CATEGORIES)
    accepted = class_of(replace(whole, settings={}))
    settings: dict[str, Any] = {}
    for key, value in SMALL.items():
        try:
            class_of(replace(whole, settings={key: value}))
        except ValueError:
            continue
        settings[key] = value
    assert accepted is SYSTEMS[name]
    return replace(whole, settings=settings)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of each kind of backbone; the published ones lie in folders as their authors release them."""
    out: dict[str, Any] = {"towers": to_dict(toy_config().backbone)}
    for name in ("clip", "siglip"):
        folder = tmp_path_factory.mktemp("published")
        saved(name, folder)
        out[name] = {"width": None, "published": {"name": name, "source": str(folder)}}
    return out


def data() -> PairData:
    return PairData(Scenes("train", count=12), Scenes("val", count=6), batch_size=6, seed=0)


def task(config: ModelConfig, name: str, stage: str, before: Path | None = None) -> Joint:
    return Joint(
        config,
        {"own": SystemLosses(stage)},
        trainable=stages_of(name)[stage],
        optimizer=OptimizerSettings(lr=1e-3),
        evaluation=EvaluationSettings(pictures=0),
        init_from=None if before is None else str(before),
    )


def fitted(one: Joint, steps: int, folder: Path) -> Joint:
    """The task after so many steps."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )
    trainer.fit(one, datamodule=data())
    return one


def writes_without_a_start(name: str, backbone: str) -> bool:
    """Whether a system begins captions with a token that the backbone's tokenizer lacks."""
    return SYSTEMS[name].write is not System.write and backbone == "siglip"


@pytest.mark.parametrize("name", [name for name in SYSTEMS if writes_without_a_start(name, "siglip")])
def test_a_system_that_writes_needs_a_token_to_begin_with(name: str, sources: dict[str, Any]) -> None:
    config = from_dict(ModelConfig, {"backbone": sources["siglip"], "system": to_dict(small(name))})
    with pytest.raises(ValueError, match="needs a token that begins texts, and this tokenizer has none to spare"):
        task(config, name, next(iter(stages_of(name)))).bind(data())


CARRIED = [
    (name, backbone)
    for name in SYSTEMS
    for backbone in BACKBONES
    if stages_of(name) and not writes_without_a_start(name, backbone)
]


@pytest.mark.parametrize(("name", "backbone"), CARRIED)
def test_a_system_trains_and_travels(name: str, backbone: str, sources: dict[str, Any], tmp_path: Path) -> None:
    config = from_dict(ModelConfig, {"backbone": sources[backbone], "system": to_dict(small(name))})
    before = None
    for stage in stages_of(name):
        one = fitted(task(config, name, stage, before), 1, tmp_path)
        trained = {n: p for n, p in one.model.named_parameters() if p.requires_grad}
        assert trained and all(n.startswith("system.") for n in trained)
        assert not [n for n, p in trained.items() if p.grad is None]
        assert one.processor is not None
        before = save_checkpoint(one.model.eval(), one.processor, tmp_path / stage)
    opened = unimodal.from_pretrained(before)
    assert opened.model.config.system == one.model.config.system
    pairs = Scenes("val", count=4)
    pictures, captions = [pairs.image(i) for i in range(4)], [pairs.captions(i)[0] for i in range(4)]
    same_outputs(Unimodal(one.model, one.processor), opened, pictures, captions)
    is_evaluated(opened, pairs)
    is_searched(opened, pictures, captions)
    explanation = opened.explain(pictures[0], captions[0], steps=2)
    assert np.isfinite(explanation.heatmap).all() and explanation.heatmap.any()


def same_outputs(one: Unimodal, other: Unimodal, pictures: list[Any], captions: list[str]) -> None:
    """Embeddings and pair scores of two models are equal."""
    assert one.model.jobs == other.model.jobs
    states = [(m.encoder.images(pictures), m.encoder.texts(captions)) for m in (one, other)]
    rows = torch.arange(len(pictures))
    with torch.no_grad():
        if one.model.embeds is not None:
            for side in (0, 1):
                read = [
                    (m.model.image_embedding, m.model.text_embedding)[side](s[side])
                    for m, s in zip((one, other), states)
                ]
                torch.testing.assert_close(*read, atol=1e-6, rtol=0)
        if one.model.matcher is not None:
            scores = [m.model.match(*s, rows, rows) for m, s in zip((one, other), states)]
            torch.testing.assert_close(*scores, atol=1e-6, rtol=0)


def is_evaluated(one: Unimodal, pairs: Scenes) -> None:
    """Every job of the model is measured."""
    evaluation = Evaluation(one.model, one.processor, pairs, EvaluationSettings(pictures=0, captions=4))
    evaluation.add(EvaluationBatches(pairs, one.processor, [list(range(len(pairs)))], None)[0])
    numbers = evaluation.numbers(evaluation.results())
    assert {"t2i_r1_first", "i2t_r1_first"} <= set(numbers) and all(np.isfinite(value) for value in numbers.values())


def is_searched(one: Unimodal, pictures: list[Any], captions: list[str]) -> None:
    """An index answers, or says what the model lacks."""
    if one.model.embeds is None:
        with pytest.raises(ValueError, match="embedding"):
            one.build_index(pictures)
        return
    (hits,) = one.build_index(pictures).search(captions[:1], top_k=2)
    assert len(hits) == 2
