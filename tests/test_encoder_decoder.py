"""Captions by a language model with an encoder: BLIP-2 with a T5 or a Flan-T5 against transformers' own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unimodal
from tests.blip2 import DECODING, QUERIES, encoder_tokenizer, pictures, save_t5_captioner, t5_config
from tests.toy import toy_config
from unimodal import stages
from unimodal.backbones import load_language_model
from unimodal.config import LanguageModelConfig
from unimodal.data import Scenes
from unimodal.data.module import PairData
from unimodal.data.writer import Writer
from unimodal.draws import drawing_from, own_generators
from unimodal.hub import CheckpointError, load_checkpoint, verify_checkpoint
from unimodal.inference import Unimodal
from unimodal.model import UnimodalModel
from unimodal.tasks import ITG, Captioning
from unimodal.tasks.step import Step

EXACT = {"rtol": 0, "atol": 1e-5}
QUESTION = "question: what colour is the circle? answer:"
PROMPTS = ["a", QUESTION, "the blue"]
CAPTIONS = ["a red circle", "the blue square is left of the circle"]
START, END = 0, 1


@pytest.fixture(scope="module", params=["t5", "flan-t5"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """transformers' model, its processor, and the folder of both."""
    folder = tmp_path_factory.mktemp("blip2") / request.param
    return *save_t5_captioner(folder, flan=request.param == "flan-t5"), folder


@pytest.fixture(scope="module")
def model(published: tuple[Any, Any, Path]) -> Unimodal:
    return unimodal.from_pretrained(published[2])


@pytest.fixture
def copy(published: tuple[Any, Any, Path], tmp_path: Path) -> Path:
    """A folder to spoil."""
    return Path(shutil.copytree(published[2], tmp_path / "blip2"))


def expected(published: tuple[Any, Any, Path], images: Any, prompts: Any, **settings: Any) -> list[list[int]]:
    """What transformers' decoder writes after its start token, up to the end token."""
    reference, processor, _ = published
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    rows = reference.generate(**inputs, **settings)
    assert rows[:, 0].eq(START).all()
    return [row[: row.index(END)] if END in row else row for row in rows[:, 1:].tolist()]


def words(published: tuple[Any, Any, Path], ids: list[list[int]]) -> list[str]:
    return [published[1].tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


# Against transformers.


@pytest.mark.parametrize("settings", DECODING, ids=str)
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["caption", "prompts"])
def test_captions_are_the_authors(
    published: tuple[Any, Any, Path], model: Unimodal, prompts: list[str] | None, settings: dict[str, Any]
) -> None:
    ids = expected(published, pictures(), prompts, max_new_tokens=8, **settings)
    assert len({tuple(row) for row in ids}) > 1
    assert model.processor.writer is not None
    state = model.encoder.images(pictures())
    given = None if prompts is None else model.processor.writer.prompts(prompts)
    assert model.model.caption(state, prompt=given, max_new_tokens=8, **settings) == ids
    told = model.caption(pictures(), prompt=prompts, max_new_tokens=8, **settings)
    told = told if "num_return_sequences" not in settings else sum(told, [])
    assert told == words(published, ids)


def test_captions_end_where_the_end_token_is(published: tuple[Any, Any, Path]) -> None:
    lengths = {
        len(row) for given in (None, PROMPTS) for row in expected(published, pictures(), given, max_new_tokens=8)
    }
    assert min(lengths) < 8 <= max(lengths)  # else the tests above would show nothing of it


@pytest.mark.parametrize("num_beams", [1, 5])
def test_one_picture_alone_is_written_of_as_in_a_batch(
    published: tuple[Any, Any, Path], model: Unimodal, num_beams: int
) -> None:
    settings = {"max_new_tokens": 6, "num_beams": num_beams}
    alone = [expected(published, [one], [prompt], **settings)[0] for one, prompt in zip(pictures(), PROMPTS)]
    assert alone == expected(published, pictures(), PROMPTS, **settings)
    told = [model.caption(one, prompt=prompt, **settings) for one, prompt in zip(pictures(), PROMPTS)]
    assert told == words(published, alone) == model.caption(pictures(), prompt=PROMPTS, batch_size=2, **settings)


def test_answers_are_the_authors(published: tuple[Any, Any, Path], model: Unimodal) -> None:
    questions = ["what colour?", "what is left?", "the circle?"]
    asked = [f"Question: {question} Answer:" for question in questions]
    settings = {"max_new_tokens": 10, "num_beams": 5, "length_penalty": -1.0}
    ids = expected(published, pictures(), asked, **settings)
    assert model.answer(pictures(), questions) == words(published, ids)
    assert model.answer(pictures()[1], questions[1]) == words(published, ids)[1]


