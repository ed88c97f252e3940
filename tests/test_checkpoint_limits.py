"""What a checkpoint's numbers may not be: configurations that would fill the memory, weights and settings that are none, files that this
user may not read, and vectors that are not of length 1."""

import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_published import saved as save_pair
from toy import toy_config, toy_model, toy_processor
from transformers import initialization

import unimodal
from unimodal.config import to_dict
from unimodal.data.items import as_items
from unimodal.hub import CheckpointError, load_checkpoint, save_checkpoint
from unimodal.hub.building import RANDOM, _Without, few_parts
from unimodal.hub.folder import read_whole, replacing
from unimodal.search import Encoder

PICTURE = Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(toy_model(), toy_processor(), tmp_path_factory.mktemp("saved") / "toy", example=False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "clip"
    save_pair("clip", folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "toy"))


def spoil(path: Path, keys: str, value: Any) -> None:
    values = content = json.loads(path.read_text())
    *parents, last = keys.split(".")
    for key in parents:
        values = values[key]
    values[last] = value
    path.write_text(json.dumps(content))


NUMBERS = [10**9, 10**30, -1, 0, 1e9, math.nan, math.inf, True, "12", None, [2] * 1000]
PLACES = [
    "bridge.layers",
    "bridge.width",
    "bridge.heads",
    "bridge.positions",
    "bridge.queries.image",
    "backbone.width",
    "backbone.vision.image_size",
    "backbone.text.kwargs.num_hidden_layers",
    "backbone.text.kwargs.hidden_size",
    "backbone.text.kwargs.vocab_size",
    "backbone.text.kwargs.max_position_embeddings",
    "embedding.dim",
    "matching.layers",
    "captioning.hidden",
    "generation.size",
    "generation.transformer_kwargs.num_layers",
    "generation.transformer_kwargs.attention_head_dim",
]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_of_another_size_is_refused_without_memory(place: str, copy: Path) -> None:
    original = (copy / "config.json").read_text()
    before = peak()
    for value in NUMBERS:
        (copy / "config.json").write_text(original)
        spoil(copy / "config.json", f"model.{place}", value)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(copy)
        assert str(copy) in str(caught.value)
    assert peak() - before < 200_000  # kilobytes


