"""Recipes are run, not parsed: every stage of each takes two steps on a few pictures (the last step of a stage has no rate), and the report
at the end is written. `tasks/embedding` is run by `test_retrieval_training.py`."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from unimodal import cli, hub
from unimodal.data import Scenes, scenes_tokenizer, write_karpathy

TASKS = Path(__file__).parent.parent / "tasks"


@pytest.fixture
def photographs(tmp_path: Path) -> list[object]:
    """What the Flickr8k recipe asks for, small: a data set in Karpathy's format and two towers in local files, with random weights."""
    recipe = yaml.safe_load((TASKS / "flickr8k/schedule.yaml").read_text())
    backbone = recipe["model"]["init_args"]["config"]["backbone"]
    data = write_karpathy({split: Scenes(split, count=6) for split in ("train", "val")}, tmp_path / "data")
    with torch.random.fork_rng():
        save_file(timm.create_model(backbone["vision"]["name"]).state_dict(), tmp_path / "vision.safetensors")
        BertModel(BertConfig(**{**backbone["text"]["kwargs"], "num_hidden_layers": 2})).save_pretrained(
            tmp_path / "text"
        )
    tokenizer = scenes_tokenizer()
    tokenizer.save_pretrained(tmp_path / "text")
    config = "--model.init_args.config"
    words: list[object] = [f"--data.{split}.init_args.path={data}" for split in ("train", "val")]
    words += [f"--data.tokenizer={tmp_path / 'text'}", f"--data.feature_cache={tmp_path / 'features'}"]
    words += [
        f"{config}.backbone.vision.source={tmp_path / 'vision.safetensors'}",
        f"{config}.backbone.vision.image_size=64",
    ]
    words += [
        f"{config}.backbone.text.source={tmp_path / 'text'}",
        f"{config}.backbone.text.kwargs.num_hidden_layers=2",
    ]
    words += [f"{config}.bridge.layers=2", f"{config}.captioning.vocabulary=40"]
    ids = {"bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id, "unk": tokenizer.unk_token_id}
    return words + [f"{config}.captioning.{name}_id={number}" for name, number in ids.items()]


def run(name: str, output: Path, words: list[object]) -> dict[str, dict]:
    """Two steps of every stage; returns what each left in `done.json`."""
    recipe = TASKS / name / "schedule.yaml"
    stages = yaml.safe_load(recipe.read_text())["stages"]
    words = [f"--output={output}", "--data.batch_size=4", "--model.init_args.evaluation.rerank_k=3", *words]
    words += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    words += [f"--stages.{stage}.trainer.max_steps=2" for stage in stages]
    assert cli.main(["fit", "--config", str(recipe), *map(str, words)]) == 0
    return {stage: json.loads((output / stage / "done.json").read_text()) for stage in stages}


def test_quickstart(tmp_path: Path) -> None:
    words: list[object] = [f"--data.{split}.init_args.count=9" for split in ("train", "val", "test")]
    words += ["--final.captions=4", "--final.candidates=2", "--final.pictures=4"]
    done = run("quickstart", tmp_path / "out", words)
    assert {row["steps"] for row in done.values()} == {2}
    assert done["foresee"]["untouched_heads"] == ["captioning"]
    assert done["generate"]["untouched_heads"] == ["embedding", "matching", "captioning"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["metrics"]) == 8 and all(0 <= value <= 1 for value in report["metrics"].values())
    assert (tmp_path / "out/index.html").exists()


def test_flickr8k(tmp_path: Path, photographs: list[object]) -> None:
    done = run(
        "flickr8k", tmp_path / "out", [*photographs, "--stages.generate.data.batch_size=4", "--final.captions=4"]
    )
    assert {row["steps"] for row in done.values()} == {2}
    before, after = (
        hub.load_checkpoint(tmp_path / "out" / stage / "model")[0].state_dict() for stage in ("align", "generate")
    )
    frozen = [key for key in before if key.startswith(("backbone.vision.", "backbone.text."))]
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    key = (
        "heads.generation.transformer.proj_out.weight"  # the first to move: it starts at zero, and hides all before it
    )
    assert not torch.equal(before[key], after[key])
    assert "cider_d" in done["generate"]["scores"]
