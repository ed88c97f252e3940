"""Published image-text pairs run as their authors released them: every number against transformers' own forward pass."""

import json
import string
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import unimodal
from tests.toy import toy_config
from unimodal.backbones import PretrainedPair
from unimodal.config import AdapterConfig, BackboneConfig, ModelConfig, PublishedConfig, from_dict
from unimodal.data import Scenes
from unimodal.data.processor import TruncationWarning
from unimodal.hub import CheckpointError, verify_checkpoint
from unimodal.layers import QuickGELU
from unimodal.model import UnimodalModel

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["a dog", "A Cat sits, here.", "x"]
LENGTH = 24


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(50, 70), (40, 40), (90, 31)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def clip() -> tuple[Any, Any]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = T.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=LENGTH)
    end = len(words) - 1
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": LENGTH,
        "eos_token_id": end,
        "bos_token_id": end - 1,
        **TINY,
    }
    vision = {"image_size": 32, "patch_size": 8, **TINY}
    config = T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    images = T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return T.CLIPModel(config), T.CLIPProcessor(images, tokenizer)


def old_clip() -> tuple[Any, Any]:
    """As OpenAI's first configurations, which name a wrong end-of-text id: it is found as the largest id."""
    model, processor = clip()
    model.config.text_config.eos_token_id = model.text_model.eos_token_id = 2
    return model, processor


def gemma_words() -> dict[str, int]:
    signs = "▁" + string.ascii_letters + string.punctuation + string.digits
    return {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *signs])}


def siglip() -> tuple[Any, Any]:
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase, ".", ","])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="</s>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )
    text = {"vocab_size": len(words), "max_position_embeddings": LENGTH, **TINY}
    config = T.SiglipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **TINY})
    images = T.SiglipImageProcessor(size={"height": 32, "width": 32})
    return T.SiglipModel(config), T.SiglipProcessor(images, tokenizer)


def siglip2_fixed() -> tuple[Any, Any]:
    """SigLIP 2 of fixed resolution is published as a `siglip` model with Gemma's tokenizer."""
    model, processor = siglip()
    words = gemma_words()
    model.config.text_config.vocab_size = len(words)
    model = T.SiglipModel(model.config)
    processor.tokenizer = T.GemmaTokenizer(vocab=words, merges=[], padding_side="right", model_max_length=LENGTH)
    return model, processor


def naflex() -> tuple[Any, Any]:
    words = gemma_words()
    tokenizer = T.Siglip2Tokenizer(vocab=words, merges=[], padding_side="right", model_max_length=LENGTH)
    text = {"vocab_size": len(words), "max_position_embeddings": LENGTH, **TINY}
    config = T.Siglip2Config(text_config=text, vision_config={"num_patches": 16, "patch_size": 8, **TINY})
    images = T.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    return T.Siglip2Model(config), T.Siglip2Processor(images, tokenizer)


PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "clip": clip,
    "old_clip": old_clip,
    "siglip": siglip,
    "siglip2_fixed": siglip2_fixed,
    "naflex": naflex,
}


