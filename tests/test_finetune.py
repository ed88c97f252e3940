"""Fine-tuning without a recipe: what it trains and leaves, what it holds out, what it says, and how it goes on."""

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_published import saved
from test_start import own_pairs
from toy import toy_model, toy_processor

import unimodal
from unimodal import cli
from unimodal.config import AdapterConfig
from unimodal.data.scenes import Scenes
from unimodal.data.tables import CsvTable
from unimodal.finetuning import Finetuned, run
from unimodal.finetuning.split import open_pairs
from unimodal.hub import find_prompts, load_checkpoint, save_checkpoint, verify_checkpoint
from unimodal.recipes import shipped_checkpoint
from unimodal.tasks import Joint


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all four heads."""
    return save_checkpoint(
        toy_model(), toy_processor(), tmp_path_factory.mktemp("toy") / "four", prompts={"query": "find "}
    )


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that only embeds."""
    model = toy_model(matching=None, captioning=None, generation=None)
    return save_checkpoint(model, toy_processor(), tmp_path_factory.mktemp("toy") / "dual")


@pytest.fixture
def last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every validation counts as better than the one before: these toys learn nothing that other images would show."""
    rising = itertools.count()
    monkeypatch.setattr(run, "score", lambda *_: float(next(rising)))


def embedding_of_scenes(model: Path, out: Path) -> Finetuned:
    """The embedding on 60 scenes, three epochs of four steps, towers and all."""
    return unimodal.finetune(model, Scenes("train", count=60), out, train="all", epochs=3, learning_rate=3e-3)


@pytest.fixture(scope="module")
def done(dual: Path, tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    return embedding_of_scenes(dual, tmp_path_factory.mktemp("done") / "out")


def outputs(folder: Path, job: str) -> torch.Tensor:
    model, processor = load_checkpoint(folder)
    pairs = Scenes("val", count=4)
    with torch.no_grad():
        image = model.encode_image(processor.images([pairs.image(i) for i in range(4)]))
        ids, mask = processor.texts([pairs.captions(i)[0] for i in range(4)])
        text, rows = model.encode_text(ids, mask), torch.arange(4)
        if job == "embedding":
            return torch.cat([model.image_embedding(image), model.text_embedding(text)])
        return model.match(image, text, rows, rows) if job == "matching" else model.caption_logits(image, ids)


# What it leaves.


def test_the_result_is_a_checkpoint_with_a_table(done: Finetuned) -> None:
    rows = {(row.stage, row.measure): row for row in done.rows}
    assert {stage for stage, _ in rows} == {"first"} and {"t2i_r1", "i2t_r10", "rsum"} <= {
        measure for _, measure in rows
    }
    gain = rows["first", "rsum"]
    assert gain.difference == pytest.approx(gain.after - gain.before) and 0 < gain.p_value <= 1
    assert gain.before_interval[0] <= gain.before <= gain.before_interval[1]
    assert unimodal.from_pretrained(done.folder).heads == ("embedding",) and verify_checkpoint(done.folder)
    kept = json.loads((done.folder / "finetune.json").read_text())
    assert kept == done.report and kept["images"] == {"train": 48, "val": 12, "test": 12}
    assert kept["best_step"] in [step for step, _ in kept["validation"]] and kept["chose_the_best_step"]
    left = {path.name for path in (done.folder / "training").iterdir()}
    assert left == {"losses.jsonl", "run.lock", "settings.json"}
    losses = [json.loads(line)["itc"] for line in (done.folder / "training/losses.jsonl").read_text().splitlines()]
    assert len(losses) == kept["steps"] == 12 and losses[-1] < losses[0]


def test_the_card_tells_where_it_comes_from(done: Finetuned) -> None:
    card = (done.folder / "README.md").read_text()
    assert (
        "# dual, fine-tuned on scenes" in card
        and "Fine-tuned from `dual` by `unimodal finetune` (train all, jobs embedding)" in card
    )
    assert done.report["train data"] in card and "on 48 images of scenes" in card and "license: apache-2.0" in card


def test_the_best_step_is_kept(done: Finetuned, dual: Path, tmp_path: Path) -> None:
    scores = {step: score for step, score in done.report["validation"]}
    assert scores[done.report["best_step"]] == max(scores.values())
    ruined = unimodal.finetune(dual, Scenes("train", count=40), tmp_path / "out", epochs=20, learning_rate=10.0)
    scores = ruined.report["validation"]
    best = next(i for i, (step, _) in enumerate(scores) if step == ruined.report["best_step"])
    assert len(scores) == best + 6 < 21  # five validations were no better
    if best == 0:
        assert torch.equal(outputs(ruined.folder, "embedding"), outputs(dual, "embedding"))


def test_heads_that_are_not_asked_for_stay_as_they_are(toy: Path, tmp_path: Path, last: None) -> None:
    trained = unimodal.finetune(
        toy, Scenes("train", count=40), tmp_path / "out", jobs=["embedding"], epochs=2, learning_rate=1e-2
    )
    assert set(trained.report["trained"]) <= {
        "log_scale",
        "bridge.query_sets.text",
        "heads.image_embedding",
        "heads.text_embedding",
    }
    assert not torch.equal(outputs(trained.folder, "embedding"), outputs(toy, "embedding"))
    for job in ("matching", "captioning"):
        assert torch.equal(outputs(trained.folder, job), outputs(toy, job)), job
    assert find_prompts(trained.folder) == {"query": "find "}


def test_every_job_trains_and_is_measured(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CAPTIONED", {"val": 3, "test": 6})
    trained = unimodal.finetune(toy, Scenes("train", count=30), tmp_path / "out", train="all", epochs=1)
    assert {row.stage for row in trained.rows} == {"first", "reranked", "captions"} == set(trained.report["protocol"])
    assert {
        "backbone.vision",
        "backbone.text",
        "bridge.layers",
        "heads.matching",
        "heads.captioning",
    } <= trained.report["trained"].keys()
    assert "heads.generation" not in trained.report["trained"]


@pytest.mark.parametrize(("name", "train"), [("clip", "heads"), ("clip", "lora"), ("siglip", "heads")])
def test_a_published_pair_is_trained(name: str, train: Any, tmp_path: Path, last: None) -> None:
    saved(name, tmp_path / "clip")
    before = load_checkpoint(tmp_path / "clip")[0]
    trained = unimodal.finetune(
        tmp_path / "clip", Scenes("train", count=30), tmp_path / "out", train=train, epochs=2, learning_rate=1e-2
    )
    after = load_checkpoint(tmp_path / "out")[0]
    assert after.config.adapters == {} and after.jobs == ("embedding",) and trained.report["best_step"] > 0
    ours, theirs = after.state_dict(), before.state_dict()
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert {"clip": "backbone.model.text_projection.weight", "siglip": "pair_bias"}[name] in moved
    assert any("vision_model.encoder" in name for name in moved) is (train == "lora")


def test_the_shipped_checkpoint_learns_drawn_scenes(tmp_path: Path, last: None) -> None:
    start = shipped_checkpoint()
    trained = unimodal.finetune(start, Scenes("train", count=20), tmp_path / "out", jobs=["embedding"], epochs=3)
    assert set(trained.report["trained"]) == {"log_scale", "backbone.embed_image", "backbone.embed_text"}
    assert {row.stage for row in trained.rows} == {
        "first",
        "reranked",
        "captions",
    }  # also what is not trained is measured
    ours, theirs = (load_checkpoint(folder)[0].state_dict() for folder in (tmp_path / "out", start))
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert moved and all(name == "log_scale" or name.startswith("backbone.embed_") for name in moved)


# What it holds out.


def test_images_are_held_out_with_all_their_captions_and_copies(tmp_path: Path) -> None:
    own_pairs(tmp_path, 40)
    shutil.copy(tmp_path / "3.png", tmp_path / "copy.png")
    rows = (tmp_path / "pairs.csv").read_text().splitlines()
    twice = [*rows, *(row.replace(",a ", ",the ") for row in rows[1:]), "copy.png,a star"]
    (tmp_path / "pairs.csv").write_text("\n".join(twice) + "\n")
    seen = set()
    for seed in range(8):
        train, val, test = open_pairs(tmp_path / "pairs.csv", None, None, seed)
        parts = [{pairs.key(i): pairs.captions(i) for i in range(len(pairs))} for pairs in (train, val)]
        assert test is val and len(val) in (8, 9) and len(train) + len(val) == 41
        assert not parts[0].keys() & parts[1].keys()
        assert all(len(captions) == 2 for part in parts for key, captions in part.items() if key != "copy.png")
        assert any({"3.png", "copy.png"} <= part.keys() for part in parts)
        again = open_pairs(CsvTable(tmp_path / "pairs.csv"), None, None, seed)
        assert again.val.fingerprint() == val.fingerprint()
        seen.add(val.fingerprint())
    assert len(seen) > 1


def test_splits_of_the_data_are_taken_as_they_are(tmp_path: Path) -> None:
    own_pairs(tmp_path, 40)
    rows = (tmp_path / "pairs.csv").read_text().splitlines()
    named = [f"{row},{'test' if i % 8 == 0 else 'dev' if i % 8 == 1 else 'train'}" for i, row in enumerate(rows[1:])]
    (tmp_path / "pairs.csv").write_text("\n".join([rows[0] + ",split", *named]) + "\n")
    train, val, test = open_pairs(tmp_path / "pairs.csv", None, None, 0)
    assert (len(train), len(val), len(test)) == (30, 5, 5) and (val.split, test.split) == ("dev", "test")
    shutil.copy(tmp_path / "0.png", tmp_path / "2.png")
    with pytest.warns(UserWarning, match="1 pictures of pairs test are trained on, too"):
        open_pairs(tmp_path / "pairs.csv", None, None, 0)


def test_splits_that_are_not_known_are_named(tmp_path: Path) -> None:
    own_pairs(tmp_path, 40)
    rows = (tmp_path / "pairs.csv").read_text().splitlines()

    def write(*names: str) -> Path:
        named = [f"{row},{names[i % len(names)]}" for i, row in enumerate(rows[1:])]
        (tmp_path / "pairs.csv").write_text("\n".join([rows[0] + ",split", *named]) + "\n")
        return tmp_path / "pairs.csv"

    with pytest.raises(
        ValueError, match="the data has the splits val, test, of which none is called train or training"
    ):
        open_pairs(write("val", "test"), None, None, 0)
    with pytest.warns(UserWarning, match="more splits, which are left out: restval"):
        train, val, test = open_pairs(write("train", "restval"), None, None, 0)
    assert (len(train), len(val)) == (16, 4) and test is val
    assert len(open_pairs(write("mine"), None, None, 0).train) == 32
    given = open_pairs(write("mine"), None, Scenes("val", count=5), 0)
    assert len(given.train) == 40 and given.val.name == "scenes"


# It goes on.


class Killed(BaseException):
    pass


def test_the_same_call_goes_on_where_it_was_killed(
    dual: Path, done: Finetuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Joint.training_step
    taken: list[int] = []

    def dies(self: Any, *arguments: Any) -> torch.Tensor:
        if self.global_step == 7:
            raise Killed
        return step(self, *arguments)

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        taken.append(self.global_step)
        return step(self, *arguments)

    monkeypatch.setattr(run, "CHECKPOINT_EVERY", 3)
    monkeypatch.setattr(Joint, "training_step", dies)
    with pytest.raises(Killed):
        embedding_of_scenes(dual, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    monkeypatch.setattr(Joint, "training_step", counted)
    again = embedding_of_scenes(dual, tmp_path / "out")
    assert taken[0] == 6
    assert again.report["validation"] == done.report["validation"] and again.rows == done.rows
    assert torch.equal(outputs(again.folder, "embedding"), outputs(done.folder, "embedding"))
    monkeypatch.setattr(Joint, "training_step", dies)  # nothing is trained once it is finished
    assert embedding_of_scenes(dual, tmp_path / "out") == again


def test_a_signal_ends_it_and_the_same_command_goes_on(
    dual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_pairs(tmp_path, 24)
    command = words(tmp_path, "--model", dual, "--out", tmp_path / "out", "--epochs", 1)
    step = Joint.training_step

    def asked(self: Any, *arguments: Any) -> torch.Tensor:
        if self.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Joint, "training_step", asked)
    assert cli.main(command) == 143
    assert "SIGTERM stopped the training after step 2; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(Joint, "training_step", step)
    assert cli.main(command) == 0 and load_checkpoint(tmp_path / "out")


def test_what_breaks_inside_leaves_its_traceback_in_a_file(
    dual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_pairs(tmp_path, 24)

    def breaks(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Joint, "training_step", breaks)
    told = refused(capsys, *words(tmp_path, "--model", dual, "--out", tmp_path / "out", "--epochs", 1))
    assert f"unimodal finetune: out of memory\n  the traceback is in {tmp_path / 'out/training/traceback-'}" in told


# What cannot be.


def words(tmp_path: Path, *more: object) -> list[str]:
    return ["finetune", "--data", str(tmp_path / "pairs.csv"), *map(str, more)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == 1
    return capsys.readouterr().err


def test_what_does_not_fit_is_told_before_any_work(
    toy: Path, dual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Joint, "training_step", lambda *_: pytest.fail("a step was trained"))
    own_pairs(tmp_path, 24)
    own_pairs(tmp_path / "few", 12)
    out = ("--out", str(tmp_path / "out"))
    told = refused(capsys, "finetune", "--model", str(dual), "--data", str(tmp_path / "few/pairs.csv"), *out)
    assert "pairs has 12 images to train on, and a fine-tuning needs at least 20" in told
    told = refused(capsys, *words(tmp_path, "--model", dual, "--jobs", "embedding,captioning", *out))
    assert (
        f"jobs: {dual} has no captioning head; it has: embedding. Leave captioning out, or add the head by a recipe"
        in told
    )
    told = refused(capsys, *words(tmp_path, "--model", toy, "--jobs", "generation", *out))
    assert "expected one of embedding, matching, captioning" in told
    (tmp_path / "gallery").mkdir()
    for path in tmp_path.glob("*.png"):
        shutil.copy(path, tmp_path / "gallery")
    told = refused(capsys, "finetune", "--model", str(dual), "--data", str(tmp_path / "gallery"), *out)
    assert "caption" in told and "fine-tuning" in told
    (tmp_path / "5.png").write_bytes(b"no picture")
    told = refused(capsys, *words(tmp_path, "--model", dual, *out))
    assert "1 of 24 pictures of pairs all cannot be read: 5.png: " in told and "`unimodal data check` lists all" in told
    assert not (tmp_path / "out").exists()


def test_what_is_no_data_is_named(dual: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pairs: expected the path of data, or an opened split, got"):
        unimodal.finetune(dual, [("a.png", "a dog")], tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="jobs: "):
        unimodal.finetune(dual, Scenes("train", count=20), tmp_path / "out", jobs="embedding")  # type: ignore[arg-type]


def test_lora_on_a_model_with_adapters_is_refused(tmp_path: Path) -> None:
    model = toy_model(matching=None, captioning=None, generation=None)
    model.add_adapter("news", AdapterConfig(target=("bridge.layers.*",), r=2))
    start = save_checkpoint(model, toy_processor(), tmp_path / "news")
    with pytest.raises(ValueError, match=r"this model has some already \(news\); fold them into the weights first"):
        unimodal.finetune(start, Scenes("train", count=24), tmp_path / "out", train="lora")


def test_nothing_is_replaced(dual: Path, done: Finetuned, tmp_path: Path) -> None:
    pairs = Scenes("train", count=24)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds config.json, which no fine-tuning left; give another folder"):
        unimodal.finetune(dual, pairs, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; give a folder"):
        unimodal.finetune(dual, pairs, tmp_path / "file")
    with pytest.raises(ValueError, match="is what is read; give another folder"):
        unimodal.finetune(dual, pairs, dual)
    before = (done.folder / "finetune.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a fine-tuning of other settings: seed 0 there, 1 here"):
        unimodal.finetune(
            dual, Scenes("train", count=60), done.folder, train="all", epochs=3, learning_rate=3e-3, seed=1
        )
    assert (done.folder / "finetune.json").read_bytes() == before


def test_the_verb_prints_the_table_or_json(dual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_pairs(tmp_path, 24)
    command = words(tmp_path, "--model", dual, "--out", tmp_path / "out", "--epochs", 1)
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert "search by the embedding" in shown.out and "difference" in shown.out and "t2i_r10" in shown.out
    assert (
        "These images also chose the best step" in shown.out
        and f"checkpoint and table: {tmp_path / 'out'}" in shown.out
    )
    assert "pairs has 24 pairs to train on; the settings are chosen for 500 and more" in shown.err
    assert cli.main([*command, "--json"]) == 0  # finished before
    content = json.loads(capsys.readouterr().out)
    assert content["rows"] and content["out"] == str(tmp_path / "out")
