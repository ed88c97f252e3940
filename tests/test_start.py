"""What `init_from` brings: the checkpoint's weights, configuration, processor and prompts, of which a recipe changes what it names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_published import saved
from test_stage import NAMES
from toy import toy_model, toy_processor
from toyrun import scenes, write_recipe

from unimodal import cli
from unimodal.cli.schedule import merge, stage_configs
from unimodal.config import AdapterConfig, MatchingConfig, ModelConfig, from_dict, to_dict
from unimodal.data import Processor
from unimodal.data.module import PairData
from unimodal.hub import find_prompts, load_checkpoint, save_checkpoint
from unimodal.tasks import ITC, Joint
from unimodal.tasks.start import StartError
from unimodal.tuning import base_name

STEPS = {"accelerator": "cpu", "max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, "enable_progress_bar": False}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that embeds, with an adapter, a prompt and pictures of its own size."""
    folder = tmp_path_factory.mktemp("start") / "toy"
    model = toy_model(matching=None, captioning=None, generation=None)
    model.add_adapter("news", AdapterConfig(target=("bridge.layers.*",), r=2))
    words = toy_processor()
    processor = Processor(words.tokenizer, image_size=words.image_size, mean=(0.1, 0.2, 0.3), max_length=20)
    return save_checkpoint(model, processor, folder, prompts={"query": "find "})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved("clip", tmp_path_factory.mktemp("published"))
    return tmp_path_factory.getbasetemp() / "published0"


def begun(start: Path, config: ModelConfig | None = None, **settings: Any) -> Joint:
    return Joint(config, {"itc": ITC()}, init_from=str(start), **settings)


