"""A checkpoint comes back bit for bit, by path and through a Hub; whatever does not fit, is cut short or could run code
is refused in words; and no full disk and no kill costs the checkpoint that was there before."""

import errno
import json
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakehub
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from toy import toy_config, toy_model, toy_processor

import unimodal.hub.folder
from unimodal.config import to_dict
from unimodal.files import BOOKKEEPING
from unimodal.hub import (
    Card,
    CheckpointError,
    CheckpointMismatch,
    load_checkpoint,
    push_to_hub,
    round_weights,
    save_checkpoint,
    verify_checkpoint,
)
from unimodal.hub.folder import replacing
from unimodal.metrics import CaptionMetrics, Protocol
from unimodal.model import UnimodalModel

CAPTION_SCORES = {"bleu_1": 1.0, "bleu_2": 2.0, "bleu_3": 3.0, "bleu_4": 4.0, "rouge_l": 5.0, "cider_d": 6.5}
PROTOCOL = Protocol(dataset="Scenes", split="test", fingerprint="abc", images=5, captions=25, stage=None, rule="regex")


@pytest.fixture(scope="module")
def model() -> UnimodalModel:
    return toy_model()


@pytest.fixture(scope="module")
def processor() -> Any:
    return toy_processor()


@pytest.fixture(scope="module")
def saved(model: UnimodalModel, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "toy"
    card = Card(name="Toy", training="Drawn **scenes**.", datasets=("tester/scenes",), tags=("toy",))
    metrics = [("captions", CaptionMetrics(protocol=PROTOCOL, **CAPTION_SCORES))]
    return save_checkpoint(model, processor, folder, card=card, metrics=metrics)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "toy"))


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def same(a: UnimodalModel, b: UnimodalModel) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in BOOKKEEPING}


# What is in the folder.


def test_round_trip_is_bit_for_bit(saved: Path, model: UnimodalModel, processor: Any) -> None:
    loaded, reader = load_checkpoint(saved)
    assert same(loaded, model) and loaded.config == model.config and not loaded.training
    texts = ["a small red circle", "left of"]
    assert all(torch.equal(a, b) for a, b in zip(reader.texts(texts), processor.texts(texts)))
    assert all(value == 0 for value in verify_checkpoint(saved).values())


def test_files_are_the_named_ones(saved: Path, model: UnimodalModel) -> None:
    names = {path.name for path in saved.iterdir()} - BOOKKEEPING
    assert all(unimodal.hub.folder.is_checkpoint_file(name) for name in names)
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "example.safetensors"}
    assert load_file(saved / "model.safetensors").keys() == model.state_dict().keys()
    config = json.loads((saved / "config.json").read_text())
    assert config["model"] == json.loads(json.dumps(to_dict(model.config)))
    assert config["library"] == "unimodal" and config["backbone"] == {
        "included": True,
        "sources": {},
        "fingerprint": None,
    }


def test_card_has_metadata_use_and_protocols(saved: Path) -> None:
    card = ModelCard.load(saved / "README.md")
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("unimodal", "apache-2.0", "any-to-any")
    assert {"toy", "matching", "generation"} <= set(data.tags) and data.datasets == ["tester/scenes"]
    results = {result.metric_type: result for result in data.eval_results}
    assert results["cider_d"].metric_value == 6.5
    assert PROTOCOL.label() in results["cider_d"].metric_name and results["cider_d"].dataset_revision == "abc"
    for words in (PROTOCOL.label(), "Drawn **scenes**.", "model.caption(", "## Limits", "head: generation"):
        assert words in card.text


def test_card_of_a_small_model_promises_no_more(processor: Any, tmp_path: Path) -> None:
    small = toy_model(matching=None, captioning=None, generation=None)
    card = ModelCard.load(save_checkpoint(small, processor, tmp_path / "small") / "README.md")
    assert card.data.pipeline_tag == "feature-extraction"
    assert "model.caption(" not in card.text and "Not measured." in card.text


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "matching": {"kind": "bridge"},
            "captioning": {"kind": "bridge", "bos_id": 2, "eos_id": 3},
            "generation": None,
        },
        {"embedding": {"dim": 16, "pool": "query", "gate": False}, "matching": None, "captioning": None},
    ],
)
def test_other_heads_round_trip(overrides: dict, processor: Any, tmp_path: Path) -> None:
    model = toy_model(**overrides)
    folder = save_checkpoint(model, processor, tmp_path / "other")
    assert same(load_checkpoint(folder)[0], model)
    assert max(verify_checkpoint(folder).values()) <= 1e-5


