"""Captions by a language model: BLIP-2's second stage against transformers' own, and any language model behind any bridge."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2TokenizerFast

import unimodal
from tests.blip2 import DECODING, QUERIES, pictures, save_captioner, save_language_model, writer_tokenizer
from tests.toy import toy_config, toy_model, toy_processor
from unimodal import cli, stages
from unimodal.backbones import load_language_model
from unimodal.config import AdapterConfig, LanguageModelConfig, ModelConfig
from unimodal.data import Scenes
from unimodal.data.module import PairData
from unimodal.data.processor import TruncationWarning
from unimodal.data.published import open_writer
from unimodal.data.writer import Writer
from unimodal.draws import drawing_from, own_generators
from unimodal.files import BOOKKEEPING
from unimodal.hub import CheckpointError, load_adapter, load_checkpoint, save_adapter, verify_checkpoint
from unimodal.hub.folder import FILES
from unimodal.inference import Unimodal
from unimodal.model import UnimodalModel
from unimodal.tasks import ITG, Captioning
from unimodal.tasks.step import Step

EXACT = {"rtol": 0, "atol": 1e-5}
QUESTION = "question: what colour is the circle? answer:"
CAPTIONS = ["a red circle", "the blue square is left of the circle"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """transformers' model, its processor, and the folder of both."""
    folder = tmp_path_factory.mktemp("blip2") / "opt"
    return *save_captioner(folder), folder


@pytest.fixture(scope="module")
def model(published: tuple[Any, Any, Path]) -> Unimodal:
    return unimodal.from_pretrained(published[2])


