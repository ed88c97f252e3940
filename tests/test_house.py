"""Every published design is a model like any other: on each kind of backbone it trains, is saved, opened, searched, evaluated, explained.

The matrix is generated from the table of systems and from the stages of their recipes.
"""

import json
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from test_published import saved
from test_start import own_pairs
from toy import toy_config, toy_processor

import unimodal
from unimodal import Unimodal, cli, words
from unimodal.cli.messages import ConfigError
from unimodal.cli.system import schedule_of
from unimodal.config import ModelConfig, SystemConfig, from_dict, to_dict
from unimodal.data import Scenes, words_of
from unimodal.data.module import EvaluationBatches, PairData
from unimodal.hub import CheckpointError, save_checkpoint
from unimodal.model import UnimodalModel
from unimodal.stages import placed
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
    content = words.load(recipe(name).read_text(encoding="utf-8"))
    if not content.get("stages"):
        return {}  # it is fitted in closed form
    stages = schedule_of(content)["stages"]
    return {stage: settings["model"]["init_args"]["trainable"] for stage, settings in stages.items()}


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


class Kept(pl.Callback):
    """Saves the state after so many steps."""

    def __init__(self, steps: int, path: Path) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


def fitted(one: Joint, steps: int, folder: Path, *callbacks: pl.Callback, go_on: Path | None = None) -> Joint:
    """The task after so many steps."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )
    trainer.fit(one, datamodule=data(), ckpt_path=go_on, weights_only=True)
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
        places = placed(one.model)
        assert trained and not [n for n in trained if places[n][0].startswith("towers.")]
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
    if opened.model.matcher is not None:
        scores = opened.predict([(caption, picture) for caption, picture in zip(captions, pictures)])
        rows = torch.arange(len(pictures))
        with torch.no_grad():
            expected = opened.model.match(opened.encoder.images(pictures), opened.encoder.texts(captions), rows, rows)
        torch.testing.assert_close(torch.as_tensor(scores), expected.sigmoid(), atol=1e-4, rtol=1e-4)
        assert len(opened.rank(captions[0], pictures)) == len(pictures)
    explanation = opened.explain(pictures[0], captions[0], steps=2)
    assert np.isfinite(explanation.heatmap).all() and explanation.heatmap.any()


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in SYSTEMS for stage in stages_of(name)])
def test_a_stage_that_goes_on_ends_where_it_would_have_ended(
    name: str, stage: str, sources: dict[str, Any], tmp_path: Path
) -> None:
    """A teacher, a queue, a buffer of trust are resumed, too."""
    config = from_dict(ModelConfig, {"backbone": sources["towers"], "system": to_dict(small(name))})
    path = tmp_path / "resume.ckpt"
    whole = fitted(task(config, name, stage), 5, tmp_path, Kept(3, path))
    one = fitted(task(config, name, stage), 5, tmp_path, go_on=path)
    there, here = whole.model.state_dict(), one.model.state_dict()
    assert there.keys() == here.keys()
    assert not [key for key, value in there.items() if not torch.equal(value, here[key])]


def test_the_readme_trains_albef_on_own_data_with_an_own_clip(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files and commands as they stand, but for sizes and the device."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    own = re.search(r"```yaml\n# own.yaml\n(.*?)```", text, re.DOTALL)
    commands = re.search(r"```bash\n(unimodal fit .*?)```", text, re.DOTALL)
    assert own is not None and commands is not None
    settings = words.load(own[1])
    settings["data"]["batch_size"] = 6
    settings["trainer"] = {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False}
    settings["model"]["init_args"]["config"]["system"] = to_dict(small("albef")) | {"words": None, "categories": []}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(RECIPES.parent)
    (tmp_path / "my-clip").symlink_to(sources["clip"]["published"]["source"])
    (tmp_path / "own.yaml").write_text(words.dump(settings))
    for name in ("train", "val"):
        own_pairs(tmp_path, 12)
        (tmp_path / "pairs.csv").rename(tmp_path / f"{name}.csv")
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "other.jpg", "photos/one.jpg"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    for command in commands[1].strip().splitlines():
        assert cli.main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
    assert "one.jpg" in capsys.readouterr().out


def test_a_system_that_knows_no_words_is_neither_saved_nor_opened(tmp_path: Path) -> None:
    """Words of no tokenizer would be written and hidden in silence."""
    model, processor = (
        UnimodalModel(ModelConfig(backbone=toy_config().backbone, system=small("albef"))),
        toy_processor(),
    )
    with pytest.raises(ValueError, match="does not know the tokenizer's words, .* tell it first: model.learn_words"):
        save_checkpoint(model, processor, tmp_path / "model")
    model.learn_words(words_of(processor))
    folder = save_checkpoint(model.eval(), processor, tmp_path / "model")
    with pytest.raises(ValueError, match="has learned the ids of another tokenizer"):
        model.learn_words(replace(words_of(processor), mask_id=7))
    content = json.loads((folder / "config.json").read_text())
    content["model"]["system"]["words"] = None
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config.json: system.words is null"):
        unimodal.from_pretrained(folder)


def test_a_class_of_the_readers_own_is_not_taken_for_one_of_the_same_name() -> None:
    with pytest.raises(
        ConfigError, match=r"system: 'mine.CLIP' is no part of a model, .* fixed table: albef, .*survey --systems FILE"
    ):
        schedule_of({"system": "mine.CLIP", "stages": {"contrast": {}}})
    for path in ("unimodal.systems.CLIP", "unimodal.systems.clip.CLIP"):
        assert schedule_of({"system": path, "stages": {"contrast": {}}})["name"] == "clip"


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
