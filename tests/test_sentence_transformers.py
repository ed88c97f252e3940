"""sentence-transformers loads an exported checkpoint and computes what we do, by its own code where it is installed."""

import json
from pathlib import Path
from typing import Any

import fakehub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from toy import toy_model, toy_processor
from toyqwen import toy_qwen

from tests.test_published import pictures, saved
from unimodal import Unimodal, cli
from unimodal.adapters import (
    CrossEncoderModule,
    SentenceTransformerModule,
    export_cross_encoder,
    export_sentence_transformer,
)
from unimodal.data import Scenes
from unimodal.data.texts import TruncationWarning
from unimodal.hub import CheckpointError, push_to_hub, save_checkpoint, verify_checkpoint
from unimodal.search import Calibration

TEXTS = ["circle", "a small red square left of a star", "a blue star"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("st") / "model"
    model = Unimodal(toy_model(), toy_processor())
    model.encoder.calibration = Calibration(0.5, -0.25, 2, 1, 0.1, 0.0, ((0.5, 1.0),), model.encoder.fingerprint())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> Unimodal:
    return Unimodal.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    scenes = Scenes("test", count=3)
    return [scenes.image(i) for i in range(3)]


@pytest.fixture(scope="module")
def embedder(checkpoint: Path) -> Path:
    return export_sentence_transformer(checkpoint, checkpoint.parent / "embedder", prompts={"query": "a red "})


@pytest.fixture(scope="module")
def reranker(checkpoint: Path) -> Path:
    return export_cross_encoder(checkpoint, checkpoint.parent / "reranker")


def library(name: str) -> Any:
    return getattr(pytest.importorskip("sentence_transformers"), name)


@pytest.fixture(scope="module")
def sentence_transformer(embedder: Path) -> Any:
    return library("SentenceTransformer")(str(embedder), device="cpu", trust_remote_code=True)


@pytest.fixture(scope="module")
def cross_encoder(reranker: Path) -> Any:
    return library("CrossEncoder")(str(reranker), device="cpu", trust_remote_code=True)


def near(values: Any) -> Any:
    return pytest.approx(np.asarray(values), abs=1e-6)


# Embeddings.


def test_texts_and_images(sentence_transformer, ours: Unimodal, images: list[Image.Image], tmp_path: Path) -> None:
    assert sentence_transformer.encode(TEXTS, batch_size=2) == near(ours.encode(TEXTS))
    assert sentence_transformer.encode(images) == near(ours.encode(images))
    assert sentence_transformer.encode(TEXTS[0]) == near(ours.encode(TEXTS[0]))
    images[0].save(tmp_path / "one.png")
    assert sentence_transformer.encode(str(tmp_path / "one.png")) == near(ours.encode(images[0]))
    both = [{"image": image, "text": text} for image, text in zip(images, TEXTS)]
    assert sentence_transformer.encode(both) == near(ours.encode(both))
    mixed = [
        tmp_path / "one.png",
        TEXTS[1],
        both[2],
    ]  # a Path is nothing to sentence-transformers, so it leaves the batch to us
    assert sentence_transformer.encode(mixed) == near(ours.encode([images[0], TEXTS[1], both[2]]))


def test_prompts_similarity_and_width(sentence_transformer, ours: Unimodal, images: list[Image.Image]) -> None:
    assert sentence_transformer.encode_query(TEXTS) == near(ours.encode(TEXTS, prompt="a red "))
    assert sentence_transformer.encode_document(TEXTS) == near(ours.encode(TEXTS))
    a, b = ours.encode(TEXTS), ours.encode(images)
    found = sentence_transformer.similarity(sentence_transformer.encode(TEXTS), sentence_transformer.encode(images))
    assert found.numpy() == near(ours.similarity(a, b))
    short = sentence_transformer.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    assert short == near(ours.encode(TEXTS, truncate_dim=8))


def test_what_it_says_of_itself(sentence_transformer, ours: Unimodal) -> None:
    assert sentence_transformer.get_embedding_dimension() == 16 and sentence_transformer.max_seq_length == 32
    assert sentence_transformer.supports("image") and sentence_transformer.supports(("image", "text"))
    assert not sentence_transformer.supports("audio")
    assert list(sentence_transformer[0].model.heads) == ["image_embedding", "text_embedding"]  # no other is loaded
    assert sentence_transformer.tokenizer.get_vocab() == ours.processor.tokenizer.get_vocab()


def test_it_trains(embedder: Path, images: list[Image.Image]) -> None:
    model = library("SentenceTransformer")(str(embedder), device="cpu", trust_remote_code=True)
    text, image = (model(model.preprocess(part))["sentence_embedding"] for part in (TEXTS, images))
    (text @ image.T).trace().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".heads." in name)


