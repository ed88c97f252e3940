"""Parameter-efficient tuning: adapters begin as nothing, train alone, merge into what they compute, and travel without their backbone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from test_published import saved
from test_tasks import SMALL, Batches, data, trainer
from torch import Tensor
from toy import toy_config, toy_model, toy_processor
from toyqwen import toy_qwen

import unimodal
from tests.blip2 import save_retrieval
from unimodal import cli, stages
from unimodal.config import AdapterConfig, to_dict
from unimodal.hub import CheckpointError, load_checkpoint, save_adapter, save_checkpoint
from unimodal.model import UnimodalModel
from unimodal.tasks import ITC, Joint, StageProof
from unimodal.tuning import adapter_of

KINDS = ["lora", "dora", "ia3", "layer_norm", "bottleneck", "prompt", "prefix"]
MERGED = KINDS[:4]
TOWERS = ("backbone.vision.*", "backbone.text.*")
VIT = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 32,
}
BACKBONE = to_dict(toy_config())["backbone"] | {"vision": VIT}


def vit_config(**adapters: AdapterConfig) -> Any:
    return replace(toy_config(backbone=BACKBONE), adapters=adapters)


def vit_model(seed: int = 0) -> UnimodalModel:
    return toy_model(seed, backbone=BACKBONE)


def shaken(model: UnimodalModel, name: str, seed: int = 0) -> UnimodalModel:
    """As training leaves it: no adapter is nothing any more."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if adapter_of(key) == name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def outputs(model: UnimodalModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (3, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    image = model.encode_image(model.backbone.random_pixels(3, generator))
    return model.image_embedding(image), model.text_embedding(model.encode_text(ids, mask))


