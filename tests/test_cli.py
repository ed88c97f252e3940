"""The command line: what a user can get wrong is a short message and a status, never a traceback; what is right works."""

import base64
import json
from pathlib import Path
from typing import Any

import fakehub
import numpy as np
import pytest
import yaml
from PIL import Image
from toy import toy_config, toy_model, toy_processor

from unimodal import cli
from unimodal.cli import verbs
from unimodal.config import to_dict
from unimodal.data.scenes import Scenes
from unimodal.hub import save_checkpoint


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `unimodal ...`."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as their longest path."""
    monkeypatch.setenv("COLUMNS", "400")


# Configurations.


def plain() -> dict[str, Any]:
    model = {"config": to_dict(toy_config()), "objectives": {"itc": {"class_path": "unimodal.tasks.ITC"}}}
    train = {"class_path": "unimodal.data.Scenes", "init_args": {"split": "train", "count": 8}}
    return {
        "model": {"class_path": "unimodal.tasks.Joint", "init_args": model},
        "data": {"train": train, "batch_size": 8},
        "trainer": {"max_steps": 1},
    }


def schedule() -> dict[str, Any]:
    return {**plain(), "output": "never", "stages": {"first": {"trainer": {"max_steps": 1}}, "second": {}}}


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("place", "value", "messages"),
    [
        (("model", "class_path"), "unimodal.tasks.Joynt", ["unimodal.tasks.Joynt", "did you mean 'Joint'?"]),
        (
            ("model", "init_args", "config", "bridge", "layerz"),
            3,
            ["config.bridge", "'layerz'", "did you mean 'layers'?"],
        ),
        (("data", "batch_size"), "many", ["data.batch_size", "Expected a <class 'int'>. Got value: many"]),
        (("data", "batch_sise"), 3, ["'data.batch_sise'", "did you mean 'batch_size'?"]),
        (("dat",), 3, ["'dat'", "did you mean 'data'?"]),
    ],
)
def test_wrong_settings(place, value, messages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = plain()
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    status, _, error = run(capsys, "fit", "--config", write(tmp_path, content))
    assert status == 2
    assert error.startswith("unimodal fit: ") and len(error.splitlines()) < 8, error
    assert all(message in error for message in messages), error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--stages.second.trainer.max_stepz=3", "stage 'second': Group 'trainer' does not accept option 'max_stepz'"),
        (
            "--stages.second.trainerr.max_steps=3",
            "schedule stage 'second': unknown key 'trainerr'; did you mean 'trainer'?",
        ),
        ("--stagess.second=3", "schedule: unknown key 'stagess'; did you mean 'stages'?"),
        (
            "--card.limit=none",
            "schedule: card: unknown key 'limit'; did you mean 'limits'?",
        ),
        (
            "--aims.t2i_r1_frist=0.9",
            "schedule: aims at an unknown measure 't2i_r1_frist'; did you mean 't2i_r1_first'?",
        ),
        (
            "--stages.second=3",
            "schedule stage 'second': expected a mapping of about, model, data, trainer, mine, merge, got 3",
        ),
        (
            "--ckpt_path=out/resume.ckpt",
            "goes on where it stopped by itself, so it takes no ckpt_path; give the same command again",
        ),
        ("word", "unexpected argument 'word'; overrides read --key.key value"),
    ],
)
def test_a_wrong_last_stage_is_found_before_the_first_trains(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, "fit", "--config", write(tmp_path, schedule()), override)
    assert status == 2 and message in error, error
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("name", ["report.json", "index.html", "model"])
def test_a_folder_of_the_users_is_refused_before_the_first_stage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "never").mkdir()
    (tmp_path / "never" / name).write_text("the user's")
    status, _, error = run(capsys, "fit", "--config", write(tmp_path, schedule()))
    assert status == 2 and f"schedule: output: never holds {name}; give another folder" in error, error
    assert [path.name for path in (tmp_path / "never").iterdir()] == [name]


def test_print_config_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.yaml").write_text("stages: {second: {about: later}}\ntitle: t")
    files = ["--config", write(tmp_path, schedule()), f"--config={tmp_path / 'more.yaml'}"]
    status, output, _ = run(capsys, "fit", *files, "--stages.first.trainer.max_steps", "7", "--print_config")
    printed = yaml.safe_load(output)
    assert status == 0
    assert printed["stages"] == {"first": {"trainer": {"max_steps": 7}}, "second": {"about": "later"}}
    assert printed["model"]["class_path"] == "unimodal.tasks.Joint" and printed["title"] == "t"


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_missing_config_file(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, verb, "--config", "nothing.yaml")
    assert status == 2 and "nothing.yaml" in error and len(error.splitlines()) < 3


@pytest.mark.parametrize(
    ("option", "advice"), [("--trainer", "a fragment, for example configs/trainer/ddp.yaml"), ("--data", "a fragment")]
)
def test_missing_fragment(option: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, "fit", "--config", write(tmp_path, schedule()), option, "nothing.yaml")
    message = f"{option} nothing.yaml: no such file; give the path of a recipe or {advice}"
    assert status == 2 and error.strip().endswith(message), error


def test_a_file_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    status, _, error = run(capsys, "fit", "--config", tmp_path / "bad.yaml")
    assert status == 2 and "bad.yaml: not readable as YAML" in error


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, "serch")
    assert status == 2 and "unknown verb 'serch'; did you mean 'search'?" in error
    status, output, _ = run(capsys, "--help")
    assert status == 0 and all(verb in output for verb in cli.VERBS)


