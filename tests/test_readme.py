"""README's Python and YAML run as they stand there, on toy folders in place of the demo's and the Hub's."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
import yaml
from PIL import Image
from test_published import clip
from test_start import own_pairs
from toy import toy_config, toy_model, toy_processor
from toyqwen import toy_qwen

import unimodal
from tests.blip2 import save_captioner
from unimodal import cli
from unimodal.backbones import published
from unimodal.config import to_dict
from unimodal.hub import CheckpointError, save_checkpoint

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(chapter: str, language: str) -> str:
    """The only block of a language in a chapter."""
    (text,) = re.findall(rf"^## {chapter}.*?\n(.*?)^## ", README, flags=re.M | re.S)
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
    return found


def save_clip(folder: Path) -> None:
    """A toy CLIP whose embedding is as wide as that of ViT-B/32."""
    model, processor = clip()
    model.config.projection_dim = 512
    T.CLIPModel(model.config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the pictures that README speaks of and a Hub that has its models."""
    made = {
        "openai/clip-vit-base-patch32": save_clip,
        "Qwen/Qwen3-VL-Embedding-2B": lambda folder: toy_qwen(folder, "embedder", width=576),
        "Qwen/Qwen3-VL-Reranker-2B": lambda folder: toy_qwen(folder, "reranker"),
        "Salesforce/blip2-opt-2.7b": save_captioner,
    }

    def download(name: str, **options: Any) -> str:
        folder = tmp_path / "hub" / name
        if not folder.exists():
            torch.manual_seed(0)
            made[name](folder)
        return str(folder)

    monkeypatch.setattr(published, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (60, 40), colour).save(name)
    return tmp_path


def test_a_checkpoint_of_ours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(toy_model(), toy_processor(), "checkpoints/demo/model")
    told: dict[str, Any] = {}
    exec(block("From Python", "python"), told)
    exec(block("Retrieval, measured", "python"), told)
    assert Image.open("drawn.png").size == (32, 32) and (here / "pictures.index").is_dir()
    assert [hit["id"] for hit in told["index"].search("a red circle", top_k=2)] == [1]  # the other one was deleted
    assert "rerank_score" in capsys.readouterr().out


def test_published_models(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: dict[str, Any] = {"unimodal": unimodal}
    exec(block("Published models", "python"), told)
    assert "('embedding',) ('matching', 'captioning', 'generation')" in capsys.readouterr().out
    assert {hit["document"] for hit in told["hits"]} == {str(here / "one.png"), str(here / "two.png")}
    assert told["vectors"].shape == (1, 512)
    assert sorted(row["corpus_id"] for row in told["ranking"]) == [0, 1]
    assert isinstance(told["answer"], str)


def test_a_recipe_with_an_adapter(here: Path) -> None:
    """Two steps of a schedule with this backbone; then the adapter is chosen in the call, saved alone and refused on another backbone."""
    parts = {name: part for name, part in to_dict(toy_config()).items() if name in ("bridge", "matching")}
    reader = {
        split: {"class_path": "unimodal.data.Scenes", "init_args": {"split": split, "count": 4}}
        for split in ("train", "val")
    }
    schedule = {
        "output": "out",
        "model": {
            "class_path": "unimodal.tasks.Joint",
            "init_args": {
                "config": {**parts, "captioning": None, "generation": None},
                "objectives": {name: {"class_path": f"unimodal.tasks.{name.upper()}"} for name in ("itc", "itm")},
                "evaluation": {"rerank_k": 0, "captions": 0, "pictures": 0},
            },
        },
        "data": {**reader, "batch_size": 4},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "enable_progress_bar": False},
        "stages": {"tune": {}},
    }
    (here / "schedule.yaml").write_text(yaml.safe_dump(schedule))
    (here / "backbone.yaml").write_text(block("Published models", "yaml"))
    assert cli.main(["fit", "--config", "schedule.yaml", "--config", "backbone.yaml"]) == 0
    model = unimodal.from_pretrained("out/model")
    assert model.adapters == ("low_rank",) and model.heads == ("embedding", "matching")
    tuned = model.encode(["a dog"], adapter="low_rank")
    model.set_adapter(None)
    assert abs(tuned - model.encode(["a dog"])).max() > 0
    plain = unimodal.from_pretrained("openai/clip-vit-base-patch32")
    plain.load_adapter("out/tune/adapter")
    assert abs(plain.encode(["a dog"], adapter="low_rank") - tuned).max() < 1e-6
    torch.manual_seed(1)
    save_clip(here / "another")
    with pytest.raises(CheckpointError, match="belongs to a backbone with fingerprint .* Open the model"):
        unimodal.from_pretrained("another").load_adapter("out/tune/adapter")


def test_own_pairs(here: Path) -> None:
    own_pairs(here, 24)
    save_checkpoint(
        toy_model(matching=None, captioning=None, generation=None), toy_processor(), "checkpoints/unimodal-small"
    )
    (here / "photos").mkdir()
    (here / "0.png").rename(here / "photos/0.png")
    own_pairs(here, 24)
    for line in block("Your own pairs", "bash").splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0, line
    names: dict[str, Any] = {"unimodal": unimodal}
    exec(block("Your own pairs", "python"), names)
    assert names["model"].heads == ("embedding",) and names["done"].rows
