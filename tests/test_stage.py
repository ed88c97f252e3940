"""What a stage of a schedule keeps: its weights before anything else can fail, its scores to be measured again, and its settings, among
which a recipe may be mended where they decide nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toyrun import STEPS, plain, scenes, tiny_stage, write_recipe

from unimodal import cli
from unimodal.hub import load_checkpoint

NAMES = ("red circle", "blue square", "green star")


def pictures(folder: Path, split: str, count: int) -> dict[str, Any]:
    """Pictures of one colour with captions, in Karpathy's format; returns their reader's settings."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        name = f"{split}{i}.png"
        Image.fromarray(np.full((32, 32, 3), 50 * i % 256, np.uint8)).save(folder / "images" / name)
        rows.append({"filename": name, "split": split, "sentences": [{"raw": f"a {NAMES[i % 3]} {'here ' * i}"}]})
    (folder / f"{split}.json").write_text(json.dumps({"dataset": "mine", "images": rows}))
    return {
        "class_path": "unimodal.data.KarpathyJson",
        "init_args": {"path": str(folder / f"{split}.json"), "split": split},
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains a schedule that a function changes first."""

    def trained(change: Callable[[dict[str, Any]], Any] = lambda recipe: None, *words: str) -> int:
        recipe = tiny_stage(tmp_path / "out", {"val": pictures(tmp_path / "data", "val", 4)}, max_steps=2)
        change(recipe)
        return cli.main([*write_recipe(tmp_path / "recipe.yaml", recipe), *words])

    return trained


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimodal.tasks.Task.training_step", lambda *_: pytest.fail("a step was trained"))


def stage(tmp_path: Path, name: str = "align") -> Path:
    return tmp_path / "out" / name


# Data that is not there.


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_missing_picture_of_any_stage_is_told_before_the_first_trains(
    split: str, tmp_path: Path, run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)

    def change(recipe: dict[str, Any]) -> None:
        reader = pictures(tmp_path / "more", split, 8)
        (tmp_path / f"more/images/{split}3.png").unlink()
        recipe["stages"]["last"] = {"data": {split: reader}}

    assert run(change) == 2
    error = capsys.readouterr().err
    assert f"stage 'last': 1 of 8 files of mine {split} are not there: " in error and f"{split}3.png" in error
    assert "Traceback" not in error and not stage(tmp_path).exists()


def test_a_plain_run_looks_for_its_files_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)
    recipe = tiny_stage(tmp_path, {"val": pictures(tmp_path / "data", "val", 4)})
    recipe = {key: recipe[key] for key in ("model", "data", "trainer")}
    recipe["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "data/images/val2.png").unlink()
    assert cli.main(write_recipe(tmp_path / "plain.yaml", recipe)) == 1
    error = capsys.readouterr().err
    assert "1 of 4 files of mine val are not there" in error and "Traceback" not in error
    told = Path(error.split("the traceback is in ")[1].strip())
    assert told.parent == tmp_path / "run" and "FileNotFoundError" in told.read_text()


BAD_TABLES = {
    "image,caption\nval0.png,nan\n": "caption 0 is 'nan', which stands for a missing one; give it words",
    "image,caption\nval0.png,\n": "caption 0 is empty; give it words",
    "image,caption\nval0.png,a dog, big\n": "3 values separated by ',' for the 2 columns",
    "image,caption\nval0.png,a dog\nval9.png,a cat\n": "1 of 2 files of table all are not there: ",
}


@pytest.mark.parametrize("is_schedule", [True, False], ids=["schedule", "plain"])
@pytest.mark.parametrize("rows", BAD_TABLES)
def test_a_table_without_its_captions_or_pictures_is_refused_in_its_own_words(
    rows: str, is_schedule: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)
    pictures(tmp_path, "val", 1)
    (tmp_path / "images/table.csv").write_text(rows)
    table = {"class_path": "unimodal.data.CsvTable", "init_args": {"path": str(tmp_path / "images/table.csv")}}
    recipe = tiny_stage(tmp_path / "out", {"val": table})
    recipe = recipe if is_schedule else plain(recipe, tmp_path / "out")
    assert cli.main(write_recipe(tmp_path / "recipe.yaml", recipe)) in (1, 2)
    error = capsys.readouterr().err
    assert BAD_TABLES[rows] in error
    assert "Union" not in error and "Traceback" not in error and not list((tmp_path / "out").glob("**/model"))


# Scoring that fails.


def test_a_stage_whose_scoring_fails_is_kept_and_scored_again(
    tmp_path: Path, run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(_: Any) -> None:
        (tmp_path / "data/images/val2.png").write_bytes(b"no picture")

    assert run(damage) == 1
    error = capsys.readouterr().err
    assert (
        f"the stage is trained and its weights are in {stage(tmp_path)}/model, but they could not be scored: " in error
    )
    assert "val2.png" in error and "the same command scores them without training" in error
    weights = load_checkpoint(stage(tmp_path) / "model")[0].state_dict()
    assert not (stage(tmp_path) / "done.json").exists() and not (stage(tmp_path) / "resume.ckpt").exists()
    no_training(monkeypatch)
    assert run() == 0
    assert "trained before, in" in capsys.readouterr().out
    again = load_checkpoint(stage(tmp_path) / "model")[0].state_dict()
    assert all(weights[name].equal(again[name]) for name in weights)
    done = json.loads((stage(tmp_path) / "done.json").read_text())
    assert done["steps"] == 2 and done["parts"] and "t2i_r1_first" in done["scores"]


def test_scores_are_those_of_the_run_that_trained(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run() == 0
    first = json.loads((stage(tmp_path) / "done.json").read_text())
    no_training(monkeypatch)
    for content in (None, "", '{"scores": {"t2i'):  # gone, empty and cut short, as a full disk leaves a file
        (stage(tmp_path) / "done.json").unlink() if content is None else (stage(tmp_path) / "done.json").write_text(
            content
        )
        assert run() == 0
        assert json.loads((stage(tmp_path) / "done.json").read_text())["scores"] == first["scores"]


def test_another_validation_split_is_scored_and_not_trained(tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    assert run() == 0
    no_training(monkeypatch)
    assert run(lambda recipe: recipe["data"].update(val=scenes("val", 5))) == 0
    assert "swap_accuracy_embed" in json.loads((stage(tmp_path) / "done.json").read_text())["scores"]


# Settings.

MENDED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the loader's processes": lambda recipe: recipe["data"].update(workers=1),
    "devices": lambda recipe: recipe["trainer"].update(devices="1", accelerator="auto"),
    "what is printed": lambda recipe: recipe["trainer"].update(
        enable_progress_bar=True, enable_model_summary=True, log_every_n_steps=1, logger=True
    ),
    "callbacks that watch": lambda recipe: recipe["trainer"].update(
        enable_progress_bar=True, callbacks=[{"class_path": "RichProgressBar"}]
    ),
    "how often it is saved": lambda recipe: recipe.update(checkpoint_every=1),
    "validation": lambda recipe: recipe["trainer"].update(limit_val_batches=1.0),
    "words": lambda recipe: recipe.update(title="Another", about="words"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on pictures, finished."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny_stage(folder / "out", {"train": pictures(folder / "data", "train", 24)}, max_steps=2)
    assert cli.main(write_recipe(folder / "recipe.yaml", recipe)) == 0
    return folder


def repeat(folder: Path, change: Callable[[dict[str, Any]], Any], data: Path | None = None) -> int:
    """The same command on a finished run, its recipe changed."""
    recipe = tiny_stage(folder / "out", {"train": pictures(data or folder / "data", "train", 24)}, max_steps=2)
    change(recipe)
    return cli.main(write_recipe(folder / "recipe.yaml", recipe))


def test_what_decides_no_weight_may_be_mended(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once: what would be refused is named."""
    no_training(monkeypatch)
    monkeypatch.setattr("unimodal.cli.schedule._final_scores", lambda *_: None)
    assert repeat(finished, lambda recipe: [mend(recipe) for mend in MENDED.values()]) == 0


def test_data_and_output_may_be_moved(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch)
    shutil.copytree(finished / "out", tmp_path / "out")
    assert repeat(tmp_path, lambda recipe: None, tmp_path / "elsewhere") == 0


OTHER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "batch": (lambda recipe: recipe["data"].update(batch_size=4), "data.batch_size 8 there, 4 here"),
    "steps": (lambda recipe: recipe["trainer"].update(max_steps=3), "trainer.max_steps 2 there, 3 here"),
    "seed": (lambda recipe: recipe.update(seed_everything=3), "seed_everything None there, 3 here"),
    "clipping": (lambda recipe: recipe["trainer"].update(gradient_clip_val=1.0), "gradient_clip_val 'not set' there, 1.0"),
    "rates": (
        lambda recipe: recipe["model"]["init_args"].update(optimizer={"lr": 0.1}),
        "model.init_args.optimizer.lr 'not set' there, 0.1 here",
    ),
    "average": (
        lambda recipe: recipe["trainer"].update(callbacks=[{"class_path": "unimodal.tasks.EMA"}]),
        "trainer.callbacks 'not set' there",
    ),
    "training data": (lambda recipe: recipe["data"].update(train=scenes("train", 24)), "training data "),
    "trial": (lambda recipe: recipe["trainer"].update(fast_dev_run=True), "trainer.fast_dev_run 'not set' there"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_what_decides_the_weights_is_refused_by_name(
    what: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_training(monkeypatch)
    change, told = OTHER[what]
    assert repeat(finished, change) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds a run of this stage with other settings; choose another --output, or remove" in error
    assert told in error


@pytest.mark.parametrize("content", [None, "", '{"dec', "[]", '{"digest": "0123"}'])
def test_settings_that_cannot_be_read_are_told(
    content: str | None, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    no_training(monkeypatch)
    shutil.copytree(finished / "out", tmp_path / "out")
    settings = stage(tmp_path) / "settings.json"
    settings.unlink() if content is None else settings.write_text(content)
    assert repeat(tmp_path, lambda recipe: None) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "settings.json is not there, or cut short, or another version wrote it" in error
    assert f"remove {stage(tmp_path)} to train the stage anew" in error


def test_settings_of_a_start_on_a_full_disk_are_written_anew(tmp_path: Path, run: Any) -> None:
    stage(tmp_path).mkdir(parents=True)
    (stage(tmp_path) / "settings.json").touch()
    assert run() == 0


def test_a_trial_makes_way_for_the_run(tmp_path: Path, run: Any) -> None:
    assert run(lambda recipe: None, "--trainer.fast_dev_run", "true") == 0
    assert json.loads((stage(tmp_path) / "done.json").read_text())["steps"] == 1
    assert run() == 0
    assert json.loads((stage(tmp_path) / "done.json").read_text())["steps"] == 2


def test_a_start_that_came_to_nothing_binds_to_nothing(tmp_path: Path, run: Any, capsys: Any) -> None:
    assert run(lambda recipe: recipe["model"]["init_args"].update(init_from="nowhere/at/all")) == 2
    assert "schedule stage 'align': init_from: nowhere/at/all" in capsys.readouterr().err
    assert run(lambda recipe: recipe["model"]["init_args"].update(trainable={"nothing": 1.0})) == 1
    assert run() == 0
    assert len((stage(tmp_path) / "losses.jsonl").read_text().splitlines()) == 2 < STEPS
