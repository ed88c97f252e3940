"""The survey as its user runs it, on drawn scenes with a toy checkpoint's encoders: results, pages, noise, few examples."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_published import saved
from toy import toy_model, toy_processor

from unimodal.cli import main
from unimodal.data import Scenes
from unimodal.data.noise import Noise, changed, corrupted, swaps
from unimodal.data.nouns import objects_in, objects_of
from unimodal.hub import load_checkpoint, save_checkpoint
from unimodal.survey.data import First, Shots, SurveyData
from unimodal.survey.encoders import SharedEncoders
from unimodal.survey.hallucination import drawn_objects_in, hallucination, hallucination_on
from unimodal.survey.page import accuracy, captions, categories, read_results, settings
from unimodal.survey.run import Run, configs, load_system
from unimodal.survey.specs import read_spec, systems_folder
from unimodal.survey.train import Budget, Clock
from unimodal.systems import CLIP, Scoring, Stage

WAY = ("r1", "r5", "r10", "medr", "mr")  # what is measured of a direction


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(toy_model(), toy_processor(), tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def data(encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> SurveyData:
    return SurveyData(
        Scenes("train", count=24), Scenes("val", count=8), SharedEncoders(encoders), tmp_path_factory.mktemp("cache")
    )


def survey(encoders: Path, data: str, out: Path, *words: str) -> int:
    return main(["survey", "--data", data, "--encoders", str(encoders), "--out", str(out), "--budget", "3", *words])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    from unimodal.data import write_karpathy

    return str(
        write_karpathy(
            {"train": Scenes("train", count=24), "val": Scenes("val", count=8)}, tmp_path_factory.mktemp("d")
        )
    )


def test_a_survey_writes_results_and_a_page_and_goes_on_where_it_stopped(
    encoders: Path, photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "survey"
    assert survey(encoders, photographs, out, "--systems", "cca", "clip") == 0
    clip = json.loads((out / "clip/result.json").read_text())
    found, cca = clip["accuracy"]["first"], json.loads((out / "cca/result.json").read_text())
    assert "8 images, 40 captions (5 per image)" in clip["protocol"]["first"]
    for way, numbers in (("t2i", WAY), ("i2t", WAY), ("both", ("mr", "rsum"))):
        for k in numbers:
            assert found[way][f"{k}_low"] <= found[way][k] <= found[way][f"{k}_high"]
    assert (
        found["both"]["rsum"]
        == pytest.approx(3 * (found["t2i"]["mr"] + found["i2t"]["mr"]))
        == pytest.approx(6 * found["both"]["mr"])
    )
    assert clip["stages"]["contrast"]["steps"] == 3 and clip["trained"] == clip["parameters"] > 0
    towers = load_checkpoint(encoders)[0].backbone
    assert (
        clip["shared"]
        == cca["shared"]
        == sum(p.numel() for part in (towers.vision, towers.text) for p in part.parameters())
    )
    width, other = (SharedEncoders(encoders).image_width, SharedEncoders(encoders).text_width)
    d = min(width, other)
    assert (
        cca["trained"] == 0 and cca["parameters"] == (width + other) * (d + 1) + d
    )  # two means, two maps, correlations
    assert clip["regime"].startswith("tuned on ")
    assert clip["index_bytes"] == 256 * 4
    stamp = (out / "clip/result.json").stat().st_mtime_ns
    assert survey(encoders, photographs, out, "--systems", "cca", "clip", "scan_t2i_avg") == 0
    assert (out / "clip/result.json").stat().st_mtime_ns == stamp and (out / "scan_t2i_avg/result.json").exists()
    page = (out / "index.html").read_text()
    assert all(title in page for title in ("CCA", "CLIP", "SCAN t2i AVG", "88 / 98.7 / 99.4", "8 images, 40 captions"))
    assert survey(encoders, photographs, out, "--systems", "clip", "--seed", "1") == 1
    assert "measured under other settings (seed); give another --out" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["compare", str(out / "clip"), str(out / "cca")]) == 0
    assert "8 images, 40 captions" in capsys.readouterr().out


class Killed(BaseException):
    """What ends a survey at once, as a signal does: no error of one system, after which it goes on with the next."""

    @classmethod
    def fail(cls) -> None:
        raise cls


def test_a_survey_that_was_killed_goes_on_where_it_was(
    encoders: Path, photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: CLIP, stage: str) -> None:
        raise Killed

    killed, straight = tmp_path / "killed", tmp_path / "straight"
    words = ("--systems", "cca", "clip", "--grid", "2")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(CLIP, "after_step", dies)
        survey(encoders, photographs, killed, *words)
    assert not (killed / "clip/result.json").exists()
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (killed / "cca").iterdir()}
    assert killed / "cca/result.json" in first
    for out in (killed, straight):
        assert survey(encoders, photographs, out, *words) == 0
    assert first == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (killed / "cca").iterdir()}
    for name in ("system.safetensors", "ranks.safetensors"):
        assert (killed / "clip" / name).read_bytes() == (straight / "clip" / name).read_bytes()
    assert all(title in (killed / "index.html").read_text() for title in ("CCA", "CLIP"))


def test_a_folder_without_a_result_is_run_again(encoders: Path, photographs: str, tmp_path: Path) -> None:
    """Whatever lies there: the result is written last, and at once."""
    folder, words = tmp_path / "clip", ("--systems", "clip", "--grid", "2")
    assert survey(encoders, photographs, tmp_path, *words) == 0
    weights, result = (folder / "system.safetensors").read_bytes(), (folder / "result.json").read_text()
    (folder / "result.json").rename(folder / "result.part")
    (folder / "result.part").write_text(result[:99])
    (folder / "system.safetensors").write_bytes(weights[:99])
    with pytest.raises(FileNotFoundError, match="holds no system that `unimodal survey` trained"):
        load_system(folder)
    assert survey(encoders, photographs, tmp_path, *words) == 0
    assert (folder / "system.safetensors").read_bytes() == weights
    assert json.loads((folder / "result.json").read_text())["accuracy"] == json.loads(result)["accuracy"]


def test_a_system_whose_scoring_fails_is_scored_again_and_not_trained(
    encoders: Path, photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--systems", "clip", "--grid", "2")
    failed, straight = tmp_path / "failed", tmp_path / "straight"
    with monkeypatch.context() as patched:
        patched.setattr("unimodal.survey.run.deletion_test", lambda *_, **__: Killed.fail())
        with pytest.raises(Killed):
            survey(encoders, photographs, failed, *words)
    assert (failed / "clip/system.safetensors").exists() and not (failed / "clip/result.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("unimodal.survey.run.train", lambda *_, **__: pytest.fail("it was trained again"))
        assert survey(encoders, photographs, failed, *words) == 0
    assert survey(encoders, photographs, straight, *words) == 0
    measured = [json.loads((out / "clip/result.json").read_text()) for out in (failed, straight)]
    for key in ("accuracy", "findings", "parameters", "deletion"):
        assert measured[0][key] == measured[1][key]


def test_a_system_of_categories_is_told_which_the_data_has(encoders: Path, photographs: str, tmp_path: Path) -> None:
    """CDISA sorts by them and is judged by them alone; Qwen3-VL-Embedding reads their names."""
    out = tmp_path / "survey"
    assert survey(encoders, photographs, out, "--systems", "cdisa", "qwen_embedding") == 0
    result = json.loads((out / "cdisa/result.json").read_text())
    assert "accuracy" not in result and not (out / "cdisa/ranks.safetensors").exists()
    assert result["map"]["categories"] == len(result["categories"]) > 0 and 0 <= result["map"]["t2i"] <= 100
    _, system, _ = load_system(out / "cdisa")
    assert system.classifier.out_features == len(result["categories"])
    table = categories([result])
    mean = (result["map"]["t2i"] + result["map"]["i2t"]) / 2
    assert table["rows"][0][0] == "CDISA\ninferred design" and table["rows"][0][3] == f"{mean:.1f}"
    _, reader, _ = load_system(out / "qwen_embedding")
    assert len(reader.get_buffer("label_ids")) == len(result["categories"])


def test_noise_and_few_examples_stand_beside_the_clean_run(encoders: Path, photographs: str, tmp_path: Path) -> None:
    out = tmp_path / "survey"
    assert survey(encoders, photographs, out, "--systems", "cca") == 0
    assert survey(encoders, photographs, out, "--systems", "cca", "--noise", "0.4", "--noise_kind", "swap") == 0
    assert survey(encoders, photographs, out, "--systems", "cca", "--shots", "1", "--shots_of", "pair") == 0
    page = (out / "index.html").read_text()
    assert "noise 0.4 swap" in page and "shots 1 of a pair" in page
    clean, noisy = (json.loads((out / f"{folder}cca/result.json").read_text()) for folder in ("", "noise-0.4-swap/"))
    before, after = (result["accuracy"]["first"]["i2t"]["r1"] for result in (clean, noisy))
    tables = {table["title"]: table for table in settings(read_results(out))}
    assert set(tables) == {"Noise", "Few examples"} and tables["Noise"]["columns"] == [
        "System",
        "clean",
        "noise 0.4 swap",
    ]
    name, first, changed = tables["Noise"]["rows"][1]
    assert name == "CCA\ninferred design\nI→T first-stage R@1" and first.startswith(f"{before:.1f}\n")
    assert changed.startswith(f"{after:.1f} ({after - before:+.1f})".replace("-", "−")) and " to " in changed


def test_other_data_is_ranked_zero_shot(
    encoders: Path, photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "survey"
    words = [
        "survey",
        "--data",
        "scenes",
        "--train_images",
        "16",
        "--budget",
        "2 steps",
        "--encoders",
        str(encoders),
        "--out",
        str(out),
    ]
    assert main([*words, "--ranked", photographs, "--systems", "clip"]) == 0
    clip = json.loads((out / "clip/result.json").read_text())
    assert clip["regime"] == "zero-shot from scenes train" and "8 images, 40 captions" in clip["protocol"]["first"]
    told = capsys.readouterr().out
    assert "How well each finds" in told and "What each is, and what it costs" in told
    assert "zero-shot from scenes train" in (out / "index.html").read_text()


def test_one_system_that_fails_does_not_stop_the_others(
    encoders: Path, photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        "title: Broken\npaper: none\ninteraction: none\nsystem: {class_path: unimodal.systems.CLIP, init_args: {width: 64, heads: 4}}\n"
        "stages: {contrast: {batch_size: 8, lr: 1.0e+30}}\n"
    )
    out = tmp_path / "survey"
    assert survey(encoders, photographs, out, "--systems", str(broken), "clip") == 1
    assert "1 of 2 systems failed: broken; see above" in capsys.readouterr().err
    assert (out / "clip/result.json").exists() and not (out / "broken/result.json").exists()


def test_two_systems_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="two systems are called 'clip': .*clip.yaml and mine/clip.yaml; rename one file"
    ):
        configs(systems_folder(), ["clip", "mine/clip.yaml"])


def written(title: str, setting: str, r1: float, *, budget: str = "3 steps", **more: Any) -> dict[str, Any]:
    """A result as `result.json` holds it, as far as the tables of settings read it."""
    return {
        "title": title,
        "inferred": "",
        "corrupted": 0.25,
        "settings": {"budget": budget, "setting": setting, "train": "scenes"},
        "accuracy": {"first": text_to_image(r1)},
        **more,
    }


def two_stages(first: float, reranked: float) -> dict[str, Any]:
    return {"first": text_to_image(first), "reranked": text_to_image(reranked)}


def text_to_image(r1: float) -> dict[str, Any]:
    return {"t2i": {"r1": r1, "r1_low": r1 - 1, "r1_high": r1 + 1}, "i2t": None}


def test_what_noise_costs_is_told_against_the_run_that_differs_in_nothing_else() -> None:
    few = "shots 4 of a class"
    results = {
        "": {
            "a": written("A", "", 50.0),
            "b": written("B", "", 40.0),
            "c": written("C", "", 0, map={"t2i": 30, "i2t": 20}),
            "d": written("D", "", 0, accuracy=two_stages(30.0, 60.0)),
        },
        "noise 0.4 random": {
            "a": written("A", "noise 0.4 random", 38.0),
            "b": written("B", "noise 0.4 random", 39.0, budget="9 steps"),
            "c": written("C", "noise 0.4 random", 0, map={"t2i": 24.0, "i2t": 21.0}),
            "d": written("D", "noise 0.4 random", 0, accuracy=two_stages(28.0, 40.0)),
        },
        "noise 0.2 random": {"a": written("A", "noise 0.2 random", 45.0)},
        few: {"a": written("A", few, 20.0)},
        f"noise 0.4 swap {few}": {"a": written("A", f"noise 0.4 swap {few}", 17.0)},
    }
    noise, both, shots = settings(results)
    assert noise["columns"] == ["System", "clean", "noise 0.2 random", "noise 0.4 random"]
    assert noise["rows"] == [
        ["A\nT→I first-stage R@1", "50.0\n49.0 to 51.0", "45.0 (−5.0)\n44.0 to 46.0", "38.0 (−12.0)\n37.0 to 39.0"],
        ["B\nT→I first-stage R@1", "40.0\n39.0 to 41.0", "–", "39.0\n38.0 to 40.0"],
        ["C\nT→I mAP", "30.0", "–", "24.0 (−6.0)"],
        ["C\nI→T mAP", "20.0", "–", "21.0 (+1.0)"],
        ["D\nT→I first-stage R@1", "30.0\n29.0 to 31.0", "–", "28.0 (−2.0)\n27.0 to 29.0"],
        ["D\nT→I reranked R@1", "60.0\n59.0 to 61.0", "–", "40.0 (−20.0)\n39.0 to 41.0"],
    ]
    assert noise["notes"] == [
        "noise 0.2 random: 25.0% of the captions are no longer what they were.",
        "noise 0.4 random: 25.0% of the captions are no longer what they were.",
        "B, noise 0.4 random: measured under other settings (budget), so no change is given.",
    ]
    assert both["title"] == f"Noise, {few}" and both["columns"][1] == few
    assert both["rows"][0][1:] == ["20.0\n19.0 to 21.0", "17.0 (−3.0)\n16.0 to 18.0"]
    assert shots["title"] == "Few examples" and shots["rows"][0][2].startswith("20.0 (−30.0)")


def test_captions_that_name_nothing_have_no_share_of_invented_objects() -> None:
    some, none = {"objects": 50.0, "captions": 25.0, "named": 0.5}, {"objects": 0.0, "captions": 0.0, "named": 0.0}
    table = captions({"": {"a": written("A", "", 0, captions=some), "b": written("B", "", 0, captions=none)}})
    assert table["rows"] == [["A", "50.0", "25.0", "0.50"], ["B", "–", "0.0", "0.00"]]


def test_a_median_rank_is_told_to_a_tenth() -> None:
    way = {f"{key}{end}": 7.0 for key in ("r1", "r5", "r10", "mr") for end in ("", "_low", "_high")}
    way |= {"medr": 18.5, "medr_low": 14.9875, "medr_high": 402.488}
    found = {"first": {"t2i": way, "i2t": None, "both": None}}
    table = accuracy([written("A", "", 0, accuracy=found, published=[], protocol={"first": "toy"}, regime="tuned")])
    assert table["columns"][4] == "T→I MedR" and table["rows"][0][4] == "18.5\n15 to 402.5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--systems", "clap"), "no system 'clap'; there are adapters,"),
        (("--budget", "30 s"), "budget: expected steps or minutes, for example '300' or '2.5 minutes', got '30 s'"),
        (("--budget", "soon"), "budget: expected steps or minutes, for example '300' or '2.5 minutes', got 'soon'"),
        (("--train_images", "99"), "got 99 images of"),
        (("--noise", "2"), "noise: expected a share of the captions between 0 and 1, got 2.0"),
    ],
)
def test_what_a_user_gets_wrong(
    encoders: Path, photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, message: str
) -> None:
    assert survey(encoders, photographs, tmp_path, *words) == 1
    assert message in capsys.readouterr().err


def test_a_system_of_your_own_is_one_yaml_file(
    encoders: Path, photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "title: Wide CLIP\npaper: none\ninteraction: dual encoder\n"
        "system: {class_path: unimodal.systems.CLIP, init_args: {width: 64, heads: 4}}\nstages: {contrast: {batch_size: 8}}\n"
    )
    assert survey(encoders, photographs, tmp_path / "out", "--systems", str(own)) == 0
    assert json.loads((tmp_path / "out/own/result.json").read_text())["title"] == "Wide CLIP"
    own.write_text(own.read_text().replace("width", "widht"))
    assert survey(encoders, photographs, tmp_path / "other", "--systems", str(own)) == 1
    assert "widht" in capsys.readouterr().err


def test_the_guide_shows_a_system_that_runs_as_it_is_written(
    encoders: Path,
    photographs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, guide = (systems_folder() / "README.md").read_text().split("## A system of your own")
    for kind, suffix in (("python", "py"), ("yaml", "yaml")):
        (block,) = re.findall(rf"^```{kind}\n(.*?)^```", guide, flags=re.M | re.S)
        (tmp_path / f"best_place.{suffix}").write_text(block)
    monkeypatch.chdir(tmp_path)
    own = str(tmp_path / "best_place.yaml")
    assert survey(encoders, photographs, Path("missing"), "--systems", own) == 1  # nothing is imported unasked
    assert "no module named 'best_place'; put the folder of best_place.py on PYTHONPATH" in capsys.readouterr().err
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = [shlex.split(line.removeprefix("PYTHONPATH=. ")) for line in guide.splitlines() if "unimodal " in line]
    run, explain, compare = [words[1:] for words in commands if words[:1] == ["unimodal"]]
    at = {"--data": photographs, "--train_images": "24", "--budget": "4 steps"}
    run = [at.get(before, word) for before, word in zip(["", *run], run)]
    assert main([*run, "--encoders", str(encoders)]) == 0
    result = json.loads(Path("checkpoints/own/best_place/result.json").read_text())
    assert (
        result["title"] == "Best place"
        and result["stages"]["contrast"]["steps"] == 4
        and result["deletion"]["pairs"] == 8
    )
    Scenes("val", count=1).image(0).save("photo.jpg")
    assert main(explain) == 0 and Path("why.png").exists()
    assert main(compare) == 0


def test_a_trained_system_is_loaded_again(encoders: Path, data: SurveyData, tmp_path: Path) -> None:
    from unimodal.survey.run import run_system

    run = Run(data, Budget(steps=2), tmp_path)
    config = configs(systems_folder(), ["clip"])["clip"]
    run_system("clip", config, run, lambda line: None)
    spec, system, _ = load_system(tmp_path / "clip", data.encoders)
    assert spec.title == "CLIP"
    images, texts, _, _ = data.gallery()
    assert system.embed_images(images).shape == (8, 256) and system.embed_texts(texts).shape == (40, 256)


def test_batches_follow_from_the_seed_and_hold_several_captions_where_asked(data: SurveyData) -> None:
    stage = Stage(batch_size=8, captions_per_image=2)
    first, again = (next(data.batches("x", stage)) for _ in range(2))
    assert torch.equal(first.texts.ids, again.texts.ids) and torch.equal(first.image_id, again.image_id)
    assert len(first.image_id) == 8 and len(first.image_id.unique()) == 4
    ids, mask = data.encoders.tokenise(data.train.captions(int(first.image_id[0])))
    own = [row[m].tolist() for row, m in zip(ids, mask)]
    assert first.texts.ids[0][first.texts.mask[0]].tolist() in own
    assert first.texts.ids[1][first.texts.mask[1]].tolist() in own
    assert not torch.equal(first.texts.ids[0], first.texts.ids[1])


def test_hard_batches_are_read_in_the_order_of_their_file(data: SurveyData, tmp_path: Path) -> None:
    path = tmp_path / "batches.json"
    embedding = torch.nn.functional.normalize(torch.randn(24, 6), dim=-1)
    data.write_hard_batches(path, embedding, 6)
    plan = json.loads(path.read_text())["batches"]
    assert len(plan) == 4 and sorted(row for rows in plan for row in rows) == list(range(24))
    stream = data.batches("x", Stage(batch_size=6), order=path)
    for _ in range(2):  # epochs: mined groups are never shuffled apart
        for rows in plan:
            assert next(stream).image_id.tolist() == rows
    seed = plan[0][0]
    near = (embedding @ embedding[seed]).argsort(descending=True).tolist()
    assert plan[0][1] in near[1:7]


def test_a_coarser_grid_is_the_average_of_the_finer(encoders: Path) -> None:
    fine = SharedEncoders(encoders)
    side = int(fine.image_tokens**0.5)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = fine.unplaced(fine.read_images(pixels).tokens)
    for grid in (1, 2, 3, side):
        coarse = SharedEncoders(encoders, grid)
        found = coarse.unplaced(coarse.read_images(pixels).tokens)
        assert found.shape == (2, grid * grid, tokens.shape[2])
        torch.testing.assert_close(found.mean(1), tokens.mean(1), atol=1e-5, rtol=1e-4)
    square = tokens.unflatten(1, (side, side))  # a cell of two by two is the mean of the tokens under it
    coarse = SharedEncoders(encoders, side // 2)
    half = coarse.unplaced(coarse.read_images(pixels).tokens).unflatten(1, (side // 2, side // 2))
    torch.testing.assert_close(half[:, 1, 0], square[:, 2:4, 0:2].mean((1, 2)), atol=1e-5, rtol=1e-4)
    with pytest.raises(
        ValueError, match=f"grid: got {side + 1}, .* a grid of {side}; expected a side from 1 to {side}"
    ):
        SharedEncoders(encoders, side + 1)


def test_the_first_images_of_a_split_are_a_split() -> None:
    whole = Scenes("train", count=10)
    part: Any = First(whole, 4)
    assert len(part) == 4 and part.captions(2) == whole.captions(2) and part.name == "scenes"
    assert part.fingerprint() == Scenes("train", count=4).fingerprint() != whole.fingerprint()
    with pytest.raises(ValueError, match="got 11 images of scenes train, which has 10; expected 1 up to all"):
        First(whole, 11)


def test_few_examples(encoders: Path, data: SurveyData, tmp_path: Path) -> None:
    def few(of: Any, count: int) -> SurveyData:
        return SurveyData(data.train, data.val, data.encoders, tmp_path, shots=Shots(count, of))

    classes = few("class", 1)
    assert 0 < len(classes.rows) <= len(classes.categories) < 24
    assert {thing for row in classes.rows for thing in objects_of(data.train.captions(row))} == set(data.categories)
    pairs = few("pair", 2)
    assert len(pairs.rows) == 24 and {len(texts) for texts in pairs.captions} == {2}
    with pytest.raises(ValueError, match="shots: got 8 captions of each image, but .* has at most 5; lower it"):
        few("pair", 8)


@pytest.mark.parametrize("kind", ["random", "category", "swap"])
def test_noise_corrupts_its_share_and_always_the_same(kind: Any) -> None:
    scenes = Scenes("train", count=40)
    captions = [scenes.captions(i) for i in range(40)]
    noise = Noise(0.25, kind)
    places = [[(i, c) for c in range(5)] for i in range(40)]
    found = corrupted(scenes, captions, places, noise)
    assert found == corrupted(scenes, captions, places, noise)
    changes = [(a, b) for old, new in zip(captions, found) for a, b in zip(old, new) if a != b]
    assert 40 <= len(changes) <= 50  # of 200; a random caption may be the same by chance
    assert changed(captions, found) == len(changes) / 200
    if kind == "category":
        assert all(objects_in(a) & objects_in(b) for a, b in changes)
    if kind == "swap":
        assert all(len(set(a.split()) ^ set(b.split())) <= 6 for a, b in changes)


def test_the_false_caption_of_a_drawn_one_is_its_own() -> None:
    """With few captions of each image, the first that is left is not the split's first."""
    scenes = Scenes("train", count=20)
    places = [[(i, 3)] for i in range(20)]
    found = corrupted(scenes, [[scenes.captions(i)[3]] for i in range(20)], places, Noise(1.0, "swap"))
    assert all(new in scenes.negatives(i, 3) for i, (new,) in enumerate(found))
    assert not all(new in scenes.negatives(i, 0) for i, (new,) in enumerate(found))