def test_draws_are_those_of_transformers(published: tuple[Any, Any, Path], model: Unimodal) -> None:
    settings: dict[str, Any] = {"do_sample": True, "top_k": 5, "temperature": 2.0, "max_new_tokens": 8, "num_beams": 1}
    ids = []
    for picture, own in zip(pictures(), own_generators(torch.Generator().manual_seed(3), 3)):
        with drawing_from(own, torch.device("cpu")):
            ids += expected(published, [picture], None, **settings)
    source = torch.Generator().manual_seed(3)
    assert model.model.caption(model.encoder.images(pictures()), generator=source, **settings) == ids


@pytest.mark.parametrize("prompt", ["", QUESTION], ids=["caption", "question"])
def test_logits_and_loss_are_the_authors(published: tuple[Any, Any, Path], prompt: str) -> None:
    model = unimodal.from_pretrained(published[2])
    reference, processor, _ = published
    assert model.processor.writer is not None
    model.processor.writer.prompt = prompt
    ids, mask = model.processor.writer.captions(CAPTIONS)
    inputs = processor(images=pictures()[:2], text=[prompt] * 2, return_tensors="pt")
    rows = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = reference(**inputs, labels=labels)
        logits = model.model.caption_logits(model.model.encode_image(inputs["pixel_values"]), ids, mask)
        batch = {"image": inputs["pixel_values"], "caption": ids, "caption_mask": mask}
        loss, _ = ITG(label_smoothing=0.0)(Step(model.model, batch, 0.0))
    before = inputs["input_ids"].shape[1] - QUERIES - 1
    assert logits.shape == (*ids.shape, reference.config.text_config.vocab_size)
    real = labels != -100  # behind the end they read different fillers
    torch.testing.assert_close(logits[:, before:-1][real], out.logits[real], **EXACT)
    assert not logits[:, :before].any()
    torch.testing.assert_close(loss, out.loss, **EXACT)


# What it says of itself, and our own folders.


def test_it_says_what_it_can_do(published: tuple[Any, Any, Path], model: Unimodal) -> None:
    assert model.heads == ("captioning",) and model.modalities == ("image",)
    assert model.missing_heads == ("embedding", "matching", "generation")
    assert set(model.model.sources) == {"published", "language_model"}
    assert model.model.language_captioner is not None and model.model.language_captioner.encodes
    with pytest.raises(ValueError, match="no embedding head; it has: captioning"):
        model.encode(pictures()[0])
    with pytest.raises(CheckpointError, match="has no head matching; it has: captioning"):
        unimodal.from_pretrained(published[2], heads=["matching"])


def test_the_weights_are_the_authors(published: tuple[Any, Any, Path], model: Unimodal) -> None:
    everything = [*model.model.named_parameters(), *model.model.named_buffers()]
    assert not [name for name, tensor in everything if tensor.is_meta or not tensor.isfinite().all()]
    ours, theirs = model.model.head("captioning").language_model, published[0].language_model
    tied = theirs.lm_head.weight is theirs.shared.weight
    assert tied == (published[2].name == "t5") == (ours.lm_head.weight is ours.shared.weight)
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())