def saved(name: str, folder: Path) -> tuple[Any, Any]:
    """A published pair with random weights, written by transformers itself."""
    torch.manual_seed(0)
    model, processor = PAIRS[name]()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(params=list(PAIRS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Any, Path]:
    model, processor = saved(request.param, tmp_path / "published")
    return request.param, model, processor, tmp_path / "published"


def reference_texts(name: str, processor: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Texts as each model's documentation has them: CLIP pads to the longest, SigLIP to its full length, without a mask."""
    if name.endswith("clip"):
        return dict(processor.tokenizer(texts, padding=True, return_tensors="pt"))
    texts = [text.lower() for text in texts]
    padded = processor.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return {"input_ids": padded["input_ids"]}


# Parity.


@torch.no_grad()
def test_embeddings_and_preprocessing_are_the_authors(pair: tuple[str, Any, Any, Path]) -> None:
    name, reference, processor, folder = pair
    model = unimodal.from_pretrained(folder)
    images, texts = (
        dict(processor.image_processor(pictures(), return_tensors="pt")),
        reference_texts(name, processor, TEXTS),
    )
    ids, _ = model.processor.texts(TEXTS)
    assert torch.equal(ids, texts["input_ids"])
    pixels = model.processor.images(pictures())
    for key, part in images.items():
        assert torch.equal(part, pixels if isinstance(pixels, torch.Tensor) else pixels[key]), key
    expected = reference(**images, **texts)
    np.testing.assert_allclose(model.encode(pictures()), expected.image_embeds, atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS), expected.text_embeds, atol=1e-5)
    logits = model.model.scale * model.similarity(model.encode(pictures()), model.encode(TEXTS))
    if name != "clip" and name != "old_clip":
        logits = logits + model.model.bias
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_it_is_what_transformers_loads_in_bfloat16(pair: tuple[str, Any, Any, Path]) -> None:
    name, reference, processor, folder = pair
    half = type(reference).from_pretrained(folder, dtype=torch.bfloat16).eval()
    model = unimodal.from_pretrained(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}
    inputs = dict(processor.image_processor(pictures(), return_tensors="pt"))
    inputs |= {"pixel_values": inputs["pixel_values"].bfloat16()}
    out = half(**inputs, **reference_texts(name, processor, TEXTS))
    # CLIP's last layer is read for one token alone, the same sums in another order: two roundings of 8 bits.
    np.testing.assert_allclose(model.encode(pictures()), out.image_embeds.float(), atol=2**-7)
    np.testing.assert_allclose(model.encode(TEXTS), out.text_embeds.float(), atol=2**-7)


def test_pictures_prepared_one_by_one_are_the_same(pair: tuple[str, Any, Any, Path]) -> None:
    processor = unimodal.from_pretrained(pair[3]).processor
    whole, parts = processor.images(pictures()), processor.pixels([processor.image_array(p) for p in pictures()])
    for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x.values() for x in (whole, parts))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_siglips_pool_leaves_out_what_a_mask_hides(tmp_path: Path) -> None:
    """As if the hidden places were not there; a mask that hides nothing changes nothing."""
    saved("siglip", tmp_path)
    backbone = unimodal.from_pretrained(tmp_path).model.backbone
    features = torch.randn(2, 16, backbone.width)
    mask = torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        whole = backbone.image_embedding(features, None)
        torch.testing.assert_close(backbone.image_embedding(features, mask), whole)
        mask[:, 10:] = False
        torch.testing.assert_close(
            backbone.image_embedding(features, mask), backbone.image_embedding(features[:, :10], None)
        )


def test_siglip_2_reads_lower_case(tmp_path: Path) -> None:
    saved("siglip2_fixed", tmp_path)
    model = unimodal.from_pretrained(tmp_path)
    tokenizer = model.processor.tokenizer
    assert tokenizer("A Cat")["input_ids"] != tokenizer("a cat")["input_ids"]  # the published tokenizer does not do it
    np.testing.assert_array_equal(model.encode("A Cat"), model.encode("a cat"))


@torch.no_grad()
def test_siglip_reads_its_padding_and_pools_the_last_position(tmp_path: Path) -> None:
    reference, processor = saved("siglip", tmp_path)
    model = unimodal.from_pretrained(tmp_path)
    ids, _ = model.processor.texts(["a dog"])
    assert ids.shape == (1, LENGTH)
    short = reference.text_model(input_ids=ids[:, :5]).pooler_output  # padded to the longest instead
    assert not np.allclose(model.encode("a dog"), torch.nn.functional.normalize(short, dim=-1)[0], atol=1e-3)