def test_saved_again(sentence_transformer, ours: Unimodal, images: list[Image.Image], tmp_path: Path) -> None:
    sentence_transformer.save_pretrained(str(tmp_path / "again"))
    again = library("SentenceTransformer")(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    assert again.encode(images) == near(ours.encode(images)) and again.prompts["query"] == "a red "
    with pytest.raises(ValueError, match="safe_serialization=False: checkpoints are safetensors alone"):
        sentence_transformer.save_pretrained(str(tmp_path / "pickle"), safe_serialization=False)


def test_model_in_memory_needs_no_trust(ours: Unimodal, images: list[Image.Image]) -> None:
    memory = library("SentenceTransformer")(modules=[SentenceTransformerModule(ours)], device="cpu")
    assert memory.encode(images) == near(ours.encode(images))


@pytest.mark.parametrize(
    "settings",
    [{"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "torch.bfloat16"}],
)
def test_dtype(settings: dict[str, Any], embedder: Path, reranker: Path, images: list[Image.Image]) -> None:
    half = library("SentenceTransformer")(str(embedder), device="cpu", trust_remote_code=True, model_kwargs=settings)
    assert half[0].model.log_scale.dtype == half.dtype == torch.bfloat16
    assert np.linalg.norm(half.encode(TEXTS), axis=1) == pytest.approx(1, abs=1e-6)
    half = library("CrossEncoder")(str(reranker), device="cpu", trust_remote_code=True, model_kwargs=settings)
    assert half[0].model.log_scale.dtype == torch.bfloat16
    assert half.predict([(TEXTS[0], images[0])]).dtype == np.float32


def test_settings_that_say_what_is_so_are_taken(embedder: Path, reranker: Path, ours: Unimodal) -> None:
    settings = {"dtype": "auto", "device_map": "cpu", "attn_implementation": "sdpa"}
    theirs = library("SentenceTransformer")(
        str(embedder), trust_remote_code=True, model_kwargs=settings, local_files_only=True, backend="torch"
    )
    assert theirs.encode(TEXTS) == near(ours.encode(TEXTS)) and theirs.dtype == torch.float32
    short = library("CrossEncoder")(str(reranker), device="cpu", trust_remote_code=True, num_labels=1, max_length=8)
    assert short.max_seq_length == 8 and short.num_labels == 1


def test_longest_text(embedder: Path, tmp_path: Path) -> None:
    model = library("SentenceTransformer")(str(embedder), device="cpu", trust_remote_code=True)
    long, cut = "a red circle left of a blue star", "a red circle left of a"
    whole, expected = model.encode(long), model.encode(cut)
    with pytest.warns(TruncationWarning, match="1 of 1 texts are longer than 8 tokens"):
        assert model.encode(long, processing_kwargs={"text": {"max_length": 8, "truncation": True}}) == near(expected)
    assert model.encode(long) == near(whole)  # for that call alone
    model.max_seq_length = 8
    with pytest.warns(TruncationWarning):
        assert model.encode(long) == near(expected)
    model.save_pretrained(str(tmp_path / "short"))
    again = library("SentenceTransformer")(str(tmp_path / "short"), device="cpu", trust_remote_code=True)
    assert again.max_seq_length == 8
    model.max_seq_length = None
    assert model.max_seq_length == 32
    other = {"processor_kwargs": {"model_max_length": 16}}
    assert library("SentenceTransformer")(str(embedder), trust_remote_code=True, **other).max_seq_length == 16
    for length in (33, 2, 0, -1):
        with pytest.raises(ValueError, match="max_seq_length: expected .*3 to 32"):
            model.max_seq_length = length


def test_prompts_width_and_similarity_are_kept(embedder: Path, ours: Unimodal, tmp_path: Path) -> None:
    theirs = library("SentenceTransformer")(
        str(embedder),
        device="cpu",
        trust_remote_code=True,
        prompts={"query": "a blue ", "short": "a "},
        default_prompt_name="short",
        truncate_dim=8,
        similarity_fn_name="dot",
    )
    theirs.save_pretrained(str(tmp_path / "again"))
    again = library("SentenceTransformer")(
        str(tmp_path / "again"), device="cpu", trust_remote_code=True, truncate_dim=8
    )
    for model in (theirs, again):
        expected = ours.encode(TEXTS, prompt="a blue ", truncate_dim=8)
        assert model.encode_query(TEXTS, normalize_embeddings=True) == near(expected)
        assert model.encode(TEXTS, normalize_embeddings=True) == near(ours.encode(TEXTS, prompt="a ", truncate_dim=8))
        assert model.similarity_fn_name == "dot" and model.get_embedding_dimension() == 8


def test_the_card_is_written_where_it_is_asked_for(
    sentence_transformer: Any, cross_encoder: Any, ours: Unimodal, tmp_path: Path
) -> None:
    for name, model in (("embedder", sentence_transformer), ("reranker", cross_encoder)):
        for card in (True, False):
            folder = tmp_path / f"{name} {card}"
            model.save_pretrained(str(folder), create_model_card=card)
            assert (folder / "README.md").exists() is card
            assert max(verify_checkpoint(folder).values()) < 1e-5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"backend": "onnx"}, "a unimodal checkpoint is loaded as it is, with backend='torch', got backend='onnx'"),
        ({"processor_kwargs": {"size": 3}}, "a unimodal checkpoint is loaded as it is; .*got size=3: leave that out"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "got attn_implementation='eager': leave that out"),
        ({"config_kwargs": {"num_labels": 3}}, "got num_labels=3: leave that out"),
        ({"model_kwargs": {"dtype": "float8"}}, "dtype: expected one of torch.float32.*float8"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict[str, Any], told: str, embedder: Path) -> None:
    with pytest.raises(ValueError, match=told):
        library("SentenceTransformer")(str(embedder), device="cpu", trust_remote_code=True, **settings)


def test_preprocessing_of_another_kind_is_refused(sentence_transformer: Any) -> None:
    for asked, told in (
        ({"image": {"size": 3}}, "got image: size=3"),
        ({"text": {"max_length": 8, "truncation": False}}, "got text: truncation=False"),
        ({"text": {"max_length": 64}}, "max_length: expected .*3 to 32"),
    ):
        with pytest.raises(ValueError, match=told):
            sentence_transformer.encode(TEXTS, processing_kwargs=asked)


def test_pictures_in_their_own_sizes(tmp_path: Path) -> None:
    """NaFlex: a picture is several tensors."""
    saved("naflex", tmp_path / "published")
    published = Unimodal.from_pretrained(tmp_path / "published")
    published.save_pretrained(tmp_path / "model")
    export_sentence_transformer(tmp_path / "model", tmp_path / "embedder")
    theirs = library("SentenceTransformer")(str(tmp_path / "embedder"), device="cpu", trust_remote_code=True)
    assert theirs.encode(pictures(), batch_size=2) == near(published.encode(pictures()))
    both = [{"image": image, "text": "a star"} for image in pictures()]
    assert theirs.encode(both) == near(published.encode(both))


def test_conversations(tmp_path: Path) -> None:
    """Qwen3-VL-Embedding: a prompt is the instruction, and an item of picture and text one sequence."""
    toy_qwen(tmp_path / "published", "embedder")
    published = Unimodal.from_pretrained(tmp_path / "published")
    published.save_pretrained(tmp_path / "model")
    export_sentence_transformer(tmp_path / "model", tmp_path / "embedder", prompts={"query": "Find pictures"})
    theirs = library("SentenceTransformer")(str(tmp_path / "embedder"), device="cpu", trust_remote_code=True)
    both = [{"image": image, "text": "a star"} for image in pictures()]
    for items in (pictures(), TEXTS, both):
        assert theirs.encode(items, batch_size=2) == near(published.encode(items))
    expected = published.encode(TEXTS, prompt="Find pictures", truncate_dim=64)
    assert theirs.encode_query(TEXTS, truncate_dim=64, normalize_embeddings=True) == near(expected)


# Matching.


def test_predict(cross_encoder, ours: Unimodal, images: list[Image.Image]) -> None:
    pairs = [(text, image) for text in TEXTS for image in images] + [(images[0], TEXTS[1])]
    assert cross_encoder.predict(pairs, batch_size=4) == near(ours.predict(pairs))
    assert cross_encoder.predict(pairs[0]) == near(ours.predict(pairs[0]))
    logits = cross_encoder.predict(pairs, activation_fn=torch.nn.Identity())
    assert logits == near(ours.predict(pairs, activation_fn=lambda logit: 0.5 * logit - 0.25))
    prompted = cross_encoder.predict(pairs, prompt="a red ")
    assert prompted[:3] == near(ours.predict([("a red " + text, image) for text, image in pairs[:3]]))
    with pytest.raises(ValueError, match=r"pair 0: the matching head judges one image and one text, got text 'circle'"):
        cross_encoder.predict([(TEXTS[0], TEXTS[1])])


def test_rank(cross_encoder, ours: Unimodal, images: list[Image.Image]) -> None:
    for query, documents in ((TEXTS[1], images), (images[2], TEXTS)):
        found, expected = cross_encoder.rank(query, documents), ours.rank(query, documents)
        assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
        assert [hit["score"] for hit in found] == near([hit["score"] for hit in expected])


def test_matching_in_the_bridge(images: list[Image.Image], tmp_path: Path) -> None:
    model = Unimodal(toy_model(matching={"kind": "bridge"}, embedding={"dim": 16, "pool": "query"}), toy_processor())
    save_checkpoint(model.model, toy_processor(), tmp_path / "model")
    export_cross_encoder(tmp_path / "model", tmp_path / "reranker")
    theirs = library("CrossEncoder")(str(tmp_path / "reranker"), device="cpu", trust_remote_code=True)
    pairs = [(text, image) for text in TEXTS for image in images]
    assert theirs.predict(pairs) == near(model.predict(pairs))


def test_conversations_of_pairs(tmp_path: Path) -> None:
    """Qwen3-VL-Reranker: a query and a document of any kind, in this order."""
    toy_qwen(tmp_path / "published", "reranker")
    published = Unimodal.from_pretrained(tmp_path / "published")
    published.save_pretrained(tmp_path / "model")
    export_cross_encoder(tmp_path / "model", tmp_path / "reranker")
    theirs = library("CrossEncoder")(str(tmp_path / "reranker"), device="cpu", trust_remote_code=True)
    pairs = [("a star", image) for image in pictures()] + [("a star", "a small star"), (pictures()[0], "a star")]
    for pair in pairs:
        assert theirs.predict([pair]) == near(published.predict([pair]))
    assert theirs.predict(pairs[:3], prompt="Is it red?") == near(published.predict(pairs[:3], prompt="Is it red?"))


# Folders.


def test_an_export_is_the_checkpoint_and_two_files(checkpoint: Path, embedder: Path) -> None:
    added = {"modules.json", "config_sentence_transformers.json"}
    assert {path.name for path in embedder.iterdir()} == {path.name for path in checkpoint.iterdir()} | added
    assert all((embedder / path.name).read_bytes() == path.read_bytes() for path in checkpoint.iterdir())
    assert max(verify_checkpoint(embedder).values()) < 1e-5
    assert list(Unimodal.from_pretrained(embedder).model.heads) == list(
        Unimodal.from_pretrained(checkpoint).model.heads
    )


def test_verbs(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form, kind in (("sentence-transformers", "SentenceTransformer"), ("cross-encoder", "CrossEncoder")):
        out = tmp_path / form
        out.mkdir()
        (out / "a.jpg").touch()
        assert cli.main(["export", form, "--model", str(checkpoint), "--out", str(out)]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{out}: README.md, calibration.json, config.json") and "a.jpg" not in told
        (module,) = json.loads((out / "modules.json").read_text())
        assert module["type"] == f"unimodal.adapters.{kind}Module"
    assert cli.main(["export", "cross-encoder", "--model", "no/where", "--out", str(tmp_path / "x")]) == 1
    assert "unimodal export: no/where: no such folder here" in capsys.readouterr().err


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    many = toy_model(embedding={"dim": 16, "pool": "query"}, matching=None)
    save_checkpoint(many, toy_processor(), tmp_path / "many")
    with pytest.raises(ValueError, match="one vector per query for an image, and a SentenceTransformer has one in all"):
        export_sentence_transformer(tmp_path / "many", tmp_path / "out")
    with pytest.raises(ValueError, match="one vector per query for an image"):
        SentenceTransformerModule(Unimodal(many, toy_processor()))
    with pytest.raises(ValueError, match="this model has no embedding head, which is what a SentenceTransformer"):
        SentenceTransformerModule(Unimodal(toy_model(embedding=None), toy_processor()))
    with pytest.raises(ValueError, match="has no matching head, which is what a CrossEncoder scores with"):
        export_cross_encoder(tmp_path / "many", tmp_path / "out")
    with pytest.raises(ValueError, match="this model has no matching head"):
        CrossEncoderModule(Unimodal(many, toy_processor()))
    with pytest.raises(ValueError, match="is the checkpoint itself; give another folder"):
        export_cross_encoder(checkpoint, checkpoint)
    with pytest.raises(CheckpointError, match="has no config.json"):
        export_cross_encoder(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="saving there would overwrite it"):
        export_cross_encoder(checkpoint, tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_by_way_of_the_hub(
    embedder: Path, ours: Unimodal, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with fakehub.running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_fake")
        push_to_hub(embedder, "tester/embedder")
        assert {"modules.json", "config_sentence_transformers.json"} <= hub.repositories["tester/embedder"].branches[
            "main"
        ].keys()
        theirs = library("SentenceTransformer")(
            "tester/embedder", device="cpu", trust_remote_code=True, cache_folder=str(tmp_path)
        )
        assert theirs.encode(images) == near(ours.encode(images))