@pytest.fixture
def copy(published: tuple[Any, Any, Path], tmp_path: Path) -> Path:
    """A folder to spoil."""
    return Path(shutil.copytree(published[2], tmp_path / "blip2"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model alone."""
    folder = tmp_path_factory.mktemp("language") / "opt"
    save_language_model(folder)
    return folder


def named(source: Path | None, name: str = "opt", **settings: Any) -> dict[str, Any]:
    """Configuration of a captioning head."""
    source_name = None if source is None else str(source)
    return {"kind": "language_model", "language_model": {"name": name, "source": source_name}, **settings}


def bridged(source: Path, **settings: Any) -> ModelConfig:
    """The toy's two towers and bridge with a language model behind."""
    return toy_config(captioning=named(source, **settings), generation=None)


def expected(
    published: tuple[Any, Any, Path], prompts: list[str] | None, images: Any = None, **settings: Any
) -> list[list[int]]:
    """What transformers writes after the prompt, up to the end token."""
    reference, processor, _ = published
    images = pictures() if images is None else images
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    out = reference.generate(**inputs, **settings)
    start = QUERIES + 1 if prompts is None else inputs["input_ids"].shape[1]
    end = reference.language_model.config.eos_token_id
    rows = out[:, start:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


# Against transformers.


@pytest.mark.parametrize("settings", DECODING, ids=str)
@pytest.mark.parametrize("prompt", [None, QUESTION], ids=["caption", "question"])
def test_captions_are_the_authors(
    published: tuple[Any, Any, Path], model: Unimodal, prompt: str | None, settings: dict[str, Any]
) -> None:
    ids = expected(published, None if prompt is None else [prompt] * 3, max_new_tokens=8, **settings)
    assert len({tuple(row) for row in ids}) > 1
    writer = model.processor.writer
    assert writer is not None
    state = model.encoder.images(pictures())
    given = None if prompt is None else writer.prompts([prompt])
    assert model.model.caption(state, prompt=given, max_new_tokens=8, **settings) == ids
    words = [published[1].tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    told = model.caption(pictures(), prompt=prompt, max_new_tokens=8, **settings)
    assert [*told] == (words if "num_return_sequences" not in settings else [words[i : i + 2] for i in (0, 2, 4)])


def test_captions_end_where_the_end_token_is(published: tuple[Any, Any, Path], model: Unimodal) -> None:
    lengths = {len(row) for row in expected(published, None, max_new_tokens=8)}
    lengths |= {len(row) for row in expected(published, [QUESTION] * 3, max_new_tokens=8)}
    assert min(lengths) < 8 <= max(lengths)  # else the tests above would show nothing of it


def test_prompts_of_different_lengths_are_those_of_transformers(
    published: tuple[Any, Any, Path], model: Unimodal
) -> None:
    prompts = ["a", QUESTION, "the blue"]
    published[1].tokenizer.padding_side = "left"
    ids = expected(published, prompts, max_new_tokens=6)
    published[1].tokenizer.padding_side = "right"
    assert model.processor.writer is not None
    state = model.encoder.images(pictures())
    assert model.model.caption(state, prompt=model.processor.writer.prompts(prompts), max_new_tokens=6) == ids
    told = model.caption(pictures(), prompt=prompts, max_new_tokens=6, num_beams=1)
    assert told == [
        model.caption(picture, prompt=prompt, max_new_tokens=6, num_beams=1)
        for picture, prompt in zip(pictures(), prompts)
    ]
    assert told == model.caption(pictures(), prompt=prompts, max_new_tokens=6, num_beams=1, batch_size=2)


def test_draws_are_those_of_transformers_and_follow_the_generator(
    published: tuple[Any, Any, Path], model: Unimodal
) -> None:
    settings: dict[str, Any] = {"do_sample": True, "top_k": 5, "temperature": 2.0, "max_new_tokens": 8, "num_beams": 1}
    ids = []
    for picture, own in zip(pictures(), own_generators(torch.Generator().manual_seed(3), 3)):
        with drawing_from(own, torch.device("cpu")):
            ids += expected(published, None, [picture], **settings)
    source = torch.Generator().manual_seed(3)
    assert model.model.caption(model.encoder.images(pictures()), generator=source, **settings) == ids
    state = torch.get_rng_state()
    drawn = [model.caption(pictures(), generator=torch.Generator().manual_seed(seed), **settings) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_answers(model: Unimodal) -> None:
    short = {"max_new_tokens": 10, "num_beams": 5, "length_penalty": -1.0}
    asked = model.answer(pictures(), "what colour?")
    assert asked == model.caption(pictures(), prompt="Question: what colour? Answer:", **short)
    questions = ["what colour?", "what is left?", "the circle?"]
    assert model.answer(pictures(), questions) == [model.answer(p, q) for p, q in zip(pictures(), questions)]


def test_a_prompt_from_the_shell(
    model: Unimodal, published: tuple[Any, Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures()[0].save(tmp_path / "a.png")
    arguments = ["caption", str(tmp_path / "a.png"), "--model", str(published[2]), "--prompt", QUESTION]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: {model.caption(tmp_path / 'a.png', prompt=QUESTION)}\n"


def test_pictures_are_the_authors(published: tuple[Any, Any, Path], model: Unimodal) -> None:
    pixels = published[1](images=pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(model.processor.images(pictures()), pixels)


def test_logits_and_loss_are_the_authors(published: tuple[Any, Any, Path]) -> None:
    model = unimodal.from_pretrained(published[2])
    model.processor.writer.prompt = QUESTION  # type: ignore[union-attr]
    ids, mask = model.processor.writer.captions(CAPTIONS)  # type: ignore[union-attr]
    pixels = model.processor.images(pictures()[:2])
    reference, processor, _ = published
    prompt_length = len(processor.tokenizer(QUESTION)["input_ids"])
    real = torch.tensor([len(processor.tokenizer(f"{QUESTION} {caption}")["input_ids"]) + 1 for caption in CAPTIONS])
    place = torch.arange(ids.shape[1])
    image_ids = torch.full((2, QUERIES), reference.config.image_token_id)
    labels = ids.masked_fill((place < prompt_length) | (place >= real[:, None]), -100)
    with torch.no_grad():
        out = reference(
            pixel_values=pixels,
            input_ids=torch.cat([image_ids, ids], 1),
            labels=torch.cat([torch.full_like(image_ids, -100), labels], 1),
        )
        logits = model.model.caption_logits(model.model.encode_image(pixels), ids)
        loss, _ = ITG(label_smoothing=0.0)(
            Step(model.model, {"image": pixels, "caption": ids, "caption_mask": mask}, 0.0)
        )
    torch.testing.assert_close(logits, out.logits[:, QUERIES:], **EXACT)
    torch.testing.assert_close(loss, out.loss, **EXACT)
    # And by hand: the prompt is read and not learned, the end is learned.
    losses = [
        -logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b in range(2) for t in range(prompt_length, int(real[b]))
    ]
    assert len(losses) == 3 + 1 + 8 + 1
    torch.testing.assert_close(loss, torch.stack(losses).mean(), **EXACT)


# What it says of itself, and our own folders.


def test_it_says_what_it_can_do(model: Unimodal, published: tuple[Any, Any, Path]) -> None:
    assert model.heads == ("captioning",) and model.modalities == ("image",)
    with pytest.raises(ValueError, match="no embedding head; it has: captioning"):
        model.encode(pictures()[0])
    with pytest.raises(ValueError, match="no matching head; it has: captioning"):
        model.predict((pictures()[0], "a circle"))
    assert set(model.model.sources) == {"published", "language_model"}
    assert not model.model.bridge.has_text


def test_no_parameter_is_left_as_it_was_allocated(model: Unimodal, published: tuple[Any, Any, Path]) -> None:
    everything = [*model.model.named_parameters(), *model.model.named_buffers()]
    assert not [name for name, tensor in everything if tensor.is_meta or not tensor.isfinite().all()]
    ours = model.model.head("captioning").language_model
    assert ours.lm_head.weight is ours.get_input_embeddings().weight  # tied, as in the reference
    theirs = published[0].language_model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())


def test_it_is_saved_and_loaded_as_a_checkpoint(model: Unimodal, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    again = unimodal.from_pretrained(tmp_path / "ours")
    state = again.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.model.state_dict().items())
    assert again.caption(pictures(), prompt=QUESTION) == model.caption(pictures(), prompt=QUESTION)
    assert set(verify_checkpoint(tmp_path / "ours").values()) == {0.0}
    files = [
        path.relative_to(tmp_path / "ours").as_posix() for path in (tmp_path / "ours").rglob("*") if path.is_file()
    ]
    assert "language_model/tokenizer.json" in files
    assert not [
        name for name in set(files) - BOOKKEEPING if not any(fnmatch(name, pattern) for pattern in FILES)
    ]  # all goes up to the Hub
    model.save_pretrained(tmp_path / "ours")  # and is replaced whole
    assert unimodal.from_pretrained(tmp_path / "ours").heads == ("captioning",)


def test_bridge_and_head_travel_without_what_was_published(
    model: Unimodal, published: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    names = load_file(tmp_path / "heads/model.safetensors")
    assert {"heads.captioning.projection.weight", "bridge.query_sets.image"} <= names.keys()
    assert not [name for name in names if name.startswith(("backbone.", "heads.captioning.language_model."))]
    with pytest.raises(CheckpointError, match="holds no published tower; it was the local 'opt'"):
        load_checkpoint(tmp_path / "heads")
    places = dict.fromkeys(("published", "language_model"), str(published[2]))
    network, processor = load_checkpoint(tmp_path / "heads", backbone_sources=places)
    again = Unimodal(network, processor)
    assert again.caption(pictures()) == model.caption(pictures())
    with torch.no_grad():
        network.head("captioning").language_model.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="the language_model tower was trained, .* save with include_backbone=True"):
        again.save_pretrained(tmp_path / "changed", include_backbone=False)


def test_a_model_without_its_captions(opt: Path, tmp_path: Path) -> None:
    network = UnimodalModel(bridged(opt), pretrained=True)
    processor = toy_processor()
    assert network.config.captioning is not None
    processor.writer = open_writer(opt, network.config.captioning, network.head("captioning"))
    Unimodal(network, processor).save_pretrained(tmp_path / "ours")
    rest = unimodal.from_pretrained(tmp_path / "ours", heads=["matching"])
    assert rest.heads == ("embedding", "matching") and rest.processor.writer is None
    shutil.rmtree(tmp_path / "ours/language_model")
    with pytest.raises(CheckpointError, match="lacks language_model/tokenizer.json, which was saved there"):
        unimodal.from_pretrained(tmp_path / "ours")


# Any language model behind any bridge.


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "qwen3"])
def test_any_language_model(name: str, tmp_path: Path) -> None:
    reference = save_language_model(tmp_path, name)
    network = UnimodalModel(bridged(tmp_path, name=name), pretrained=True).eval()
    head = network.head("captioning")
    assert all(torch.equal(w, head.language_model.state_dict()[n]) for n, w in reference.state_dict().items())
    images, ids = torch.randn(2, 4, 32), torch.randint(4, 20, (2, 6))
    with torch.no_grad():
        logits = head(ids, images)
        hidden = torch.cat([head.projection(images), reference.get_input_embeddings()(ids)], 1)
        torch.testing.assert_close(logits, reference(inputs_embeds=hidden).logits[:, 4:], **EXACT)
    # Greedy, one token at a time, without a cache.
    prompt = torch.tensor([[2, 7, 8]])
    written = head.generate(images, prompt=(prompt, prompt > 0), max_new_tokens=5)
    text = prompt.expand(2, -1)
    with torch.no_grad():
        for _ in range(5):
            text = torch.cat([text, head(text, images)[:, -1].argmax(-1, keepdim=True)], 1)
    rows = text[:, 3:].tolist()
    assert written == [row[: row.index(head.eos_id)] if head.eos_id in row else row for row in rows]


def test_what_the_checkpoint_says_about_drawing_is_not_followed(opt: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opt, tmp_path / "opt"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 9.0, "eos_token_id": [5, 6]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    network = UnimodalModel(bridged(folder), pretrained=True).eval()
    head = network.head("captioning")
    assert head.end_ids == [5, 6]
    images = torch.randn(2, 4, 32)
    assert head.generate(images, max_new_tokens=9) == head.generate(images, max_new_tokens=9)


def test_both_tokenizers_make_the_batch(opt: Path) -> None:
    config = bridged(opt, prompt="a red", max_length=9)
    task = Captioning(config, ITG(label_smoothing=0.0), trainable={"heads.captioning.projection.*": 1.0})
    data = PairData(train=Scenes("train", count=4), batch_size=4)
    processor = data.bind(config, task.model.backbone, task.model.language_captioner)
    with pytest.warns(TruncationWarning, match="4 of 4 captions are longer than 9 tokens and were cut"):
        batch = next(iter(data.train_dataloader()))
    writer, start = processor.writer, [2, 4, 5]  # </s> a red
    assert writer is not None and batch["caption"][:, :3].tolist() == [start] * 4
    assert batch["caption"].shape == (4, 3 + 9) and batch["caption_mask"].sum(1).tolist() == [10] * 4
    assert batch["caption"][:, -1].tolist() == [writer.end_id] * 4
    assert (
        batch["text"].shape[1] != 12 and batch["text"].max() >= writer.tokenizer.vocab_size
    )  # the bridge's own tokens
    losses, _ = task.training_forward(batch)
    assert losses["itg"].isfinite()
    del batch["caption"]
    with pytest.raises(KeyError, match="objective ITG needs batch key 'caption' .*prompt and caption in the token ids"):
        task.training_forward(batch)


def test_a_stage_trains_projection_and_bridge_and_the_language_model_stays(opt: Path, tmp_path: Path) -> None:
    import pytorch_lightning as pl

    task = Captioning(
        bridged(opt),
        trainable={"heads.captioning.projection.*": 1.0, "bridge.*": 1.0, "bridge.query_sets.generate": 0.0},
    )
    before = stages.fingerprints(task.model)
    start = {name: weight.clone() for name, weight in task.model.named_parameters()}
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = PairData(train=Scenes("train", count=8), val=Scenes("val", count=4), batch_size=4)
    trainer.fit(task, data)
    assert stages.moved(before, stages.fingerprints(task.model)) == []
    assert [name for name in before if name.startswith("heads.captioning.language_model.")]
    moved = {name for name, weight in task.model.named_parameters() if not torch.equal(weight, start[name])}
    assert {"heads.captioning.projection.weight", "bridge.query_sets.image"} <= moved
    assert "captions" in task.results


def test_single_layers_of_the_language_model_train(opt: Path) -> None:
    task = Captioning(bridged(opt), trainable={"heads.captioning.language_model.*.q_proj.*": 0.1})
    trained = {name for name, weight in task.model.named_parameters() if weight.requires_grad}
    assert len(trained) == 4 and all(name.endswith(("q_proj.weight", "q_proj.bias")) for name in trained)
    assert stages.untouched_heads(task.model) == ["embedding", "matching"]
    data = PairData(train=Scenes("train", count=4), batch_size=4)
    data.bind(task.config, task.model.backbone, task.model.language_captioner)
    losses, _ = task.training_forward(next(iter(data.train_dataloader())))
    losses["itg"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in task.model.parameters() if p.requires_grad)
    assert stages.probe(task.model, ["captioning"])["captioning"].shape[:2] == (2, 8)


def test_adapters_in_the_language_model(opt: Path, tmp_path: Path) -> None:
    """Two models share one language model, and each writes with its own adapters."""
    model = Unimodal(UnimodalModel(bridged(opt), pretrained=True), toy_processor())
    tuned = Unimodal(UnimodalModel(bridged(opt), pretrained=True), toy_processor())
    tuned.model.load_state_dict(model.model.state_dict())
    for one in (model, tuned):
        settings = one.model.config.captioning
        assert settings is not None
        one.processor.writer = open_writer(opt, settings, one.model.language_captioner)
    target = ("heads.captioning.language_model.*.q_proj", "heads.captioning.language_model.*.fc1")
    tuned.model.add_adapter("vqa", AdapterConfig(target=target, r=2))
    trained = [name for name, weight in tuned.model.named_parameters() if ".vqa." in name]
    assert len(trained) == 8
    with torch.no_grad():
        for weight in (weight for name, weight in tuned.model.named_parameters() if name in trained):
            weight.copy_(3 * torch.randn_like(weight))
    plain, other = (one.caption(pictures(), max_new_tokens=8, num_beams=1) for one in (model, tuned))
    assert plain != other
    save_adapter(tuned.model, tuned.processor, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/model.safetensors")
    assert {name for name in stored if "language_model" in name} == set(trained)
    again = Unimodal(*load_adapter(model.model, tmp_path / "adapter"))
    assert again.model.language_captioner.language_model is model.model.language_captioner.language_model
    states = [one.encoder.images(pictures()) for one in (model, again)]
    for _ in range(2):
        written = [one.model.caption(state, max_new_tokens=8) for one, state in zip((model, again), states)]
        assert [[one.processor.decode(ids) for ids in rows] for one, rows in zip((model, again), written)] == [
            plain,
            other,
        ]
    tuned.save_pretrained(tmp_path / "whole")
    assert unimodal.from_pretrained(tmp_path / "whole").caption(pictures(), max_new_tokens=8, num_beams=1) == other


def test_a_language_model_from_random_numbers(tmp_path: Path) -> None:
    tokenizer = writer_tokenizer()
    kwargs = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kwargs |= {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    settings = LanguageModelConfig(name="opt", kwargs=kwargs)
    model, sources = load_language_model(settings, pretrained=True)
    assert sources == {} and model.config.hidden_size == 16
    captioning = {"kind": "language_model", "language_model": {"name": "opt", "kwargs": kwargs}}
    network = UnimodalModel(toy_config(captioning=captioning))
    with pytest.raises(ValueError, match="training needs the folder or Hub id of its tokenizer, got None"):
        PairData().bind(network.config, network.backbone, network.language_captioner)


# Prompts and captions in tokens.


def writer(**settings: Any) -> Writer:
    return Writer(writer_tokenizer(), **{"vocab_size": 40, "start_id": 2, "end_id": 19, **settings})


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = writer().prompts(["a red", "", "the"])
    assert ids.tolist() == [[2, 4, 5], [19, 19, 2], [19, 2, 12]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    with pytest.raises(TypeError, match="prompts: expected a list of strings, got 'a red'"):
        writer().prompts("a red")


def test_captions_are_padded_on_the_right_and_end() -> None:
    ids, mask = writer().captions(["a red circle", "square"])
    assert ids.tolist() == [[2, 4, 5, 7, 19], [2, 8, 19, 19, 19]]
    assert mask.tolist() == [[True] * 5, [True, True, True, False, False]]
    ids, mask = writer(prompt="what colour").captions(["red", "blue circle"])
    assert ids.tolist() == [[2, 15, 16, 5, 19, 19], [2, 15, 16, 6, 7, 19]]
    assert mask.tolist() == [[False, False, True, True, True, False], [False, False, True, True, True, True]]
    with pytest.raises(ValueError, match="texts: entry 1 is empty"):
        writer().captions(["a", " "])


def test_long_captions_are_cut_and_it_is_said() -> None:
    with pytest.warns(
        TruncationWarning, match="1 of 2 captions are longer than 4 tokens and were cut, first 'a red blue circle'"
    ):
        ids, _ = writer(max_length=4).captions(["a red circle", "a red blue circle"])
    assert ids.tolist() == [[2, 4, 5, 7, 19], [2, 4, 5, 6, 19]]


def byte_level(folder: Path) -> GPT2TokenizerFast:
    """A tokenizer that puts the space before a word into the word's token, as GPT-2's and OPT's."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["a dog runs. a photo of a dog."] * 50, vocab_size=300, special_tokens=["</s>"], show_progress=False
    )
    trained.save_model(str(folder))
    return GPT2TokenizerFast.from_pretrained(folder, bos_token="</s>", eos_token="</s>", unk_token="</s>")


def test_a_caption_goes_on_from_its_prompt_as_text_does(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    settings: dict[str, Any] = {"vocab_size": 400, "start_id": 0, "end_id": 0}
    ids, mask = Writer(tokenizer, prompt="a photo of", **settings).captions(["a dog"])
    assert ids[0].tolist() == [*tokenizer("a photo of a dog")["input_ids"], 0]
    prompt, _ = Writer(tokenizer, **settings).prompts(["a photo of"])
    assert (
        ids[0, : prompt.shape[1]].tolist() == prompt[0].tolist() and mask[0].tolist().index(True) == prompt.shape[1] - 1
    )
    with pytest.raises(
        ValueError, match="captioning.prompt 'a photo of ': its last token melts into the first word of 'a dog'"
    ):
        Writer(tokenizer, prompt="a photo of ", **settings).captions(["a dog"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"vocab_size": 20},
            "has 20 tokens and ends with 19, its tokenizer has tokens up to 20: they do not belong together",
        ),
        ({"end_id": 30}, "has 40 tokens and ends with 30, its tokenizer has tokens up to 20"),
    ],
)
def test_a_tokenizer_of_another_model(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        writer(**settings)


def test_a_tokenizer_that_closes_every_text() -> None:
    closing = toy_processor().tokenizer
    with pytest.raises(
        ValueError, match=r"ends every text with '\[SEP\]', so a language model could not go on from a prompt"
    ):
        Writer(closing, vocab_size=len(closing), start_id=2, end_id=3)


# Bad input.


def drop(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def change(*path: str, **values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        place = settings
        for key in path:
            place = place[key]
        place |= values
        (folder / "config.json").write_text(json.dumps(settings))

    return spoil


def other_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)


TINY = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop("language_model.model.decoder.layers.1.fc1.weight"), "all weights of Blip2Language.*layers.1.fc1.weight"),
        (drop("language_projection.bias"), r"language_projection.bias: expected the shape \[24\], the weights have nothing"),
        (drop("query_tokens"), "BLIP-2 weights do not fit this bridge: missing .'query_tokens'"),
        (other_tokenizer, "the tokenizer .* tokens, the model's vocabulary 25: they do not belong together"),
        (change("text_config", eos_token_id=None), "names no end token, so no caption would end"),
    ],
)  # fmt: skip
def test_spoilt_folders_are_refused_in_words(copy: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(copy)
    with pytest.raises(CheckpointError, match=words):
        unimodal.from_pretrained(copy)


def test_a_checkpoint_of_ours_that_is_not_whole(model: Unimodal, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours/model.safetensors")
    (tied,) = [name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))]  # stored once
    del weights[tied]
    save_file(weights, tmp_path / "ours/model.safetensors")
    with pytest.raises(CheckpointError, match="2 missing(.|\n)*lm_head.weight(.|\n)*embed_tokens.weight"):
        unimodal.from_pretrained(tmp_path / "ours")


def test_a_checkpoint_may_not_give_orders_through_the_language_model(model: Unimodal, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    spoil = change("model", "captioning", "language_model", "kwargs", attn_implementation="someone/kernel")
    spoil(tmp_path / "ours")
    with pytest.raises(
        CheckpointError, match="model.captioning.language_model.kwargs: attn_implementation is no setting"
    ):
        unimodal.from_pretrained(tmp_path / "ours")
    path = tmp_path / "ours/language_model/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": "evil.Evil"}}))
    change("model", "captioning", "language_model", kwargs={})(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="tokenizer_config.json names code to run"):
        unimodal.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "optt"}, "'optt' is no decoder-only language model of transformers, and not t5; did you mean 'opt'"),
        ({"name": "bart"}, "type 'bart' reads with an encoder and writes with a decoder; captions need .*, or a t5"),
        ({"name": "pegasus_x"}, "'pegasus_x' is no decoder-only language model of transformers, and not t5"),
        ({"name": "bert", "kwargs": {"hidden_size": 8, "num_attention_heads": 2}}, "does not write from left to right"),
        ({"name": "gpt2", "source": "OPT"}, "holds a language model of type 'opt', expected 'gpt2'; set captioning.language_model.name"),
        ({"name": "opt", "kwargs": {"vocab_size": 9, "eos_token_id": 9, **TINY}}, "ends with .9., outside of its vocabulary of 9"),
    ],
)  # fmt: skip
def test_language_models_that_do_not_serve(opt: Path, settings: dict[str, Any], words: str) -> None:
    if settings.get("source"):
        settings = settings | {"source": str(opt)}
    with pytest.raises(ValueError, match=words):
        UnimodalModel(toy_config(captioning={"kind": "language_model", "language_model": settings}), pretrained=True)


def test_a_revision_that_does_not_exist() -> None:
    absent = LanguageModelConfig(name="opt", source="nobody/nothing", revision="v9")
    with pytest.raises(FileNotFoundError, match="nobody/nothing at revision 'v9'"):
        load_language_model(absent, pretrained=True)


def test_a_language_model_with_missing_weights_is_refused_not_invented(opt: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opt, tmp_path / "opt"))
    drop("model.decoder.final_layer_norm.weight")(folder)
    with pytest.raises(ValueError, match="does not hold all weights of OPTForCausalLM.*final_layer_norm.weight"):
        load_language_model(LanguageModelConfig(name="opt", source=str(folder)), pretrained=True)


def test_heads_that_are_not_said_whole(opt: Path) -> None:
    with pytest.raises(ValueError, match="kind is 'language_model', so one must be named"):
        UnimodalModel(toy_config(captioning={"kind": "language_model"}))
    with pytest.raises(ValueError, match="captioning.vocabulary: a language model has its own; leave it null"):
        UnimodalModel(toy_config(captioning=named(opt, vocabulary=9)))


def test_what_caption_refuses(model: Unimodal) -> None:
    with pytest.raises(ValueError, match="output_scores: captions are all that is returned; call `generate` of head"):
        model.caption(pictures()[0], output_scores=True)
    for wrong in ({"no_such_option": 1}, {"repetition_penalty": "a"}, {"num_return_sequences": 4, "num_beams": 2}):
        with pytest.raises(ValueError, match=f"caption: the options .*{next(iter(wrong))}.* end in "):
            model.caption(pictures()[0], **wrong)
    with pytest.raises(ValueError, match="one for all or one for each of 3 images, got 2"):
        model.caption(pictures(), prompt=["a", "a"])
    with pytest.raises(ValueError, match="candidates and num_return_sequences both ask for several captions"):
        model.caption(pictures(), candidates=2, num_return_sequences=2)
    with pytest.raises(
        ValueError, match="5 tokens of the picture and 71 of text, but the language model has 64 positions"
    ):
        model.caption(pictures(), max_new_tokens=70)
    toy = Unimodal(toy_model(), toy_processor())
    with pytest.raises(ValueError, match="captioning head takes no prompt; only a language model"):
        toy.caption(pictures()[0], prompt="a photo of")