@pytest.mark.parametrize(
    "place",
    [
        "text_config.num_hidden_layers",
        "text_config.hidden_size",
        "text_config.vocab_size",
        "vision_config.num_hidden_layers",
        "vision_config.image_size",
        "vision_config.intermediate_size",
        "projection_dim",
    ],
)
def test_a_published_configuration_of_another_size_is_refused_without_memory(
    place: str, clip: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    original, before = (folder / "config.json").read_text(), peak()
    for value in (10**9, 10**30, -1, 1, math.nan, "many"):
        (folder / "config.json").write_text(original)
        spoil(folder / "config.json", place, value)
        with pytest.raises(CheckpointError, match="clip"):
            load_checkpoint(folder)
    assert peak() - before < 200_000


def test_many_entries_and_deep_nesting_are_refused(copy: Path) -> None:
    original = (copy / "config.json").read_text()
    for place, value in (
        ("adapters", {f"a{i}": {} for i in range(200_000)}),
        ("backbone.text.kwargs.architectures", list(range(200_000))),
    ):
        spoil(copy / "config.json", f"model.{place}", value)
        with pytest.raises(CheckpointError, match="config.json"):
            load_checkpoint(copy)
        (copy / "config.json").write_text(original)
    (copy / "config.json").write_text('{"library": ' * 5000 + "1" + "}" * 5000)
    with pytest.raises(CheckpointError, match="config.json is not readable as JSON"):
        load_checkpoint(copy)


def test_a_header_that_lies_is_refused(copy: Path) -> None:
    header = json.dumps({"log_scale": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for length in (2**60, len(header)):
        (copy / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError, match="model.safetensors .* is corrupt or cut short"):
            load_checkpoint(copy)


def test_building_stops_at_too_many_parts() -> None:
    with pytest.raises(ValueError, match="many times the parts of a model of 1 tensors"), few_parts(1):
        torch.nn.ModuleList(torch.nn.Linear(1, 1, device="meta") for _ in range(100_000))


# Numbers that are none.


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, precision: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(toy_model(), toy_processor(), tmp_path / "toy", example=False, precision=precision)
    weights = load_file(folder / "model.safetensors")
    name = "bridge.query_sets.image" + (".int8_scale" if precision == "int8" else "")
    weights[name].flatten()[3] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"not finite \(NaN or infinite\): {name}"):
        load_checkpoint(folder)


def test_published_weights_that_are_not_finite_are_refused_by_name(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not finite .*text_projection.weight"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("std", [0.5, 0, 0.5]),
        ("std", [0.5, -1, 0.5]),
        ("std", [0.5]),
        ("mean", [math.nan, 0, 0]),
        ("mean", ["a", "b", "c"]),
        ("image_size", 0),
        ("image_size", -32),
        ("image_size", 10**6),
        ("image_size", True),
        ("max_length", 10**9),
        ("max_length", 1.5),
    ],
)
def test_preprocessing_that_makes_no_numbers_is_refused(key: str, value: Any, copy: Path) -> None:
    spoil(copy / "config.json", "files", {})  # as former versions saved it
    spoil(copy / "preprocessor_config.json", key, value)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json is incomplete or damaged: .*{key}"):
        load_checkpoint(copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["toy", "clip"])
def test_vectors_are_of_length_one_in_every_precision(kind: str, dtype: Any, saved: Path, clip: Path) -> None:
    model = unimodal.from_pretrained({"toy": saved, "clip": clip}[kind], dtype=dtype)
    for found in (model.encode([PICTURE]), model.encode(["a red circle", "x"])):
        assert np.abs(np.linalg.norm(found.astype(np.float64), axis=-1) - 1).max() < 1e-6


def test_an_item_of_which_no_numbers_are_made_is_named(saved: Path) -> None:
    model, processor = load_checkpoint(saved)
    encoder = Encoder(model, processor)
    with torch.no_grad():
        model.backbone.text.embeddings.word_embeddings.weight[processor.texts(["blue"])[0][0, 1]] = math.nan
    assert encoder.read(as_items(["red", "circle"])).embedding.isfinite().all()
    with pytest.raises(ValueError, match="item 7: the model's embedding is not finite"):
        encoder.read(as_items(["red", "a blue circle"]), where=["item 6: ", "item 7: "])


# Files and folders of the system.


def test_the_system_is_quoted_where_it_keeps_a_file_back(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open
    for name in sorted(path.name for path in copy.iterdir() if path.suffix in (".json", ".safetensors")):

        def refuse(path: Any, *rest: Any, **options: Any) -> Any:
            if Path(path).name == name:  # noqa: B023
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *rest, **options)

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(
            PermissionError, match=r"this user may not read the file \(mode 0\d+, owner \d+\)"
        ) as caught:
            load_checkpoint(copy)
        monkeypatch.undo()
        assert name in str(caught.value) and "corrupt" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file_is_told(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="model.safetensors"):
        load_checkpoint(copy)


def test_everything_written_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        unimodal.Unimodal(toy_model(), toy_processor()).save_pretrained(tmp_path / "toy")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "toy").iterdir() if path.is_file()}
    assert {name: mode for name, mode in modes.items() if mode != 0o640} == {}


def test_the_working_folder_is_saved_to_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    (tmp_path / "notes.md").write_text("mine")
    for _ in range(2):
        unimodal.Unimodal(toy_model(), toy_processor()).save_pretrained(".")
    assert tmp_path.stat().st_ino == inode == Path.cwd().stat().st_ino
    assert (tmp_path / "notes.md").read_text() == "mine" and unimodal.from_pretrained(".").heads


def test_a_save_that_former_versions_left_half_done_is_restored(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / ".toy.old")
    assert load_checkpoint(tmp_path / "toy")[0].config == toy_config()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_reader_never_meets_a_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "toy"

    def save(text: str) -> None:
        with replacing(folder, lambda _: True) as fresh:
            for name in ("config.json", "tokenizer.json"):
                (fresh / name).write_text(text)

    save("old")
    saves: list[Callable[[], None]] = [lambda: save("new")]

    def read() -> tuple[str, str]:
        config = (folder / "config.json").read_text()
        if saves:
            saves.pop()()  # another process saves between the two files
        return config, (folder / "tokenizer.json").read_text()

    assert read_whole(folder, read) == ("new", "new")


def test_prompts_are_kept(tmp_path: Path) -> None:
    model = unimodal.Unimodal(toy_model(generation=None), toy_processor(), prompts={"query": "find: "})
    model.save_pretrained(tmp_path / "toy")
    again = unimodal.from_pretrained(tmp_path / "toy")
    assert again.prompts == {"query": "find: "}
    assert np.array_equal(again.encode_query("a red circle"), model.encode_query("a red circle"))
    assert to_dict(again.model.config) == to_dict(model.model.config)


def test_building_without_random_numbers_ends_whatever_lay_in_memory() -> None:
    weight = torch.nn.Parameter(torch.full((100,), 1e30))
    with _Without(RANDOM):
        initialization.trunc_normal_(weight, std=0.02)  # it draws until all lie within its bounds
    assert weight.abs().max() <= 2