def test_shards(model: UnimodalModel, processor: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(model, processor, tmp_path / "toy", max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    assert same(load_checkpoint(folder)[0], model)
    save_checkpoint(model, processor, folder)
    assert not list(folder.glob("model-*")) and not (folder / "model.safetensors.index.json").exists()
    assert same(load_checkpoint(folder)[0], model)


def test_saving_leaves_the_model_as_it_was(processor: Any, tmp_path: Path) -> None:
    model = toy_model().train()
    model.backbone.eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    save_checkpoint(model, processor, tmp_path / "toy")
    assert model.training and model.bridge.training and not model.backbone.vision.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_current_folder(saved: Path, model: UnimodalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    assert same(load_checkpoint(".")[0], model)


def test_dtype(saved: Path) -> None:
    model, _ = load_checkpoint(saved, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# Part of the heads.


def test_only_the_heads_asked_for(saved: Path, model: UnimodalModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "unimodal.hub"):
        part, _ = load_checkpoint(saved, heads=("embedding", "captioning"))
    assert list(part.heads) == ["image_embedding", "text_embedding", "captioning"]
    assert "left out as asked: matching, generation" in caplog.text
    whole = model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.state_dict().items())


def test_unknown_head_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match="no 'captions'; did you mean 'captioning'"):
        load_checkpoint(saved, heads=["captions"])


# What does not fit.


def test_mismatch_lists_every_name_and_loads_nothing(copy: Path) -> None:
    path = copy / "model.safetensors"
    weights = load_file(path)
    weights["bridge.extra"] = torch.zeros(2)
    weights["log_scale"] = torch.zeros(3)
    weights["backbone.vision.bn1.num_batches_tracked"] = torch.tensor(1.0)
    gone = [name for name in weights if name.startswith("heads.matching.")]
    save_file({name: tensor for name, tensor in weights.items() if name not in gone}, path)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(copy)
    error = caught.value
    assert [line.split(" ")[0] for line in error.missing] == sorted(gone)
    assert error.unexpected == ["bridge.extra [2]"]
    assert "log_scale: file [3] F32, model [] float32" in error.mismatched and len(error.mismatched) == 2
    assert all(line in str(error) for line in (*error.missing, *error.unexpected, *error.mismatched))
    assert f"{len(gone)} missing" in str(error) and "Take weights and config.json from the same checkpoint" in str(
        error
    )


def spoil_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def add_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "last.ckpt")


def disguise_pickle(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def config_edit(*keys: str, value: Any) -> Callable[[Path], None]:
    def change(values: dict) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return lambda folder: edit(folder / "config.json", change)


def index_to(name: str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"log_scale": name}})) and None
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ["has no config.json (it holds: README.md", "save_pretrained wrote"]),
        (spoil_json, ["config.json is not readable as JSON", "get the checkpoint again"]),
        (lambda f: (f / "config.json").write_text("[1]"), ["holds a JSON list, expected an object"]),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "instructblip"}'),
            ["a checkpoint of instructblip, expected one of unimodal", "load it with the library"],
        ),
        (config_edit("format", value=99), ["has format 99", "reads formats up to 3", "upgrade unimodal"]),
        (config_edit("modle", value=1), ["unknown key 'modle'; did you mean 'model'"]),
        (
            config_edit("model", "bridge", "widht", value=8),
            ["config.json.model.bridge: unknown key 'widht'", "'width'"],
        ),
        (config_edit("model", "bridge", "width", value="8"), ["config.json.model.bridge.width: expected int, got str"]),
        (config_edit("model", "bridge", "heads", value=5), ["describes a model that cannot be built"]),
        (
            config_edit("model", "backbone", "vision", "kwargs", value={"checkpoint_path": "/etc/x"}),
            ["model.backbone.vision.kwargs: checkpoint_path", "may not say how to load anything"],
        ),
        (
            config_edit("model", "backbone", "text", "kwargs", "attn_implementation", value="someone/kernel"),
            ["model.backbone.text.kwargs: attn_implementation", "unless you know who wrote it"],
        ),
        (
            config_edit("model", "backbone", "text", "name", value="brt"),
            ["'brt' is no transformers model type", "did you mean 'bert'"],
        ),
        (config_edit("model", "backbone", "vision", "name", value="os.system"), ["'os.system' is not a timm arch"]),
        (
            lambda f: edit(
                f / "tokenizer_config.json", lambda v: v.update(auto_map={"AutoTokenizer": ["evil.T", None]})
            ),
            ["tokenizer_config.json names code to run", "evil.T", "unless you know who wrote it"],
        ),
        (add_pickle, ["pytorch_model.bin: pickles, which can run code", "Expected model.safetensors", "convert"]),
        (only_pickle, ["last.ckpt: pickles, which can run code"]),
        (disguise_pickle, ["model.safetensors", "is corrupt or cut short", "get the file again"]),
        (cut_short, ["model.safetensors", "is corrupt or cut short", "get the file again"]),
        (empty, ["model.safetensors (0 bytes) is corrupt or cut short"]),
        (lambda f: (f / "model.safetensors").unlink(), ["lacks model.safetensors", "get it again"]),
        (index_to("../model-00001-of-00001.safetensors"), ["points to '../model-00001-of-00001.safetensors'"]),
        (index_to("/tmp/model.safetensors"), ["points to '/tmp/model.safetensors'", "in the same folder"]),
        (index_to("pytorch_model.bin"), ["points to 'pytorch_model.bin'"]),
        (index_to("model-00001-of-00001.safetensors"), ["lacks model-00001-of-00001.safetensors"]),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["has no weight_map"]),
    ],
)
def test_spoilt_folders_are_refused_in_words(copy: Path, spoil: Callable[[Path], Any], words: list[str]) -> None:
    spoil(copy)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_states_of_other_trainers_beside_the_weights_are_left_alone(copy: Path, model: UnimodalModel) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (copy / name).write_bytes(b"\x80\x04")
    loaded, _ = load_checkpoint(copy)
    assert torch.equal(loaded.log_scale, model.log_scale)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model.safetensors"):
        load_checkpoint(copy)