def far(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> list[float]:
    return [(x - y).abs().max().item() for x, y in zip(a, b)]


# What each kind computes.


@pytest.mark.parametrize("kind", KINDS)
def test_begins_as_nothing_is_switched_and_merges(kind: str) -> None:
    """Learned tokens are the exception: they are there from the start, small."""
    model = vit_model()
    names, before = set(model.state_dict()), outputs(model)
    model.add_adapter("news", AdapterConfig(kind=kind, target=TOWERS))
    assert max(far(outputs(model), before)) < (0.1 if kind in ("prompt", "prefix") else 1e-6)
    trained = outputs(shaken(model, "news"))
    assert min(far(trained, before)) > 1e-3
    model.set_adapter(None)
    assert far(outputs(model), before) == [0, 0]
    model.set_adapter("news")
    assert far(outputs(model), trained) == [0, 0]
    if kind in MERGED:
        model.merge_adapters()
        assert max(far(outputs(model), trained)) < 1e-5
        assert set(model.state_dict()) == names and model.config.adapters == {}
    else:
        with pytest.raises(ValueError, match=f"adapted_{kind}: news cannot be merged; lora, dora, ia3 and layer_norm"):
            model.merge_adapters()


@pytest.mark.parametrize("pair", ["clip", "siglip", "naflex"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_a_published_pair(kind: str, pair: str, tmp_path: Path) -> None:
    """A causal text tower, one that reads its padding, and pictures of any size: what is padding stays without effect."""
    saved(pair, tmp_path)
    ready = unimodal.from_pretrained(tmp_path)
    small, large = Image.new("RGB", (40, 16), "red"), Image.new("RGB", (64, 64), "blue")
    before = ready.encode([small, "a dog"])
    ready.model.add_adapter("news", AdapterConfig(kind=kind, target=("backbone.model.*_model.*",)))
    shaken(ready.model, "news")
    alone = [ready.encode([item])[0] for item in (small, large, "a dog", "a cat sits here")]
    together = ready.encode([small, large, "a dog", "a cat sits here"])
    assert abs(together[[0, 2]] - before).max() > 1e-3
    assert abs(together - alone).max() < 1e-5


@pytest.mark.parametrize("name", ["embedder", "reranker", "blip2"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_models_that_read_more(kind: str, name: str, tmp_path: Path) -> None:
    """Qwen3-VL turns its tokens by their positions, so that none may be put before them; BLIP-2's towers take all kinds."""
    target = ("backbone.model.*",)
    if name == "blip2":
        save_retrieval(tmp_path)
    else:
        toy_qwen(tmp_path, name)
    ready = unimodal.from_pretrained(tmp_path)
    items: list[Any] = [Image.new("RGB", (40, 60), "red"), Image.new("RGB", (80, 60), "blue")]

    def read(items: list[Any]) -> Any:
        return ready.predict([("a dog", item) for item in items]) if name == "reranker" else ready.encode(items)

    before = read(items)
    ready.model.add_adapter("news", AdapterConfig(kind=kind, target=target))
    shaken(ready.model, "news")
    if name != "blip2" and kind in ("prompt", "prefix"):
        with pytest.raises(ValueError, match="reads position_embeddings.*; tune it with lora, dora, ia3, layer_norm"):
            read(items)
        return
    together = read(items)
    assert abs(together - before).max() > 1e-3
    assert max(abs(together[i] - read([item])[0]).max() for i, item in enumerate(items)) < 1e-5
    ready.model.set_adapter(None)
    assert (read(items) == before).all()


def test_learned_tokens_do_what_the_papers_say() -> None:
    """Against the same sums written out: prompts are read by a block and dropped; prefixes are keys and values that are there already."""
    model = vit_model()
    block: Any = model.backbone.vision.blocks[0]
    x = torch.randn(2, 5, 32)
    model.add_adapter("read", AdapterConfig(kind="prompt", target=("backbone.vision.blocks.0",), tokens=3))
    model.add_adapter("seen", AdapterConfig(kind="prefix", target=("backbone.vision.blocks.0.attn",), tokens=4))
    with torch.no_grad():
        model.set_adapter("read")
        prompted = block(x)
        model.set_adapter("seen")
        prefixed = block.attn(x)
        model.set_adapter(None)
        prompts = block.adapted_prompt.adapters["read"].expand(2, -1, -1)
        assert torch.allclose(prompted, block(torch.cat([x, prompts], dim=1))[:, :5], atol=1e-6)
        q, k, v = block.attn.qkv(x).chunk(3, dim=-1)
        keys, values = (
            torch.cat([extra.expand(2, -1, -1), own], dim=1)
            for extra, own in zip(block.attn.adapted_prefix.adapters["seen"], (k, v))
        )
        heads = []
        for h in (slice(0, 16), slice(16, 32)):
            heads.append((q[..., h] @ keys[..., h].mT / 4).softmax(-1) @ values[..., h])
        assert torch.allclose(prefixed, block.attn.proj(torch.cat(heads, dim=-1)), atol=1e-6)


def test_a_bottleneck_corrects_what_a_layer_writes() -> None:
    model = vit_model()
    model.add_adapter("news", AdapterConfig(kind="bottleneck", target=("*.blocks.0.mlp.fc2",), r=4))
    layer = shaken(model, "news").backbone.vision.blocks[0].mlp.fc2
    down, _, _, up = layer.adapted_bottleneck.adapters["news"]
    x = torch.randn(2, 5, 128)
    plain = x @ layer.weight.T + layer.bias
    assert down.out_features == 4
    assert torch.allclose(layer(x), plain + up(torch.nn.functional.gelu(down(plain))), atol=1e-5)


def test_several_of_one_kind_add_up_or_take_turns() -> None:
    model = vit_model()
    before = outputs(model)
    for seed, name in enumerate(("news", "art")):
        model.add_adapter(name, AdapterConfig(target=("backbone.vision.*.qkv",)))
        shaken(model, name, seed)
    each = {}
    for names in ("news", "art", ("news", "art")):
        model.set_adapter(names)
        each[names] = outputs(model)[0]
    assert min(far((each["news"], each["art"], each["news"]), (before[0], each["news"], each["news", "art"]))) > 1e-3
    model.merge_adapters()
    assert torch.allclose(outputs(model)[0], each["news", "art"], atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    model = vit_model()
    lora = AdapterConfig(target=("*.qkv",))

    def refused(name: str, message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model.add_adapter(name, replace(lora, **settings))

    refused("two words", "'two words': expected a name of letters, digits and _")
    refused("keys", "'keys': expected a name .* none of Python's dict methods")
    refused("vision", "'vision': the model has a part of that name, so patterns could not tell them apart")
    refused(
        "a1",
        "'backbone.visoin.blocks' matches no module; did you mean 'backbone.vision'",
        target=("backbone.visoin.blocks",),
    )
    refused(
        "a1",
        "for example backbone.vision.blocks.0.norm1, but none that lora tunes: it takes linear",
        target=("*.norm1",),
    )
    model.add_adapter("a1", lora)
    refused("a1", "'a1': the model has a part of that name")
    refused(
        "a2", "blocks.0.attn.qkv has an adapter of another kind already; give each module adapters of one", kind="ia3"
    )
    refused("a3", "has an adapter of another kind already", kind="bottleneck")
    with pytest.raises(ValueError, match="no adapter 'a4'; did you mean 'a1'"):
        model.set_adapter("a4")
    convolutions = toy_model()
    with pytest.raises(ValueError, match="none that prompt tunes: it takes transformer blocks of the backbone"):
        convolutions.add_adapter("p", AdapterConfig(kind="prompt", target=("backbone.vision.*",)))


def test_tokens_with_positions_of_their_own_are_refused() -> None:
    model = vit_model()
    model.add_adapter("p", AdapterConfig(kind="prompt", target=("backbone.vision.blocks.*",)))
    with pytest.raises(
        ValueError, match=r"put tokens before those of a block, \[B, T, C\].*Block reads \[2, 4, 4, 32\]; tune it"
    ):
        model.backbone.vision.blocks[0](torch.randn(2, 4, 4, 32))
    with pytest.raises(ValueError, match="Block reads rope; tune it with lora"):
        model.backbone.vision.blocks[0](torch.randn(2, 4, 32), rope=torch.zeros(1))


# Stages.


def task(trainable: dict[str, float], init_from: Path | None = None, **adapters: AdapterConfig) -> Joint:
    start = None if init_from is None else str(init_from)
    config = vit_config(**adapters)
    return Joint(config, {"itc": ITC()}, trainable, evaluation=SMALL, pretrained=False, init_from=start)


TRAINED = {"bridge.*": 1.0, "heads.*_embedding.*": 1.0, "adapters.news": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapter_bridge_and_heads_train(kind: str, tmp_path: Path) -> None:
    one = task(TRAINED, news=AdapterConfig(kind=kind, target=TOWERS))
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    trainer(tmp_path, StageProof(), steps=3).fit(one, datamodule=data())
    after = one.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    adapters = {key for key in before if adapter_of(key) == "news"}
    assert {key for key in moved if key.startswith("backbone.")} == adapters
    assert any(key.startswith("bridge.") for key in moved) and any(key.startswith("heads.") for key in moved)


def test_patterns_call_things_by_their_plain_names() -> None:
    model = vit_model()
    model.add_adapter("news", AdapterConfig(target=("*.qkv",)))
    weight = "backbone.vision.blocks.0.attn.qkv.weight"
    factors = stages.rates(model, {"adapters.*": 1.0, weight: 0.5})
    trained = {name: factor for name, factor in factors.items() if factor}
    assert trained.pop("backbone.vision.blocks.0.attn.qkv.base_layer.weight") == 0.5
    assert set(trained) == {name for name, _ in model.named_parameters() if adapter_of(name)} and len(trained) == 4
    with pytest.raises(ValueError, match="'adapters.new' matches no parameter; did you mean 'adapters.news'"):
        stages.rates(model, {"adapters.new": 1.0})


def test_an_adapter_must_be_in_use_to_train() -> None:
    art = AdapterConfig(target=("*.qkv",), active=False)
    with pytest.raises(ValueError, match="trains adapters that are not in use: art; make them active"):
        task({"*": 1.0}, news=AdapterConfig(target=("*.qkv",)), art=art)
    one = task({"*": 1.0, "adapters.art": 0.0}, news=AdapterConfig(target=("*.qkv",)), art=art)
    assert one.model.active == ("news",) and stages.untouched_heads(one.model) == []


@pytest.mark.parametrize("kind", ["dora", "layer_norm"])
def test_a_stage_puts_adapters_on_the_weights_it_starts_from(kind: str, tmp_path: Path) -> None:
    """Both kinds begin as a copy of what they find, which must not be the random numbers before the checkpoint."""
    first = vit_model(seed=1)
    save_checkpoint(first, toy_processor(), tmp_path / "first")
    second = task(TRAINED, tmp_path / "first", news=AdapterConfig(kind=kind, target=TOWERS))
    second.model.eval()
    assert max(far(outputs(second.model), outputs(first))) < 1e-6
    save_checkpoint(shaken(second.model, "news"), toy_processor(), tmp_path / "second")
    third = task(TRAINED, tmp_path / "second", news=AdapterConfig(kind=kind, target=TOWERS))
    third.model.eval()
    assert far(outputs(third.model), outputs(second.model)) == [0, 0]
    unsaid = task({"bridge.*": 1.0}, tmp_path / "second")
    unsaid.model.eval()
    assert unsaid.model.active == ("news",) and far(outputs(unsaid.model), outputs(second.model)) == [0, 0]


def test_a_run_with_adapters_resumes_exactly(tmp_path: Path) -> None:
    def rows(*callbacks: Any, start: Path | None = None) -> list[Any]:
        seen = Batches("itc")
        one = task(TRAINED, news=AdapterConfig(target=TOWERS, dropout=0.1))
        trainer(tmp_path, seen, *callbacks, steps=4).fit(one, datamodule=data(), ckpt_path=start)
        return seen.rows

    kept = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    assert rows(kept)[2:] == rows(start=tmp_path / "step=2.ckpt")


# Files.


def test_a_checkpoint_carries_its_adapters(tmp_path: Path) -> None:
    model = vit_model()
    model.add_adapter("news", AdapterConfig(kind="dora", target=TOWERS))
    model.add_adapter("art", AdapterConfig(kind="prompt", target=TOWERS))
    shaken(shaken(model, "news"), "art")
    model.set_adapter("art")
    save_checkpoint(model, toy_processor(), tmp_path / "whole")
    again = load_checkpoint(tmp_path / "whole")[0]
    assert again.active == ("art",) and far(outputs(again), outputs(model)) == [0, 0]
    assert "| of these, adapter: news (dora) |" in (tmp_path / "whole/README.md").read_text()
    ready = unimodal.from_pretrained(tmp_path / "whole")
    assert ready.adapters == ("news", "art")
    as_saved = ready.encode("a red circle")
    assert (as_saved == ready.encode("a red circle", adapter="art")).all()
    assert abs(as_saved - ready.encode("a red circle", adapter="news")).max() > 1e-3
    assert (as_saved == ready.encode("a red circle")).all()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A model, and adapters of two kinds with bridges and heads of their own, each saved alone."""
    save_checkpoint(vit_model(), toy_processor(), tmp_path / "base")
    out = {"base": tmp_path / "base"}
    for seed, kind in enumerate(("lora", "prefix"), start=1):
        model = vit_model()
        model.add_adapter("tuned", AdapterConfig(kind=kind, target=TOWERS))
        shaken(model, "tuned", seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("bridge.", "heads.")):
                    parameter += 0.1 * torch.randn_like(parameter)
        save_checkpoint(model, toy_processor(), tmp_path / f"{kind}-whole")
        out[kind] = save_adapter(model, toy_processor(), tmp_path / kind)
    return out


ITEMS: list[Any] = [Image.new("RGB", (32, 32), "red"), "a red circle", "a small blue square."]


def test_adapters_of_one_backbone_are_chosen_at_call_time(folders: dict[str, Path]) -> None:
    ready = unimodal.from_pretrained(folders["base"])
    plain = ready.encode(ITEMS)
    assert [ready.load_adapter(folders[name], name=name) for name in ("lora", "prefix")] == ["lora", "prefix"]
    expected = {kind: unimodal.from_pretrained(f"{folders[kind]}-whole").encode(ITEMS) for kind in ("lora", "prefix")}
    for kind in ("lora", "prefix", "lora"):
        assert (ready.encode(ITEMS, adapter=kind) == expected[kind]).all()
        assert (ready.encode(ITEMS) == plain).all()
        with ready.using_adapter(kind):
            assert (ready.encode(ITEMS) == expected[kind]).all()
    ready.set_adapter("prefix")
    assert (ready.encode(ITEMS) == expected["prefix"]).all()
    assert ready.model.backbone.vision is ready.encoders[None].model.backbone.vision
    ready.set_adapter(None)
    assert (ready.encode(ITEMS) == plain).all()
    with pytest.raises(ValueError, match="no adapter named 'lroa'; did you mean 'lora'"):
        ready.encode(ITEMS, adapter="lroa")
    with pytest.raises(ValueError, match="there is an adapter 'lora' already; give another name"):
        ready.load_adapter(folders["prefix"], name="lora")


def test_an_index_belongs_to_the_adapter_it_was_made_with(folders: dict[str, Path]) -> None:
    ready = unimodal.from_pretrained(folders["base"])
    name = ready.load_adapter(folders["lora"])
    before = ready.encoder.fingerprint()
    with ready.using_adapter(name):
        index = ready.build_index([ITEMS[0], Image.new("RGB", (32, 32), "blue")])
        hits = ready.search("a red circle", index)
    assert ready.encoder.fingerprint() == before != index.encoder.fingerprint()
    assert index.search("a red circle") == hits  # it reads with its own adapter, whatever is chosen
    with pytest.raises(ValueError, match="was made by model .* their vectors cannot be compared"):
        ready.search("a red circle", index)


def test_adapter_folders_have_no_backbone_and_refuse_another(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["lora"] / "config.json").read_text())
    assert config["backbone"]["included"] is False and len(config["backbone"]["fingerprint"]) == 16
    sizes = {name: (folders[name] / "model.safetensors").stat().st_size for name in ("base", "lora")}
    assert sizes["lora"] < sizes["base"]
    save_checkpoint(vit_model(seed=1), toy_processor(), tmp_path / "other")
    other = unimodal.from_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match="lora belongs to a backbone with fingerprint .*this one .* would compute nonsense"
    ):
        other.load_adapter(folders["lora"])
    half = unimodal.from_pretrained(folders["base"], dtype=torch.bfloat16)
    with pytest.raises(
        CheckpointError, match="open it in float32, not torch.bfloat16, and convert the whole afterwards"
    ):
        half.load_adapter(folders["lora"])
    late = unimodal.from_pretrained(folders["base"])
    late.load_adapter(folders["lora"], name="lora")
    expected = late.encode(ITEMS, adapter="lora")
    assert {p.dtype for p in late.to(dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}
    assert abs(late.encode(ITEMS, adapter="lora") - expected).max() < 0.02
    base = unimodal.from_pretrained(folders["base"])
    with pytest.raises(CheckpointError, match="base holds a whole model, not adapters beside a backbone"):
        base.load_adapter(folders["base"])
    with pytest.raises(
        CheckpointError, match="lora belongs to a backbone .* Open the model that they were trained on and load_adapter"
    ):
        unimodal.from_pretrained(folders["lora"])


def test_a_damaged_folder_leaves_nothing_behind(folders: dict[str, Path]) -> None:
    base = unimodal.from_pretrained(folders["base"])
    config = json.loads((folders["lora"] / "config.json").read_text())
    config["model"]["adapters"]["tuned"]["r"] = 4
    (folders["lora"] / "config.json").write_text(json.dumps(config))
    plain = base.encode(ITEMS)
    with pytest.raises(CheckpointError, match="lora_A.tuned.weight: file"):
        base.load_adapter(folders["lora"])
    assert base.adapters == () and (base.encode(ITEMS) == plain).all()
    assert base.load_adapter(folders["prefix"]) == "tuned"


def test_a_loaded_adapter_merges(folders: dict[str, Path]) -> None:
    ready = unimodal.from_pretrained(folders["base"])
    ready.set_adapter(ready.load_adapter(folders["lora"]))
    expected = ready.encode(ITEMS)
    ready.merge_adapters()
    assert abs(ready.encode(ITEMS) - expected).max() < 1e-5 and ready.adapters == ()
    assert not any(adapter_of(name) or "base_layer" in name for name in ready.model.state_dict())


def test_a_schedule_leaves_its_adapter_beside_the_whole(tmp_path: Path) -> None:
    """A first stage without, a second with: the adapter folder of the second on the model of the first is the whole of the second."""

    def reader(split: str) -> dict[str, Any]:
        return {"class_path": "unimodal.data.Scenes", "init_args": {"split": split, "count": 8}}

    shared = {"config": to_dict(vit_config()), "objectives": {"itc": {"class_path": "unimodal.tasks.ITC"}}}
    shared |= {"evaluation": {"rerank_k": 0, "captions": 0, "pictures": 0}, "pretrained": False}
    adapter = {"kind": "lora", "target": ["backbone.vision.*.qkv"], "r": 4, "dropout": 0.1}
    second = {"config": {"adapters": {"news": adapter}}, "trainable": TRAINED}
    schedule = {
        "output": str(tmp_path / "out"),
        "model": {"class_path": "unimodal.tasks.Joint", "init_args": shared},
        "data": {**{split: reader(split) for split in ("train", "val", "test")}, "batch_size": 4},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": 2, "limit_val_batches": 0},
        "stages": {"whole": {}, "adapt": {"model": {"init_args": second}}, "fold": {"merge": {"adapt": 1.0}}},
    }
    schedule["trainer"]["enable_progress_bar"] = False
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump(schedule, sort_keys=False))
    assert cli.main(["fit", "--config", str(tmp_path / "schedule.yaml")]) == 0
    beside = unimodal.from_pretrained(tmp_path / "out/whole/model")
    beside.set_adapter(beside.load_adapter(tmp_path / "out/adapt/adapter"))
    whole, folded = (unimodal.from_pretrained(tmp_path / "out" / name) for name in ("adapt/model", "model"))
    assert (beside.encode(ITEMS) == whole.encode(ITEMS)).all()
    assert whole.adapters == ("news",) and folded.adapters == ()
    assert abs(folded.encode(ITEMS) - whole.encode(ITEMS)).max() < 1e-5
    assert not (tmp_path / "out/whole/adapter").exists() and not (tmp_path / "out/adapter").exists()
