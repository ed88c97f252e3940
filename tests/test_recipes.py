"""Recipes are run, not parsed: every stage of each takes two steps on a few pictures (the last step of a stage has no rate), and the report
at the end is written. `tasks/embedding` is run by `test_retrieval_training.py`."""

import json
from pathlib import Path

import timm
import torch
import yaml
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from unimodal import cli, hub
from unimodal.data import Scenes, scenes_tokenizer, write_karpathy

TASKS = Path(__file__).parent.parent / "tasks"


def photographs(name: str, tmp_path: Path) -> list[object]:
    """What a recipe on photographs asks for, small: a data set in Karpathy's format and towers in local files, with random weights."""
    recipe = yaml.safe_load((TASKS / name / "schedule.yaml").read_text())
    backbone = recipe["model"]["init_args"]["config"]["backbone"]
    data = write_karpathy({split: Scenes(split, count=6) for split in ("train", "val")}, tmp_path / "data")
    config = "--model.init_args.config"
    words: list[object] = [f"--data.{split}.init_args.path={data}" for split in ("train", "val")]
    with torch.random.fork_rng():
        for tower in {"vision", "beside"} & backbone.keys():
            weights = timm.create_model(backbone[tower]["name"]).state_dict()
            save_file(weights, tmp_path / f"{tower}.safetensors")
            words.append(f"{config}.backbone.{tower}.source={tmp_path / f'{tower}.safetensors'}")
            words.append(f"{config}.backbone.{tower}.image_size=64")
        BertModel(BertConfig(**{**backbone["text"]["kwargs"], "num_hidden_layers": 2})).save_pretrained(
            tmp_path / "text"
        )
    tokenizer = scenes_tokenizer()
    tokenizer.save_pretrained(tmp_path / "text")
    words += [f"--data.tokenizer={tmp_path / 'text'}", f"--data.feature_cache={tmp_path / 'features'}"]
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
    assert len(report["metrics"]) >= 10 and all(0 <= value <= 1 for value in report["metrics"].values())
    assert (tmp_path / "out/index.html").exists()


def test_flickr8k(tmp_path: Path) -> None:
    words = [*photographs("flickr8k", tmp_path), "--stages.generate.data.batch_size=4", "--final.captions=4"]
    done = run("flickr8k", tmp_path / "out", words)
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


def test_small(tmp_path: Path) -> None:
    words = photographs("small", tmp_path)
    words += ["--stages.align.data.batch_size=4", "--final.captions=4", "--final.rerank_k=3"]
    done = run("small", tmp_path / "out", words)
    assert {stage: row["untouched_heads"] for stage, row in done.items()} == {
        "align": ["matching", "captioning"],
        "describe": ["embedding"],
    }
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"t2i_r1_reranked", "i2t_r1_first", "cider_d"} <= report["metrics"].keys() and "captions" in report["more"]
    before, after = (
        hub.load_checkpoint(tmp_path / "out" / stage / "model")[0].state_dict() for stage in ("align", "describe")
    )
    frozen = [key for key in before if key.startswith(("backbone.vision.", "backbone.beside.", "backbone.text."))]
    assert len(frozen) > 100 and all(torch.equal(before[key], after[key]) for key in frozen)
    whole, shipped = (tmp_path / "out" / part / "model.safetensors" for part in ("describe/model", "model"))
    assert shipped.stat().st_size < 0.3 * whole.stat().st_size  # int8
    card = (tmp_path / "out/model/README.md").read_text()
    said = yaml.safe_load((TASKS / "small/schedule.yaml").read_text())["card"]
    assert "# unimodal-small" in card and said["limits"].strip() in card and said["summary"].strip() in card
    run("small", tmp_path / "out", words)  # what is finished is scored again, in the rounded weights
    assert json.loads((tmp_path / "out/report.json").read_text())["metrics"] == report["metrics"]