# Verbs that use a model.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(toy_model(), toy_processor(), tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures, one of them in a folder of its own, and one file that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    scenes = Scenes("val", count=3)
    for i, name in enumerate(("a.png", "b.png", "more/c.png")):
        scenes.image(i).save(folder / name)
    (folder / "bad.jpg").write_text("no picture")
    return folder


def test_search_keeps_its_index(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("search", photos, "a red circle", "--model", model, "--index", photos.parent / "index")
    status, first, error = run(capsys, *ask)
    assert status == 0
    assert all(word in first for word in ("cosine", "match", "a.png", "b.png", "more/c.png")) and "bad" not in first
    assert "skipped: " in error and "bad.jpg" in error and "1 of 4 pictures skipped" in error
    status, again, error = run(capsys, *ask)
    assert (
        again.splitlines()[:-1] == first.splitlines()[:-1]
        and "1 of 4 pictures skipped" in error
        and "reading" not in error
    )
    (photos / "b.png").unlink()
    (photos / "bad.jpg").unlink()
    status, third, error = run(capsys, *ask)
    assert status == 0 and "b.png" not in third
    assert "read what is new or has changed (0), forgot what is gone or has changed (2)" in error
    status, by_image, _ = run(capsys, "search", photos, photos / "a.png", "--model", model, "--top_k", 1)
    assert status == 0 and "1.000" in by_image and "more" not in by_image


def test_rank_and_caption(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, error = run(capsys, "rank", "a red circle", photos, "--model", model, "--top_k", 2)
    assert status == 0 and len([line for line in output.splitlines() if ".png" in line]) == 2
    assert "1 of 4 pictures skipped" in error
    status, output, error = run(capsys, "caption", photos, "--model", model, "--num_beams", 1)
    assert status == 0 and [line.partition(":")[0] for line in output.splitlines()] == [
        str(photos / name) for name in ("a.png", "b.png", "more/c.png")
    ]
    assert "1 of 4 pictures skipped" in error


def test_pictures_are_named_in_every_form_and_what_a_folder_leaves_out_is_said(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "raw.NEF").write_bytes(b"x")
    (photos / "again").symlink_to(photos)
    url = "data:image/png;base64," + base64.b64encode((photos / "a.png").read_bytes()).decode()
    status, output, error = run(capsys, "rank", "a red circle", photos, url, f"{photos}/a.png\n", "--model", model)
    assert status == 0 and "'data:image/png;base64," in output and url[60:] not in output
    assert "not read: 1 .nef; convert these to JPEG; not followed: 'again', linked to" in error
    status, output, error = run(capsys, "caption", (photos / "b.png").as_uri(), "--model", model, "--num_beams", 1)
    assert status == 0 and output.startswith(f"{photos / 'b.png'}:")
    for query, message in (
        ("photo.HEIC", "there is no image file 'photo.HEIC'"),
        ("/photos/IMG_1", "is a path without"),
    ):
        status, _, error = run(capsys, "rank", query, photos, "--model", model)
        assert status == 1 and message in error


def test_embed_names_its_rows(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "vectors.npy"
    status, output, _ = run(capsys, "embed", photos, "a red circle", "--model", model, "--out", out)
    names = [str(photos / name) for name in ("a.png", "b.png", "more/c.png")] + ["a red circle"]
    assert status == 0 and np.load(out).shape == (4, 16) and "[4, 16] float32" in output
    assert json.loads(out.with_suffix(".json").read_text()) == names


def test_generate_repeats_by_seed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    for seed in (1, 1, 2):
        options = (
            "--model",
            model,
            "--out",
            tmp_path / "x.png",
            "--seed",
            seed,
            "--num_inference_steps",
            2,
            "--overwrite",
        )
        assert run(capsys, "generate", "a star", *options)[0] == 0
        drawn.append(Image.open(tmp_path / "x.png").tobytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_doctor_asks_the_hub(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with fakehub.running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        status, output, _ = run(capsys, "doctor", "--hub")
        assert status == 0 and "answers" in output
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # nobody listens there any more
    status, output, _ = run(capsys, "doctor", "--hub")
    assert status == 1 and "does not" in output


def test_doctor_replays(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = run(capsys, "doctor", "--model", model)
    assert status == 0 and "torch" in output and "memory" in output and "replays" in output
    status, output, _ = run(capsys, "doctor", "--model", model.parent)
    assert status == 1 and "does not" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "nowhere", "x"), "nowhere: no such folder; give the folder that holds the pictures"),
        (("search", ".", "x"), ". holds no pictures; expected files that end in .jpg"),
        (("caption", "gone.png", "--model", "M"), "none of the 1 inputs can be read"),
        (("rank", "a red circle", "a blue square", "--model", "M"), "the matching head judges one image and one text"),
        (
            ("embed", "x", "--out", "x.npy"),
            "no model in checkpoints/unimodal-small, which ships with the repository; start in a clone of it, or give --model",
        ),
        (("generate", "x", "--model", "no/where"), "no/where: no such folder here"),
        (("generate", " ", "--model", "M"), "empty"),
        (("push", "nowhere", "me/mine"), "nowhere: no such folder; give a checkpoint"),
        (("push", ".", "me/mine"), "has no config.json"),
    ],
)
def test_bad_input_is_one_line(
    arguments, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unimodal.recipes.PACKAGE", tmp_path / "unimodal")
    status, output, error = run(capsys, *(model if word == "M" else word for word in arguments))
    last = error.splitlines()[-1]
    assert (status, output) == (1, "") and last.startswith(f"unimodal {arguments[0]}: ") and message in last, error


def test_every_verb_is_parsed() -> None:
    known = verbs.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    one_word = {verb.split()[0] for verb in known}  # `search tune` is a verb of two
    assert one_word == {verb for verb, (module, *_) in cli.VERBS.items() if module == "verbs"}
