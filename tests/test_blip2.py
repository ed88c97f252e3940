"""BLIP-2 for retrieval, opened from a folder as its authors publish it: every number against transformers' own forward pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import unimodal
from tests.blip2 import QUERIES, SIDE, TEXTS, pictures, save_captioner, save_retrieval
from tests.toy import toy_config
from unimodal import stages
from unimodal.backbones import Blip2Backbone
from unimodal.config import BackboneConfig, ModelConfig, PublishedConfig
from unimodal.data import Scenes
from unimodal.hub import CheckpointError, load_checkpoint, verify_checkpoint
from unimodal.model import UnimodalModel

EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """transformers' model, its processor, and the folder of both."""
    folder = tmp_path_factory.mktemp("blip2") / "itm"
    return *save_retrieval(folder), folder


@pytest.fixture(scope="module")
def model(published: tuple[Any, Any, Path]) -> Any:
    return unimodal.from_pretrained(published[2])


@pytest.fixture
def copy(published: tuple[Any, Any, Path], tmp_path: Path) -> Path:
    """A folder to spoil."""
    return Path(shutil.copytree(published[2], tmp_path / "blip2"))


@torch.no_grad()
def reference(published: tuple[Any, Any, Path], *, itm: bool) -> Any:
    inputs = published[1](images=pictures(), text=TEXTS, padding=True, return_tensors="pt")
    return published[0](**inputs, use_image_text_matching_head=itm)


# Against transformers.