def test_weights_file_instead_of_folder(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file, expected a checkpoint folder or a Hub id"):
        load_checkpoint(saved / "model.safetensors")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder here, and not from the Hub or its cache"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="Give the path of a folder or a Hub id like owner/name"):
        load_checkpoint("tester/nothing")


# Replay.


def test_replay_notices_other_weights(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["bridge.query_sets.image"].normal_()
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not compute what it did when it was saved: .*image_embedding by"):
        verify_checkpoint(copy)


def test_replay_needs_an_example(model: UnimodalModel, processor: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(model, processor, tmp_path / "toy", example=False)
    with pytest.raises(CheckpointError, match="no example.safetensors to replay; save it with example=True"):
        verify_checkpoint(folder)


def test_replay_covers_every_head(saved: Path) -> None:
    assert verify_checkpoint(saved).keys() == {"image_embedding", "text_embedding", "match", "caption", "velocity"}


# The old checkpoint survives.


@pytest.mark.parametrize("step", ["tokenizer", "card", "flush", "swap", "example"])
def test_full_disk_leaves_the_old_one(step: str, copy: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(copy)
    if step == "swap":  # the old folder is already moved away when the new one should come
        rename = os.rename
        moves = iter((rename, full))
        monkeypatch.setattr(os, "rename", lambda source, target: next(moves, rename)(source, target))
    else:
        place = {
            "tokenizer": (type(processor), "save_pretrained"),
            "card": (unimodal.hub.checkpoint, "render_card"),
            "example": (unimodal.hub.checkpoint, "save_file"),
            "flush": (os, "fsync"),
        }[step]
        monkeypatch.setattr(*place, full)
    with pytest.raises(
        OSError, match="could not be written to .*No space left.* what was there before is intact. Make"
    ):
        save_checkpoint(toy_model(seed=1), processor, copy)
    monkeypatch.undo()
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["toy"]


def test_disk_that_takes_no_more_bytes(copy: Path, processor: Any) -> None:
    """The real thing: the system refuses to let the weights file grow."""
    before = contents(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written to .*what was there before is intact"):
            save_checkpoint(toy_model(seed=1), processor, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["toy"]


@pytest.mark.parametrize("renames", range(6))
def test_kill_at_any_rename(renames: int, tmp_path: Path) -> None:
    """A process that dies after so many renames leaves the old checkpoint or the new one, and other files anyway."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, text in {"config.json": "old", "model.safetensors": "old", "notes.md": "mine"}.items():
        (folder / name).write_text(text)
    child = os.fork()
    if child == 0:
        rename, done = os.rename, iter(range(renames))
        os.rename = lambda source, to: rename(source, to) if next(done, None) is not None else os._exit(9)  # type: ignore
        with replacing(folder, lambda _: True) as fresh:
            for name in ("config.json", "model.safetensors"):
                (fresh / name).write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if renames < 5 else 0)

    unimodal.hub.folder.restore(folder)  # what every load does first
    texts = {name: (folder / name).read_text() for name in ("config.json", "model.safetensors")}
    assert set(texts.values()) == {"old" if renames < 3 else "new"}

    with replacing(folder, lambda _: True) as fresh:
        (fresh / "config.json").write_text("newer")
    assert contents(folder) == {"config.json": b"newer", "notes.md": b"mine"}
    assert list(tmp_path.iterdir()) == [folder]


def test_other_files_in_the_folder_stay(copy: Path, model: UnimodalModel, processor: Any) -> None:
    (copy / "report.json").write_text("{}")
    (copy / "stage").mkdir()
    (copy / "stage" / "last.ckpt").write_bytes(b"resume")
    save_checkpoint(model, processor, copy)
    assert (copy / "report.json").read_text() == "{}" and (copy / "stage" / "last.ckpt").read_bytes() == b"resume"
    assert same(load_checkpoint(copy)[0], model)


def test_files_of_others_are_not_overwritten(tmp_path: Path, model: UnimodalModel, processor: Any) -> None:
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(FileExistsError, match="a folder with README.md that unimodal did not write.*another folder"):
        save_checkpoint(model, processor, tmp_path)
    with pytest.raises(FileExistsError, match="README.md is a file"):
        save_checkpoint(model, processor, tmp_path / "README.md")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# Without the backbone.


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Local sources of both towers."""
    vision, text = tmp_path / "sources" / "vision.safetensors", tmp_path / "sources" / "text"
    toy_model(seed=3).backbone.text.save_pretrained(text)
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), vision)
    return {"vision": str(vision), "text": str(text)}


@pytest.fixture
def sourced(sources: dict[str, str]) -> UnimodalModel:
    """A model that starts from these sources; the text tower's configuration comes from there, too."""
    backbone = to_dict(toy_config().backbone)
    backbone["vision"]["source"] = sources["vision"]
    backbone["text"] |= {"source": sources["text"], "kwargs": {}}
    return UnimodalModel(toy_config(backbone=backbone), pretrained=True).eval()


def test_without_backbone(sourced: UnimodalModel, sources: dict[str, str], processor: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(sourced, processor, tmp_path / "toy", include_backbone=False)
    stored = load_file(folder / "model.safetensors")
    assert not [name for name in stored if name.startswith(("backbone.vision.", "backbone.text."))]
    assert "backbone.text_projection.1.weight" in stored
    for text in ((folder / "config.json").read_text(), (folder / "README.md").read_text()):
        assert sourced.backbone.sources["vision"]["sha256"] in text and "vision.safetensors" in text
        assert str(tmp_path) not in text  # a path of this machine means nothing elsewhere
    with pytest.raises(
        CheckpointError, match="no vision tower; it was the local 'vision.safetensors'.*backbone_sources="
    ):
        load_checkpoint(folder)
    assert same(load_checkpoint(folder, backbone_sources=sources)[0], sourced)
    assert max(verify_checkpoint(folder, backbone_sources=sources).values()) <= 1e-5


def test_other_towers_are_refused(
    sourced: UnimodalModel, sources: dict[str, str], processor: Any, tmp_path: Path
) -> None:
    folder = save_checkpoint(sourced, processor, tmp_path / "toy", include_backbone=False)
    weights = load_file(sources["vision"])
    weights["conv1.0.weight"] += 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="trained on the vision tower of vision.safetensors with sha256 .*, but"):
        load_checkpoint(folder, backbone_sources=sources | {"vision": str(tmp_path / "other.safetensors")})
    with pytest.raises(CheckpointError, match="text tower at nowhere: no such file or folder"):
        load_checkpoint(folder, backbone_sources=sources | {"text": "nowhere"})


def test_towers_that_could_not_be_got_back_are_not_left_out(
    sourced: UnimodalModel, model: UnimodalModel, processor: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the vision tower was not loaded from a source.*include_backbone=True"):
        save_checkpoint(model, processor, tmp_path / "toy", include_backbone=False)
    with torch.no_grad():
        sourced.backbone.text.embeddings.word_embeddings.weight[5, 0] += 1
    with pytest.raises(ValueError, match="the text tower was trained, 1 of its .*include_backbone=True"):
        save_checkpoint(sourced, processor, tmp_path / "toy", include_backbone=False)
    assert not (tmp_path / "toy").exists()


def test_with_backbone_the_sources_are_not_needed(sourced: UnimodalModel, processor: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(sourced, processor, tmp_path / "toy")
    shutil.rmtree(tmp_path / "sources")
    loaded, reader = load_checkpoint(folder)
    assert same(loaded, sourced)
    save_checkpoint(loaded, reader, tmp_path / "again")
    first, again = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again"))
    assert first["model"] == again["model"] and first["files"].keys() == again["files"].keys()
    assert first["backbone"] == again["backbone"] and first["backbone"]["sources"]["vision"]["local"]


# The Hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fakehub.FakeHub]:
    with fakehub.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_fake")
        yield server


def test_push_and_pull(copy: Path, model: UnimodalModel, hub: fakehub.FakeHub, tmp_path: Path) -> None:
    (copy / "report.json").write_text("private")
    (copy / "optimizer.safetensors").write_bytes(b"private")
    commit = push_to_hub(copy, "tester/toy", private=True)
    repository = hub.repositories["tester/toy"]
    assert repository.private
    pushed = {name: content for name, content in repository.branches["main"].items() if name != ".gitattributes"}
    assert pushed == {k: v for k, v in contents(copy).items() if k not in ("report.json", "optimizer.safetensors")}

    hub.repositories["tester/toy"].branches["main"]["evil.py"] = b"raise SystemExit"
    hub.repositories["tester/toy"].branches["main"]["pytorch_model.bin"] = b"pickle"
    cache = tmp_path / "cache"
    loaded, _ = load_checkpoint("tester/toy", cache_dir=cache)
    assert same(loaded, model)
    assert not [path for path in cache.rglob("*") if path.name in ("evil.py", "pytorch_model.bin")]

    # From here on nothing may reach the server: the cache serves a branch when told so, and a known commit always.
    load_checkpoint("tester/toy", cache_dir=cache, revision=commit.oid)
    hub.log.clear()
    assert same(load_checkpoint("tester/toy", cache_dir=cache, local_files_only=True)[0], model)
    assert same(load_checkpoint("tester/toy", cache_dir=cache, revision=commit.oid)[0], model)
    assert same(load_checkpoint(copy)[0], model)
    assert hub.log == []


def test_push_replaces_shards(model: UnimodalModel, processor: Any, hub: fakehub.FakeHub, tmp_path: Path) -> None:
    push_to_hub(save_checkpoint(model, processor, tmp_path / "a", max_shard_size="200KB"), "tester/toy")
    assert "model.safetensors.index.json" in hub.repositories["tester/toy"].branches["main"]
    push_to_hub(save_checkpoint(model, processor, tmp_path / "b"), "tester/toy")
    weights = {name for name in hub.repositories["tester/toy"].branches["main"] if name.startswith("model")}
    assert weights == {"model.safetensors"}


def test_push_to_a_branch_and_as_pull_request(saved: Path, hub: fakehub.FakeHub, tmp_path: Path) -> None:
    push_to_hub(saved, "tester/toy", revision="v1", commit_message="First")
    repository = hub.repositories["tester/toy"]
    assert "config.json" in repository.branches["v1"] and "config.json" not in repository.branches["main"]
    assert load_checkpoint("tester/toy", revision="v1", cache_dir=tmp_path)[0]
    assert push_to_hub(saved, "tester/toy", create_pr=True).pr_url
    assert "config.json" not in repository.branches["main"]


def test_what_is_not_on_the_hub(hub: fakehub.FakeHub, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tester/none: no such folder here, and not from the Hub.*Repository"):
        load_checkpoint("tester/none", cache_dir=tmp_path)
    push_to_hub(saved, "tester/toy")
    with pytest.raises(FileNotFoundError, match="not from the Hub or its cache .Revision"):
        load_checkpoint("tester/toy", revision="v9", cache_dir=tmp_path)
    del hub.repositories["tester/toy"].branches["main"]["model.safetensors"]
    with pytest.raises(CheckpointError, match="lacks model.safetensors"):
        load_checkpoint("tester/toy", cache_dir=tmp_path)


def test_push_refuses_what_would_not_load(copy: Path, hub: fakehub.FakeHub) -> None:
    cut_short(copy)
    with pytest.raises(CheckpointError, match="corrupt or cut short"):
        push_to_hub(copy, "tester/toy")
    assert hub.repositories == {}


# In fewer bits.


@pytest.mark.parametrize(("precision", "size", "step"), [("half", 0.56, 2**-11), ("int8", 0.35, 1 / 254)])
def test_weights_in_fewer_bits(
    precision: Any, size: float, step: float, model: UnimodalModel, processor: Any, saved: Path, tmp_path: Path
) -> None:
    """Matrices come back to half a step, vectors exactly, and the example is that of the model as it comes back."""
    folder = save_checkpoint(model, processor, tmp_path / precision, precision=precision)
    again, _ = load_checkpoint(folder)
    for name, weight in model.state_dict().items():
        found = again.state_dict()[name]
        if weight.ndim < 2:
            assert torch.equal(found, weight), name
        else:
            largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
            assert bool(((found - weight).abs() <= largest * step * 1.001).all()), name
            assert not torch.equal(found, weight) or not weight.any(), name
    assert (folder / "model.safetensors").stat().st_size < size * (saved / "model.safetensors").stat().st_size
    assert set(verify_checkpoint(folder).values()) == {0.0}
    torch.testing.assert_close(
        round_weights(toy_model(), precision).state_dict(), again.state_dict(), rtol=0, atol=0, equal_nan=True
    )
    twice = save_checkpoint(again, processor, tmp_path / "again", precision=precision)
    assert torch.equal(load_checkpoint(twice)[0].log_scale, again.log_scale)
    name = "bridge.layers.0.attention.query.weight"
    assert torch.equal(load_checkpoint(twice)[0].state_dict()[name], again.state_dict()[name])


def test_int8_without_its_scales_is_refused(model: UnimodalModel, processor: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(model, processor, tmp_path / "int8", precision="int8")
    weights = load_file(folder / "model.safetensors")
    del weights["bridge.query_sets.image.int8_scale"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        CheckpointMismatch, match=r"bridge.query_sets.image: file \[4, 32\] I8, model \[4, 32\] float32"
    ):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="expected one of float32, half, int8, got 'int4'"):
        save_checkpoint(model, processor, tmp_path / "int4", precision="int4")  # type: ignore[arg-type]