def test_the_sentencepiece_tokenizer_of_siglip(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("a dog runs\nthe cat sits here\n" * 20)
    options = {"vocab_size": 40, "hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), minloglevel=2, **options
    )
    folder = tmp_path / "published"
    saved("siglip", folder)
    tokenizer = T.SiglipTokenizer(vocab_file=str(tmp_path / "spiece.model"), model_max_length=LENGTH)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(tokenizer)
    T.SiglipModel(T.SiglipConfig(**config)).save_pretrained(folder)
    for stale in folder.glob("tokenizer*"):
        stale.unlink()
    tokenizer.save_pretrained(folder)
    ids, _ = unimodal.from_pretrained(folder).processor.texts(TEXTS)
    expected = tokenizer(TEXTS, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, expected)


def test_long_texts_are_cut_as_the_authors_do_and_it_is_said(pair: tuple[str, Any, Any, Path]) -> None:
    name, _, processor, folder = pair
    text = "a dog and a cat and a dog and a cat"
    with pytest.warns(TruncationWarning, match=f"1 of 1 texts are longer than {LENGTH} tokens"):
        ids, _ = unimodal.from_pretrained(folder).processor.texts([text])
    cut = processor.tokenizer(text.lower(), truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, cut)


# What it can do, and what it lacks.


def test_it_says_what_it_can_do(pair: tuple[str, Any, Any, Path]) -> None:
    model = unimodal.from_pretrained(pair[3])
    assert model.heads == ("embedding",) and model.missing_heads == ("matching", "captioning", "generation")
    assert "can encode; has no head for matching, captioning, generation" in repr(model)
    with pytest.raises(ValueError, match="no matching head; it has: embedding"):
        model.rank("a dog", pictures())
    with pytest.raises(CheckpointError, match="has no head captioning; it has: embedding"):
        unimodal.from_pretrained(pair[3], heads=["captioning"])


def test_the_backbone_declares_itself(pair: tuple[str, Any, Any, Path]) -> None:
    backbone = unimodal.from_pretrained(pair[3]).model.backbone
    source = backbone.sources["published"]
    assert backbone.modalities == ("image", "text") and backbone.width == 32
    assert source["source"] == str(pair[3]) and source["revision"] is None and len(source["sha256"]) == 64


def test_an_index_searches_with_it(pair: tuple[str, Any, Any, Path]) -> None:
    model = unimodal.from_pretrained(pair[3])
    index = model.build_index(pictures())
    order = model.similarity(model.encode("a dog"), model.encode(pictures()))[0].argsort(descending=True)
    assert [hit["id"] for hit in index.search("a dog", top_k=3)] == order.tolist()


def test_it_is_saved_and_loaded_as_a_checkpoint(pair: tuple[str, Any, Any, Path], tmp_path: Path) -> None:
    model = unimodal.from_pretrained(pair[3])
    model.save_pretrained(tmp_path / "whole")
    again = unimodal.from_pretrained(tmp_path / "whole")
    np.testing.assert_array_equal(again.encode(pictures()), model.encode(pictures()))
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    assert again.encoder.fingerprint() == model.encoder.fingerprint()
    assert max(verify_checkpoint(tmp_path / "whole").values()) == 0


def test_heads_travel_without_the_backbone(tmp_path: Path) -> None:
    saved("clip", tmp_path / "published")
    model = unimodal.from_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    assert not [name for name in load_file(tmp_path / "heads/model.safetensors") if name.startswith("backbone.model.")]
    from unimodal.hub import load_checkpoint

    with pytest.raises(CheckpointError, match="holds no published tower; it was the local 'published'"):
        load_checkpoint(tmp_path / "heads")
    again, _ = load_checkpoint(tmp_path / "heads", backbone_sources={"published": str(tmp_path / "published")})
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name
    other = tmp_path / "other"
    torch.manual_seed(1)
    reference, processor = clip()
    reference.save_pretrained(other)
    processor.save_pretrained(other)
    with pytest.raises(CheckpointError, match="was trained on the published tower.*with sha256"):
        load_checkpoint(tmp_path / "heads", backbone_sources={"published": str(other)})


# A bridge on top.


def bridged(folder: Path, name: str, **overrides: Any) -> ModelConfig:
    config = toy_config(generation=None, **overrides)
    kind = {"clip": "clip", "naflex": "siglip2"}.get(name, "siglip")
    published = BackboneConfig(width=32, published=PublishedConfig(name=kind, source=str(folder)))  # type: ignore[arg-type]
    return from_dict(
        ModelConfig, {**{f: getattr(config, f) for f in config.__dataclass_fields__}, "backbone": published}
    )


@pytest.mark.parametrize("name", ["clip", "siglip", "naflex"])
def test_bridge_and_heads_train_on_it_and_it_stays(name: str, tmp_path: Path) -> None:
    from unimodal import stages

    saved(name, tmp_path)
    model = UnimodalModel(bridged(tmp_path, name), pretrained=True)
    factors = stages.rates(model, {"*": 1.0, "backbone.model.*": 0.0})
    stages.freeze(model, factors)
    before = stages.fingerprints(model)
    assert {key for key, _ in model.backbone.model.named_parameters(prefix="backbone.model")} <= before.keys()
    processor = unimodal.from_pretrained(tmp_path).processor
    image = model.encode_image(processor.images(pictures()))
    text = model.encode_text(*processor.texts(TEXTS))
    rows = torch.arange(3)
    loss = (model.image_embedding(image) @ model.text_embedding(text).T).exp().sum()
    loss = loss + model.match(image, text, rows, rows).sum() + model.caption_logits(image, text.ids).logsumexp(-1).sum()
    loss.backward()
    for key, parameter in model.named_parameters():
        if factors[key] and not key.startswith(("bridge.lm", "bridge.query_sets.generate", "log_scale")):
            if "bridge" in key and ("embedding" in key or "text_mlp" in key):
                continue  # the bridge's own text branch, which these heads do not use
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert stages.moved(before, stages.fingerprints(model)) == []


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_an_adapter_in_the_last_layer_counts(kind: str, tmp_path: Path) -> None:
    saved("clip", tmp_path)
    model = unimodal.from_pretrained(tmp_path)
    before = model.encode(TEXTS)
    place = "backbone.model.text_model.encoder.layers.1" + ("" if kind == "prompt" else ".self_attn")
    target = (place + ".q_proj",) if kind == "lora" else (place,)
    model.model.add_adapter("tuned", AdapterConfig(kind=kind, target=target))
    for name, parameter in model.model.named_parameters():
        if ".tuned" in name:
            parameter.data.normal_()
    expected = model.model.text_embedding(model.encoder.texts(TEXTS))
    assert abs(before - model.encode(TEXTS)).max() > 1e-3
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-6)
    model.model.set_adapter(None)
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-6)