def own_pairs(folder: Path, count: int = 12) -> dict[str, Any]:
    """A table of own pairs, as a recipe names it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((32, 32, 3), (20 * i % 256, i, 0), np.uint8)).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,a {NAMES[i % 3]}\n" for i in range(count))
    (folder / "pairs.csv").write_text("image,caption\n" + rows)
    return {"class_path": "unimodal.data.CsvTable", "init_args": {"path": str(folder / "pairs.csv")}}


def recipe(start: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """What a user writes who starts from a checkpoint: losses, data and length."""
    losses = settings.pop("losses", ["ITC"])
    objectives = {name.lower(): {"class_path": f"unimodal.tasks.{name}"} for name in losses}
    return {
        "model": {
            "class_path": "unimodal.tasks.Joint",
            "init_args": {"init_from": str(start), "objectives": objectives, **settings},
        },
        "data": {"train": own_pairs(folder / "data"), "batch_size": 4},
        "trainer": {**STEPS, "default_root_dir": str(folder / "run")},
    }


def test_a_task_without_a_configuration_is_the_checkpoint(start: Path) -> None:
    one, (model, processor) = begun(start), load_checkpoint(start)
    assert one.config == model.config and one.model.active == ("news",)
    theirs, ours = model.state_dict(), one.model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    bound = one.bind(PairData())
    assert bound.settings() == processor.settings() and bound.mean == (0.1, 0.2, 0.3)
    assert one.prompts == {"query": "find "}


def test_a_recipe_says_only_what_differs(start: Path, tmp_path: Path) -> None:
    bos = toy_processor().tokenizer.cls_token_id
    head = {"hidden": 32, "layers": 1, "heads": 2, "max_length": 20, "bos_id": bos, "vocabulary": 11}
    trainable = {"heads.captioning.*": 1.0}
    settings = recipe(start, tmp_path, losses=["ITG"], config={"captioning": head}, trainable=trainable)
    assert cli.main([*write_recipe(tmp_path / "recipe.yaml", settings), "--trainer.max_steps", "3"]) == 0
    assert len((tmp_path / "run/losses.jsonl").read_text().splitlines()) == 3
    before, (model, processor) = load_checkpoint(start)[0], load_checkpoint(tmp_path / "run/model")
    assert model.config == replace(before.config, captioning=model.config.captioning)
    assert model.head("captioning").vocabulary.unique().numel() == 11  # the words of the new data, not those of no data
    assert processor.mean == (0.1, 0.2, 0.3) and find_prompts(tmp_path / "run/model") == {"query": "find "}
    theirs, ours = before.state_dict(), model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_every_stage_of_a_schedule_has_what_the_stage_before_it_left(start: Path, tmp_path: Path) -> None:
    bos = toy_processor().tokenizer.cls_token_id
    judge = {"hidden": 32, "layers": 1, "heads": 2}
    content = recipe(start, tmp_path, evaluation={"captions": 0, "rerank_k": 0})
    content["data"]["val"] = scenes("val", 4)
    del content["trainer"]["default_root_dir"]
    itg, itm = ({"class_path": f"unimodal.tasks.{name}"} for name in ("ITG", "ITM"))
    captions = {"config": {"captioning": {**judge, "max_length": 20, "bos_id": bos}}, "objectives": {"itg": itg}}
    matches = {"config": {"matching": judge, "bridge": {"dropout": 0.2}}, "objectives": {"itm": itm}}
    stages = {
        "captions": {"model": {"init_args": captions}},
        "fold": {"merge": {"captions": 1}},
        "matches": {"model": {"init_args": matches}},
    }
    words = write_recipe(tmp_path / "s.yaml", {**content, "output": str(tmp_path / "out"), "stages": stages})
    assert cli.main(words) == 0
    models = {name: load_checkpoint(tmp_path / f"out/{name}/model")[0].config for name in stages}
    assert models["captions"].captioning is not None and list(models["captions"].adapters) == ["news"]
    assert models["matches"].captioning == models["captions"].captioning and models["matches"].matching is not None
    assert models["matches"].adapters == {} and models["matches"].bridge.dropout == 0.2
    afresh = {"model": {"init_args": {"init_from": str(start)}}}
    *_, (_, _, config) = stage_configs({**content, "stages": {**stages, "afresh": afresh}})
    settings = config["model"]["init_args"]
    assert settings["init_from"] == str(start) and settings["config"]["captioning"] is None
    assert list(settings["config"]["adapters"]) == ["news"]
    assert find_prompts(tmp_path / "out/model") == find_prompts(tmp_path / "out/fold/model") == {"query": "find "}
    assert cli.main(["doctor", *words[1:]]) == 0


def test_a_published_model_is_a_start_like_any_other(clip: Path, tmp_path: Path) -> None:
    settings = recipe(clip, tmp_path, config={"adapters": {"own": {"target": ["backbone.model.*"], "r": 2}}})
    settings["model"]["init_args"]["trainable"] = {"adapters.own": 1.0}
    assert cli.main(write_recipe(tmp_path / "recipe.yaml", settings)) == 0
    before, model = load_checkpoint(clip)[0], load_checkpoint(tmp_path / "run/model")[0]
    assert model.jobs == ("embedding",) and torch.equal(model.log_scale, before.log_scale)
    plain = {base_name(name): tensor for name, tensor in model.own_state(()).items()}
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.state_dict().items())
    assert begun(clip).config.embedding.dim == 16


def test_an_embedding_of_a_bridge_takes_the_place_of_a_published_one(clip: Path) -> None:
    held = load_checkpoint(clip)[0].config
    bridge = replace(toy_model().config.bridge, queries={"image": 2, "text": 2})
    embedding = replace(held.embedding, kind="bridge", dim=8, gate=False)
    one = begun(clip, replace(held, bridge=bridge, embedding=embedding, backbone=replace(held.backbone, width=32)))
    assert one.model.head("image_embedding") is not None and one.new_heads == {"image_embedding", "text_embedding"}


def test_print_config_shows_the_whole(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = write_recipe(tmp_path / "recipe.yaml", recipe(start, tmp_path))
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--print_config"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.count("news:") == 1 and "dim: 16" in shown


def test_pictures_may_become_larger_and_texts_longer(start: Path) -> None:
    held = load_checkpoint(start)[0].config
    backbone = held.backbone
    vision, text = replace(backbone.vision, image_size=64), replace(backbone.text, max_length=30)
    one = begun(start, replace(held, backbone=replace(backbone, vision=vision, text=text)))
    processor = one.bind(PairData())
    assert (processor.image_size, processor.max_length, processor.mean) == (64, 30, (0.1, 0.2, 0.3))


# What differs and cannot be loaded.


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"embedding": {"dim": 32}}, "embedding.dim is 16 in the checkpoint and 32 here"),
        ({"bridge": {"heads": 4}}, "bridge.heads is 2 in the checkpoint and 4 here"),
        ({"bridge": {"queries": {"image": 5}}}, "bridge.queries.image is 4 in the checkpoint and 5 here"),
        ({"embedding": {"scale": 50.0}}, "embedding.scale is 20.0 in the checkpoint and 50.0 here"),
        ({"bridge": None}, "bridge is present in the checkpoint and absent here"),
        ({"adapters": {"news": {"r": 4}}}, "adapters.news.r is 2 in the checkpoint and 4 here"),
        ({"backbone": {"vision": {"name": "resnet18"}}}, "backbone.vision.name is 'test_resnet' in the checkpoint"),
    ],
)
def test_a_setting_that_cannot_differ_is_named_with_both_values(
    start: Path, said: dict[str, Any], message: str
) -> None:
    given = from_dict(ModelConfig, merge(to_dict(load_checkpoint(start)[0].config), said))
    with pytest.raises(StartError, match=message):
        begun(start, given)


def test_what_is_refused_is_one_line_without_a_traceback(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_recipe(tmp_path / "recipe.yaml", recipe(start, tmp_path, config={"embedding": {"dim": 32}}))
    assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        f"unimodal fit: init_from {start}: embedding.dim is 16 in the checkpoint and 32 here. Leave out what differs, and the "
        "checkpoint's own is taken; to train another model, leave init_from out\n"
    )


def test_free_settings_that_change_a_tensor_are_named(tmp_path: Path) -> None:
    """A vision transformer learns a vector for each place of its pictures."""
    vit = {"name": "test_vit", "image_size": 32, "kwargs": {"img_size": 32}}
    text = {"name": "bert", "kwargs": toy_model().config.backbone.text.kwargs}
    backbone = {"width": 32, "vision": vit, "text": text}
    model = toy_model(matching=None, captioning=None, generation=None, backbone=backbone)
    start = save_checkpoint(model, toy_processor(), tmp_path / "vit")
    larger = replace(model.config.backbone.vision, kwargs={"img_size": 64})
    with pytest.raises(StartError, match="backbone.vision.kwargs.img_size is 32 in the checkpoint and 64 here"):
        begun(start, replace(model.config, backbone=replace(model.config.backbone, vision=larger)))
    held = replace(model.config.backbone.vision, kwargs={"img_size": 32, "reg_tokens": 1})
    with pytest.raises(StartError, match=r"1 of its tensors do not fit this model, for example .*pos_embed, which has"):
        begun(start, replace(model.config, backbone=replace(model.config.backbone, vision=held)))


def test_a_new_head_that_nothing_trains_is_refused(start: Path) -> None:
    held = load_checkpoint(start)[0].config
    with pytest.raises(StartError, match=r"it lacks heads.matching \(\d+ parameters, .*'heads.matching\*': 1.0"):
        begun(start, replace(held, matching=MatchingConfig(hidden=32, heads=2)), trainable={"bridge.*": 1.0})


def test_another_tokenizer_is_refused(start: Path, clip: Path) -> None:
    assert begun(start).bind(PairData(tokenizer="scenes")).max_length == 20
    with pytest.raises(
        ValueError, match="data.tokenizer is 'scenes', and the checkpoint .* has learned the ids of anoth"
    ):
        begun(clip).bind(PairData(tokenizer="scenes"))


def test_a_task_needs_a_model_and_a_loss(start: Path) -> None:
    with pytest.raises(ValueError, match="give config, or the checkpoint to start from in init_from"):
        Joint(objectives={"itc": ITC()})
    with pytest.raises(ValueError, match="minimises losses and has none"):
        Joint(init_from=str(start))


def test_a_start_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path / "nothing", tmp_path))
    assert cli.main(words) == 2
    assert f"init_from: {tmp_path / 'nothing'}: no such folder here" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text(json.dumps({"library": "other"}))
    assert cli.main(write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path / "damaged", tmp_path))) == 2
    assert "describes a checkpoint of other" in capsys.readouterr().err