def test_attributes_are_swapped_within_their_kind() -> None:
    import random

    found = swaps("Two young girls in red hats", random.Random(0))
    assert len(found) == 3  # number, age, colour: `girls` is no word of the list
    assert swaps("nothing to see", random.Random(0)) == []


def test_objects_are_found_by_their_names() -> None:
    assert objects_in("Two puppies chase a ball near the children") == {"ball", "child"}
    assert objects_in("A terrier and some boys on benches") == {"dog", "boy", "bench"}
    assert objects_of(["a dog", "a dog on grass", "a lawn", "an animal"]) == {"dog", "grass"}
    assert objects_of(["a cat"]) == {"cat"}


def test_invented_objects_are_counted() -> None:
    found = hallucination(["a dog and a cat", "a man", "nothing"], [{"dog"}, {"man", "ball"}, set()])
    assert found == {"objects": pytest.approx(100 / 3), "captions": pytest.approx(100 / 3), "named": 1.0}
    with pytest.raises(ValueError, match="got 1 captions and the objects of 2 images"):
        hallucination(["a"], [set(), set()])


def test_scenes_are_judged_exactly_and_photographs_by_their_captions() -> None:
    scenes = Scenes("val", count=12)
    true = [scenes.captions(i)[0] for i in range(12)]
    assert hallucination_on(true, scenes) == {"objects": 0.0, "captions": 0.0, "named": 2.0}
    false = [
        next(swap.negative for swap in scenes.swaps(i) if swap.kind in ("change_colour", "change_shape"))
        for i in range(12)
    ]
    assert hallucination_on(false, scenes)["captions"] == 100
    assert drawn_objects_in("A big red striped circle over a blue ring.") == {"red circle", "blue ring"}