def test_pictures_and_tokens_are_the_authors(published: tuple[Any, Any, Path], model: Any) -> None:
    expected = published[1](images=pictures(), text=TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(model.processor.images(pictures()), expected["pixel_values"])
    one_by_one = model.processor.pixels([model.processor.image_array(picture) for picture in pictures()])
    torch.testing.assert_close(one_by_one, expected["pixel_values"], **EXACT)
    ids, mask = model.processor.texts(TEXTS)
    assert torch.equal(ids, expected["input_ids"][:, QUERIES:])  # the queries' places are transformers' own
    assert torch.equal(mask, expected["attention_mask"][:, QUERIES:].bool()) and mask.dtype == torch.bool


def test_image_tokens_are_the_authors(published: tuple[Any, Any, Path], model: Any) -> None:
    pixels = model.processor.images(pictures())
    with torch.no_grad():
        features = model.model.backbone.image_features(pixels)
        expected = published[0].vision_model(pixels).last_hidden_state
    assert isinstance(features, torch.Tensor)  # an object with a tensor inside is what transformers returns
    torch.testing.assert_close(model.model.backbone.image_tokens(features).hidden, expected, **EXACT)


def test_embeddings_and_their_scores_are_the_authors(published: tuple[Any, Any, Path], model: Any) -> None:
    out = reference(published, itm=False)
    images, texts = model.encode(pictures()), model.encode(TEXTS)
    assert images.shape == (3, QUERIES, 16) and texts.shape == (3, 16)
    np.testing.assert_allclose(images, out.image_embeds, **EXACT)
    np.testing.assert_allclose(texts, out.text_embeds, **EXACT)
    scores = model.similarity(images, texts)
    torch.testing.assert_close(scores, out.logits_per_image, **EXACT)
    # The best query counts, not their mean.
    assert (scores - torch.einsum("bne,te->bt", torch.tensor(images), torch.tensor(texts)) / QUERIES).abs().max() > 0.05


def test_match_scores_are_the_authors(published: tuple[Any, Any, Path], model: Any) -> None:
    out = reference(published, itm=True)
    pairs = list(zip(pictures(), TEXTS))
    scores = model.predict(pairs)
    np.testing.assert_allclose(scores, out.logits_per_image.softmax(-1)[:, 1], **EXACT)
    logits = model.predict(pairs, activation_fn=lambda x: x)
    np.testing.assert_allclose(logits, out.logits_per_image[:, 1] - out.logits_per_image[:, 0], **EXACT)


def test_the_mean_over_queries_is_matched_not_the_best(model: Any) -> None:
    found = torch.randn(4, QUERIES, 32)
    head = model.model.head("matching")
    with torch.no_grad():
        by_query = head.score(found)[..., 1] - head.score(found)[..., 0]  # [P, N]
        torch.testing.assert_close(head(found), by_query.mean(1), **EXACT)
        assert (head(found) - by_query.amax(1)).abs().min() > 0.01


def test_padding_changes_nothing(model: Any) -> None:
    alone = np.stack([model.encode(text) for text in TEXTS])
    np.testing.assert_allclose(alone, model.encode(TEXTS), **EXACT)


def test_ranking_and_search(published: tuple[Any, Any, Path], model: Any) -> None:
    images, query = pictures(), TEXTS[0]
    cosines = model.similarity(model.encode(images), model.encode(query))[:, 0]
    matches = model.predict([(image, query) for image in images])
    ranked = model.rank(query, images)
    assert [hit["corpus_id"] for hit in ranked] == np.argsort(-matches).tolist()
    index = model.build_index(images, precision="float32")
    hits = index.search(query, top_k=3, rerank_top_k=0)
    assert [hit["id"] for hit in hits] == cosines.argsort(descending=True).tolist()
    np.testing.assert_allclose([hit["score"] for hit in hits], cosines.sort(descending=True).values, **EXACT)
    reranked = index.search(query, top_k=3, rerank_top_k=3)
    assert [hit["id"] for hit in reranked] == np.argsort(-matches).tolist()


def test_it_explains_a_match(model: Any) -> None:
    # transformers gives no attentions under its default kernels; ours come from gradients.
    found = model.explain(pictures()[0], TEXTS[0])
    assert found.heatmap.shape == (SIDE // 8, SIDE // 8) and np.abs(found.heatmap).max() > 0
    assert abs(found.gap) < 0.05 * abs(found.logit - found.blank_logit) + 1e-3


# What it says of itself.


def test_it_says_what_it_can_do(published: tuple[Any, Any, Path], model: Any) -> None:
    assert model.heads == ("embedding", "matching") and model.missing_heads == ("captioning", "generation")
    assert model.modalities == ("image", "text") and model.model.backbone.modalities == ("image",)
    with pytest.raises(ValueError, match="no captioning head; it has: embedding, matching"):
        model.caption(pictures()[0])
    with pytest.raises(CheckpointError, match="has no head captioning; it has: embedding, matching"):
        unimodal.from_pretrained(published[2], heads=["captioning"])
    assert model.model.sources["published"]["source"] == str(published[2])


def test_no_parameter_is_left_as_it_was_allocated(published: tuple[Any, Any, Path], model: Any) -> None:
    everything = [*model.model.named_parameters(), *model.model.named_buffers()]
    assert everything and not [name for name, tensor in everything if tensor.is_meta or not tensor.isfinite().all()]
    assert max(tensor.abs().max() for _, tensor in everything if tensor.is_floating_point()) < 100
    theirs = published[0].state_dict()
    for name, weight in model.model.bridge.to_blip2().items():
        assert torch.equal(weight, theirs[name]), name  # there and back again


def test_shards_of_half_precision(published: tuple[Any, Any, Path], tmp_path: Path) -> None:
    """As the large ones are released."""
    shutil.copytree(published[2], tmp_path / "half", ignore=shutil.ignore_patterns("model*"))
    half = type(published[0]).from_pretrained(published[2], dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", max_shard_size="50KB")
    assert len([*(tmp_path / "half").glob("*.safetensors")]) > 2
    model = unimodal.from_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in model.model.parameters()} == {torch.float32}
    expected = half.float()
    with torch.no_grad():
        out = expected(**published[1](images=pictures(), text=TEXTS, padding=True, return_tensors="pt"))
    torch.testing.assert_close(
        model.similarity(model.encode(pictures()), model.encode(TEXTS)), out.logits_per_image, **EXACT
    )


# Our own folders, training.


def test_it_is_saved_and_loaded_as_a_checkpoint(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    again = unimodal.from_pretrained(tmp_path / "ours")
    assert again.model.config.backbone.published.name == "blip-2"
    assert all(torch.equal(again.model.state_dict()[name], weight) for name, weight in model.model.state_dict().items())
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    assert set(verify_checkpoint(tmp_path / "ours").values()) == {0.0}


def test_bridge_and_heads_travel_without_the_tower(
    model: Any, published: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    stored = load_file(tmp_path / "heads/model.safetensors")
    assert "bridge.query_sets.image" in stored and not [name for name in stored if name.startswith("backbone.")]
    again, _ = load_checkpoint(tmp_path / "heads", backbone_sources={"published": str(published[2])})
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.model.state_dict().items())


def test_a_stage_trains_the_text_branch_alone(published: tuple[Any, Any, Path]) -> None:
    network = unimodal.from_pretrained(published[2]).model
    stages.freeze(network, stages.rates(network, {"bridge.token_embedding.*": 1.0}))
    assert stages.untouched_heads(network) == []
    stages.freeze(network, stages.rates(network, {"heads.matching.*": 1.0}))
    assert stages.untouched_heads(network) == ["embedding"]
    assert stages.probe(network, ["embedding", "matching"])["embedding.image"].shape == (2, QUERIES, 16)


def test_a_stage_trains_on_it(published: tuple[Any, Any, Path], tmp_path: Path) -> None:
    import pytorch_lightning as pl

    from unimodal.data.module import PairData
    from unimodal.tasks import ITC, ITM, Task

    saved = tmp_path / "start"
    model = unimodal.from_pretrained(published[2])
    model.save_pretrained(saved)
    config = model.model.config
    task = Task(
        config,
        {"itc": ITC(), "itm": ITM()},
        trainable={"*": 1.0, "backbone.*": 0.0, "backbone.model.vision_model.post_layernorm.*": 1.0},
        init_from=str(saved),
    )
    data = PairData(train=Scenes("train", count=8), val=Scenes("val", count=4), batch_size=4)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in task.model.named_parameters()}
    trainer.fit(task, data)
    moved = {name for name, weight in task.model.named_parameters() if not torch.equal(weight, before[name])}
    assert {"bridge.query_sets.image", "heads.text_embedding.bridge_projection.weight"} <= moved
    assert {name for name in moved if name.startswith("backbone.")} == {
        f"backbone.model.vision_model.post_layernorm.{part}" for part in ("weight", "bias")
    }


# Bad input.


def drop(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(folder)


def set_config(*path: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        place = settings
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(settings))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop("vision_model.post_layernorm.bias"), r"does not hold all weights of Blip2Vision.*post_layernorm.bias.*get it again"),
        (drop("query_tokens"), "BLIP-2 weights do not fit this bridge: missing .'query_tokens'"),
        (drop("qformer.encoder.layer.2.crossattention.attention.key.weight"), "missing .*layer.2.crossattention"),
        (drop("embeddings.word_embeddings.weight"), "missing .'embeddings.word_embeddings.weight'"),
        (drop("itm_head.bias"), r"itm_head.bias: expected the shape \[2\], the weights have nothing"),
        (set_config("image_text_hidden_size", value=8), r"vision_projection.weight: expected the shape \[8, 32\].*\[16, 32\]"),
        (set_config("architectures", value=["Blip2Model"]), "names the architecture Blip2Model; .*ForImageTextRetrieval"),
        (set_config("architectures", value=None), r"names the architecture \(none\)"),
        (set_config("qformer_config", "hidden_act", value="relu"), "hidden_act 'relu'.*expected 'gelu'"),
        (set_config("qformer_config", "vocab_size", value=9), "token_embedding.weight: the weights have the shape"),
        (more_tokens, "the tokenizer .* has 24 tokens, the model's vocabulary 22: they do not belong together"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"123456789"), "incomplete or damaged|corrupt or cut short"),
        (lambda folder: (folder / "processor_config.json").unlink(), "blip2: .*preprocessor"),
    ],
)  # fmt: skip
def test_spoilt_folders_are_refused_in_words(copy: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(copy)
    with pytest.raises(CheckpointError, match=words):
        unimodal.from_pretrained(copy)


def test_another_type_and_another_revision(published: tuple[Any, Any, Path]) -> None:
    wrong = PublishedConfig(name="clip", source=str(published[2]))
    with pytest.raises(ValueError, match="is a model of type 'blip-2', expected 'clip'"):
        UnimodalModel(
            ModelConfig(backbone=BackboneConfig(width=None, published=wrong), bridge=None, embedding=None),
            pretrained=True,
        )
    absent = PublishedConfig(name="blip-2", source="nobody/nothing", revision="v9")
    with pytest.raises(FileNotFoundError, match="nobody/nothing at revision 'v9'"):
        Blip2Backbone(absent, width=None, pretrained=True)


def test_its_tokens_are_not_projected(published: tuple[Any, Any, Path]) -> None:
    config = PublishedConfig(name="blip-2", source=str(published[2]))
    assert Blip2Backbone(config, width=32).width == 32
    with pytest.raises(ValueError, match="the tokens of this blip-2 are 32 wide.*got 384; set backbone.width to null"):
        Blip2Backbone(config, width=384)


@pytest.mark.parametrize(
    "head",
    [
        {"embedding": {"gate": False}},
        {"embedding": {"gate": True, "text": "words"}},
        {"matching": {"kind": "cached"}},
        {"generation": {}},
    ],
)
def test_heads_that_read_text_tokens_are_refused(published: tuple[Any, Any, Path], head: dict[str, Any]) -> None:
    parts = {"embedding": None, "matching": None, "captioning": None, "generation": None} | head
    backbone = {"width": None, "published": {"name": "blip-2", "source": str(published[2])}}
    with pytest.raises(
        ValueError, match="reads text tokens of the backbone, and blip-2 of .* has none: let the bridge"
    ):
        UnimodalModel(toy_config(backbone=backbone, **parts))


def test_a_text_that_spells_the_pictures_token(model: Any) -> None:
    with pytest.raises(ValueError, match="spells <image>, a token that stands for the picture; leave it out"):
        model.encode("a red <image>")


def test_the_captioner_has_no_text_branch(tmp_path: Path) -> None:
    save_captioner(tmp_path)
    set_config("architectures", value=["Blip2ForImageTextRetrieval"])(tmp_path)
    with pytest.raises(CheckpointError, match="BLIP-2 weights do not fit this bridge: missing"):
        unimodal.from_pretrained(tmp_path)