def test_texts_just_as_long_as_read_are_not_called_cut(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    model = unimodal.from_pretrained(tmp_path)
    fits = "a" * (LENGTH - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TruncationWarning)
        assert model.processor.texts([fits, "b"])[1].sum(1).tolist() == [LENGTH, 3]
    with pytest.warns(TruncationWarning, match=f"1 of 3 texts are longer than {LENGTH} tokens"):
        model.processor.texts([fits, fits + "a", "b"])


@torch.no_grad()
def test_clips_activation_is_transformers() -> None:
    x = torch.linspace(-8, 8, 101)
    kept = x.clone()
    assert torch.allclose(QuickGELU()(x), T.activations.QuickGELUActivation()(x), atol=1e-6)
    assert torch.equal(x, kept)
    with torch.enable_grad():
        assert torch.autograd.gradcheck(QuickGELU(), x[::10].double().requires_grad_())


def test_its_own_embedding_beside_a_trained_matching_head(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    plain = unimodal.from_pretrained(tmp_path)
    config = bridged(tmp_path, "clip", embedding={"kind": "backbone", "dim": 16, "gate": False}, captioning=None)
    model = unimodal.Unimodal(UnimodalModel(config, pretrained=True), plain.processor)
    # Alone, the last layer is read for the pooled token only: the same sums in another order.
    np.testing.assert_allclose(model.encode(pictures()), plain.encode(pictures()), atol=1e-6)
    assert model.heads == ("embedding", "matching")
    assert model.model.scale == plain.model.scale  # CLIP's, not the configuration's
    assert len(model.rank("a dog", pictures())) == 3


def test_a_stage_trains_on_it_through_the_recipe(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    from unimodal.data.module import PairData
    from unimodal.tasks import ITC, ITG, ITM, Task

    saved("siglip2_fixed", tmp_path / "published")
    task = Task(
        bridged(tmp_path / "published", "siglip"),
        {"itc": ITC(), "itm": ITM(), "itg": ITG()},
        trainable={"*": 1.0, "backbone.model.*": 0.0},
    )
    data = PairData(train=Scenes("train", count=8), val=Scenes("val", count=4), batch_size=4)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    trainer.fit(task, data)
    moved = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not [name for name in moved if name.startswith("backbone.model.")]


# Bad input.


def test_a_model_of_another_type_is_named(tmp_path: Path) -> None:
    saved("siglip", tmp_path)
    with pytest.raises(ValueError, match="is a model of type 'siglip', expected 'clip'; set published.name"):
        PretrainedPair(PublishedConfig(name="clip", source=str(tmp_path)), width=None, pretrained=True)


def test_missing_weights_are_refused_not_invented(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match="does not hold all weights of CLIPModel.*visual_projection.weight.*get it again"
    ):
        unimodal.from_pretrained(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="holds no safetensors weights; give a revision or a repository that has them"
    ):
        unimodal.from_pretrained(tmp_path)


def test_weights_cut_short(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="corrupt or cut short.*get the file again"):
        unimodal.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    saved("siglip", tmp_path)
    other = tmp_path / "other"
    saved("clip", other)
    for path in other.glob("tokenizer*"):
        path.replace(tmp_path / path.name)
    with pytest.raises(CheckpointError, match="tokenizer in .* has 514 tokens, the model's vocabulary 31"):
        unimodal.from_pretrained(tmp_path)


def test_no_preprocessor(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    for path in tmp_path.glob("*processor*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="processor"):
        unimodal.from_pretrained(tmp_path)


def test_without_a_network_it_says_so() -> None:
    with pytest.raises(FileNotFoundError, match="nobody/nothing at revision 'v9'.*without a network, fetch it once"):
        PretrainedPair(
            PublishedConfig(name="clip", source="nobody/nothing", revision="v9"), width=None, pretrained=True
        )


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}, {"revision": "v9"}], ids=str)
def test_from_the_cache_or_not_at_all(options: dict[str, Any], tmp_path: Path) -> None:
    """The tests run without a network; a folder of the cache that another call left is enough."""
    name = f"nobody/nothing{f' at revision {chr(39)}v9{chr(39)}' if 'revision' in options else ''}"
    with pytest.raises(
        FileNotFoundError, match=f"^{name}: no such folder here, and not from the Hub.*fetch it once where there is one"
    ):
        unimodal.from_pretrained("nobody/nothing", cache_folder=tmp_path, **options)
    commit = 40 * "a"
    kept = tmp_path / "models--nobody--nothing"
    saved("clip", kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / options.get("revision", "main")).write_text(commit)
    model = unimodal.from_pretrained("nobody/nothing", cache_folder=tmp_path, **options)
    source = model.model.sources["published"]
    assert (source["source"], source["revision"]) == ("nobody/nothing", commit)


def test_its_own_embedding_has_its_own_width(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    config = bridged(tmp_path, "clip", embedding={"kind": "backbone", "dim": 8})
    with pytest.raises(ValueError, match="dim is 8, but the backbone's own embedding has 16 dimensions"):
        UnimodalModel(config)


def test_heads_need_a_bridge(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    with pytest.raises(ValueError, match="the embedding head reads what a bridge read, and this model has none"):
        UnimodalModel(bridged(tmp_path, "clip", bridge=None, matching=None, captioning=None))


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("configs/backbone/*.yaml")), ids=lambda p: p.stem
)
def test_fragments_describe_a_backbone_and_its_embedding(path: Path) -> None:
    fragment = yaml.safe_load(path.read_text())["model"]["init_args"]["config"]
    config = from_dict(ModelConfig, fragment)
    assert config.backbone.published is not None and config.embedding is not None
    assert (config.embedding.bias is None) == (config.backbone.published.name == "clip")