def test_it_is_saved_and_loaded_as_a_checkpoint(
    published: tuple[Any, Any, Path], model: Unimodal, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "ours")
    again = unimodal.from_pretrained(tmp_path / "ours")
    state = again.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.model.state_dict().items())
    ids = expected(published, pictures(), PROMPTS, max_new_tokens=8, num_beams=3)
    assert again.caption(pictures(), prompt=PROMPTS, max_new_tokens=8) == words(published, ids)
    ours, theirs = (one.model.head("captioning").language_model for one in (again, model))
    for name in ("dense_act_fn", "is_gated_act", "scale_decoder_outputs", "decoder_start_token_id", "bos_token_id"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert set(verify_checkpoint(tmp_path / "ours").values()) == {0.0}


def test_bridge_and_head_travel_without_what_was_published(
    published: tuple[Any, Any, Path], model: Unimodal, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    names = load_file(tmp_path / "heads/model.safetensors")
    assert "heads.captioning.projection.weight" in names
    assert not [name for name in names if name.startswith(("backbone.", "heads.captioning.language_model."))]
    places = dict.fromkeys(("published", "language_model"), str(published[2]))
    again = Unimodal(*load_checkpoint(tmp_path / "heads", backbone_sources=places))
    assert again.caption(pictures(), prompt=PROMPTS) == model.caption(pictures(), prompt=PROMPTS)


# Training.


def test_a_stage_trains_projection_and_bridge_and_the_language_model_stays(
    published: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    import pytorch_lightning as pl

    language_model = {"name": "t5", "source": str(published[2])}
    captioning = {"kind": "language_model", "language_model": language_model, "prompt": "a red", "max_length": 40}
    task = Captioning(
        toy_config(captioning=captioning, generation=None),
        trainable={"heads.captioning.projection.*": 1.0, "bridge.*": 1.0, "bridge.query_sets.generate": 0.0},
    )
    before = stages.fingerprints(task.model)
    start = {name: weight.clone() for name, weight in task.model.named_parameters()}
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, PairData(train=Scenes("train", count=8), val=Scenes("val", count=4), batch_size=4))
    assert stages.moved(before, stages.fingerprints(task.model)) == []
    assert [name for name in before if name.startswith("heads.captioning.language_model.")]
    moved = {name for name, weight in task.model.named_parameters() if not torch.equal(weight, start[name])}
    assert {"heads.captioning.projection.weight", "bridge.query_sets.image"} <= moved
    assert "captions" in task.results
    assert stages.probe(task.model, ["captioning"])["captioning"].shape[:2] == (2, 8)


def test_the_prompt_is_read_and_the_caption_is_written() -> None:
    tokenizer = encoder_tokenizer()
    settings: dict[str, Any] = {"vocab_size": 40, "start_id": END, "end_id": END, "encoded": True}
    ids, mask = Writer(tokenizer, **settings).prompts(["a red", "", "the"])
    assert ids.tolist() == [tokenizer("a red")["input_ids"], [END] * 3, [*tokenizer("the")["input_ids"], END]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    ids, mask = Writer(tokenizer, prompt="what colour", **settings).captions(["red", "blue circle"])
    whole = [[*tokenizer("what colour")["input_ids"], *tokenizer(text)["input_ids"]] for text in ("red", "blue circle")]
    assert ids.tolist() == [[*whole[0], END], whole[1]]
    assert mask.tolist() == [[False, False, True, True, True, False], [False, False, True, True, True, True]]


def test_prompts_of_several_lengths_are_not_learned_from(model: Unimodal) -> None:
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[True] * 4, [False, True, True, True]])
    with pytest.raises(
        ValueError, match="prompts of 1, 2 tokens in one batch; .* give all captions of a batch the same"
    ):
        model.model.caption_logits(model.encoder.images(pictures()[:2]), ids, mask)


# From random numbers, and bad input.


@pytest.mark.parametrize("flan", [False, True])
def test_a_t5_from_random_numbers(flan: bool) -> None:
    kwargs = t5_config(encoder_tokenizer(), flan=flan).to_diff_dict()
    model, sources = load_language_model(LanguageModelConfig(name="t5", kwargs=kwargs), pretrained=True)
    assert sources == {} and (model.lm_head.weight is model.shared.weight) != flan


def change(*path: str, **values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        place = settings
        for key in path:
            place = place[key]
        place |= values
        (folder / "config.json").write_text(json.dumps(settings))

    return spoil


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.decoder.block.1.layer.1.EncDecAttention.k.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BART = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("text_config", decoder_start_token_id=None), "names no token that its decoder starts with; set decoder_start"),
        (change("text_config", eos_token_id=None), "names no end token, so no caption would end"),
        (change(text_config=BART), "type 'bart' reads with an encoder and writes with a decoder; .*or a t5"),
        (without_a_weight, "all weights of Blip2Language.*EncDecAttention.k.weight"),
    ],
)  # fmt: skip
def test_spoilt_folders_are_refused_in_words(copy: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(copy)
    with pytest.raises(CheckpointError, match=words):
        unimodal.from_pretrained(copy)


def test_its_start_token_outside_of_the_vocabulary() -> None:
    kwargs = t5_config(encoder_tokenizer(), flan=True).to_diff_dict() | {"decoder_start_token_id": 99}
    captioning = {"kind": "language_model", "language_model": {"name": "t5", "kwargs": kwargs}}
    with pytest.raises(ValueError, match=r"starts with \[1, 99\] and ends with \[1\], outside of its vocabulary"):
        UnimodalModel(toy_config(captioning=captioning))