def test_a_budget_is_steps_or_minutes() -> None:
    assert Budget.read("300") == Budget.read("300 steps") == Budget(steps=300)
    assert Budget.read("2.5 minutes") == Budget.read("2.5m") == Budget(minutes=2.5)
    for wrong in ("", "-3", "2 hours", "0"):
        with pytest.raises(ValueError, match="budget: expected"):
            Budget.read(wrong)
    clock = Clock(Budget(steps=300), 1 / 3)
    clock.done = 25
    assert clock.progress() == pytest.approx(0.25)


def test_scoring_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="scoring.k: expected 0 or more"):
        Scoring(k=-1)
    with pytest.raises(ValueError, match="another system, whose first candidates this one scores again: set scoring.k"):
        Scoring(shortlist="cca", k=0)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("{first: pairs}", {"first": "pair"}),
        ("{first: cca, k: 32}", {"first": "embed", "shortlist": "cca", "k": 32}),
        ("{first: embed, k: 8, combine: sum}", {"first": "embed", "k": 8, "combine": "sum"}),
    ],
)
def test_the_scoring_of_an_older_survey_is_read(before: str, now: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "system.yaml"
    path.write_text(
        f"title: one\npaper: one\ninteraction: one\nsystem: {{class_path: unimodal.systems.CLIP}}\nscoring: {before}\n"
    )
    assert read_spec(path).scoring == Scoring(**now)


@pytest.mark.parametrize("published", ["clip", "siglip"])
def test_encoders_as_their_authors_publish_them(
    published: str, photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SigLIP's tokenizer begins no text; CLIP's has one id for padding and end, and no mask token."""
    saved(published, tmp_path / published)
    encoders = SharedEncoders(tmp_path / published)
    special = [encoders.words.mask_id, encoders.words.end_id, encoders.pad_id]
    assert encoders.words.mask_id not in special[1:] and (encoders.words.start_id is None) == (published == "siglip")
    systems = ("as_it_comes", "clip", "albef", "vlmo")
    assert survey(tmp_path / published, photographs, tmp_path / "out", "--systems", *systems) == 0, (
        capsys.readouterr().err
    )


def test_the_systems_know_where_image_tokens_are(encoders: Path) -> None:
    shared = SharedEncoders(encoders)
    features = shared.backbone.image_features(shared.backbone.random_pixels(2, torch.Generator().manual_seed(0)))
    there, turned = (shared.as_images(x, None).tokens for x in (features, features.flip(1)))
    assert not torch.allclose(there, turned.flip(1), atol=1e-3)
    torch.testing.assert_close(shared.unplaced(there), features, atol=1e-5, rtol=1e-4)
