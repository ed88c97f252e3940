"""What the verbs write: nothing of the user's is lost, no work is lost for want of a place, and every stream's end is said in one line."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import model, photos, run, wide  # noqa: F401

from unimodal.cli import evaluate, main, output
from unimodal.data import Scenes, write_karpathy
from unimodal.inference import Unimodal
from unimodal.report.pieces import chances, told_apart


@pytest.fixture
def place(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The working folder: photographs and a small data set; here any work of a model is a failure."""
    write_karpathy({"test": Scenes("test", count=2)}, photos.parent / "data")
    monkeypatch.chdir(photos.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos.parent / "cache"))
    return photos.parent


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be loaded."""

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Unimodal, "from_pretrained", load)
    monkeypatch.setattr(evaluate, "load_checkpoint", load)


DATA = ("--data", "data/dataset.json", "--split", "test")
# a verb and its words up to --out -> what it writes there
FILES = {
    ("embed", "photos"): "vectors.npy",
    ("caption", "photos"): "captions.jsonl",
    ("caption", "photos/a.png"): "captions.csv",
    ("generate", "a star"): "picture.png",
    ("explain", "photos/a.png", "a star"): "why.png",
    ("search", "photos", "a star"): "found.html",
    ("search", "calibrate", "--model", "photos", *DATA): "calibration.json",
    ("mine", *DATA): "negatives.jsonl",
}
FOLDERS = {
    ("evaluate", *DATA): "results.json",
    ("search", "tune", "--recall", "0.5", *DATA): "cost_curve.svg",
    ("export", "onnx"): "anything",
    ("survey", "--data", "data/dataset.json"): "index.html",
}


@pytest.mark.parametrize(("words", "out"), FILES.items())
def test_a_file_of_the_users_stays(words, out: str, place: Path, idle, capsys) -> None:
    (place / out).write_text("the user's")
    status, printed, error = run(capsys, *words, "--out", out)
    assert (status, printed) == (1, "") and f"{out} exists; give another --out, or --overwrite" in error, error
    assert len(error.splitlines()) == 1 and (place / out).read_text() == "the user's"


@pytest.mark.parametrize(("words", "name"), FOLDERS.items())
def test_a_folder_of_the_users_stays(words, name: str, place: Path, idle, capsys) -> None:
    (place / "out").mkdir()
    (place / "out" / name).write_text("the user's")
    status, printed, error = run(capsys, *words, "--out", "out")
    assert (status, printed) == (1, "") and f"out holds {name}; give another folder" in error, error
    assert {path.name: path.read_text() for path in (place / "out").iterdir()} == {name: "the user's"}


def test_the_file_that_names_the_rows_is_the_users_too(place: Path, idle, capsys) -> None:
    (place / "vectors.json").write_text("{}")
    status, _, error = run(capsys, "embed", "photos", "--out", "vectors.npy")
    assert status == 1 and "vectors.json exists" in error and not (place / "vectors.npy").exists()


@pytest.mark.parametrize("words", [*FILES, *FOLDERS])
def test_a_place_that_cannot_be_is_refused_before_the_work(words, place: Path, idle, capsys) -> None:
    name = FILES.get(words, "out")
    (place / "file").write_text("the user's")
    status, _, error = run(capsys, *words, "--out", f"file/below/{name}")
    assert status == 1 and "file is no folder; give another place" in error, error
    if words in FILES:
        (place / f"folder-{name}").mkdir()
        status, _, error = run(capsys, *words, "--out", f"folder-{name}")
        assert status == 1 and "is a folder; give the path of a file" in error, error
        status, _, error = run(capsys, *words, "--out", "out.docx")
        assert status == 1 and "out.docx: expected a name that ends in ." in error, error
    else:
        status, _, error = run(capsys, *words, "--out", "file")
        assert status == 1 and "file is a file; give a folder" in error, error
    assert (place / "file").read_text() == "the user's"


@pytest.mark.parametrize("words", [*FILES, *FOLDERS])
def test_a_folder_that_may_not_be_written_is_refused_before_the_work(
    words, place: Path, idle, capsys, monkeypatch
) -> None:
    def refused(*, dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refused)
    status, _, error = run(capsys, *words, "--out", f"new/{FILES.get(words, 'out')}")
    assert status == 1 and "cannot be written to (Read-only file system); give another place" in error, error
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (("explain", "photos/a.png", "a star"), "photos/a.png"),
        (("explain", "photos/a.png", "a star"), "photos/linked.png"),
        (("mine", "--data", "rows.jsonl"), "rows.jsonl"),
        (("evaluate", "--data", "photos"), "photos"),
        (("evaluate", "--data", "photos"), "photos/../photos"),
        (("search", "tune", "--recall", "0.5", "--data", "photos"), "photos"),
        (("survey", "--data", "photos"), "photos"),
        (("export", "onnx", "--model", "photos"), "photos"),
        (("export", "cross-encoder", "--model", "photos"), "photos"),
    ],
)
def test_what_is_read_is_never_replaced(words, out: str, place: Path, idle, capsys) -> None:
    (place / "rows.jsonl").write_text('{"image": "photos/a.png", "caption": "a star"}\n')
    (place / "photos/linked.png").symlink_to("a.png")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    willing = () if words[0] in ("survey", "export") else ("--overwrite",)
    status, _, error = run(capsys, *words, "--out", out, *willing)
    assert status == 1 and "is what is read; give another place" in error, error
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_verb_makes_the_folders_that_lead_to_its_output(model: Path, place: Path, capsys) -> None:  # noqa: F811
    for words in (("embed", "photos"), ("caption", "photos/a.png", "--num_beams", 1), ("generate", "a star")):
        out = place / "new" / words[0] / FILES.get(words[:2], "x.jsonl")
        assert run(capsys, *words, "--model", model, "--out", out)[0] == 0 and out.is_file()


def test_overwrite_replaces_and_a_fault_in_writing_does_not(model: Path, place: Path, capsys, monkeypatch) -> None:  # noqa: F811
    ask = ("embed", "a star", "--model", model, "--out", "vectors.npy", "--overwrite")
    for name in ("vectors.npy", "vectors.json"):
        (place / name).write_text("old")
    save = np.save

    def full(file, vectors) -> None:
        save(file, vectors)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    status, _, error = run(capsys, *ask)
    assert status == 1 and "No space left on device" in error and len(error.splitlines()) == 1
    assert (place / "vectors.npy").read_text() == (place / "vectors.json").read_text() == "old"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert run(capsys, *ask)[0] == 0 and np.load("vectors.npy").shape == (1, 16)
    assert {path.name for path in place.iterdir() if path.name.startswith((".", "vec"))} == {
        "vectors.npy",
        "vectors.json",
    }


@pytest.mark.parametrize(
    ("words", "fault"),
    [(("bad.jpg",), "none of the 1 inputs"), (("a.png", "--candidates", "9", "--num_beams", "2"), "")],
)
def test_captions_that_come_to_nothing_leave_the_old_file(
    words,
    fault,
    model: Path,  # noqa: F811
    place: Path,
    capsys,
    monkeypatch,  # noqa: F811
) -> None:
    monkeypatch.chdir(place / "photos")
    Path("captions.csv").write_text("image,caption\nx.png,of an earlier run\n")
    if not fault:

        def stopped(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(Unimodal, "caption", stopped)
        fault = "unimodal caption: interrupted"
    status, _, error = run(capsys, "caption", *words, "--model", model, "--out", "captions.csv", "--overwrite")
    assert status and fault in error
    assert Path("captions.csv").read_text() == "image,caption\nx.png,of an earlier run\n"


def test_an_evaluation_takes_the_place_of_an_older_one_whole_or_not_at_all(
    model: Path,  # noqa: F811
    place: Path,
    capsys,
    monkeypatch,
) -> None:
    ask = ("evaluate", "--model", model, *DATA, "--out", "out")
    assert run(capsys, *ask, "--rerank_top_k", 1)[0] == 0
    (place / "out/notes.txt").write_text("the user's")
    first = {path.name: path.read_bytes() for path in (place / "out").iterdir()}

    def broken(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_page", broken)
        status, _, error = run(capsys, *ask, "--rerank_top_k", 0)
    assert status == 1 and "No space left" in error
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == first
    status, printed, error = run(capsys, *ask, "--rerank_top_k", 0, "--json")
    assert status == 0, error
    held = json.loads((place / "out/results.json").read_text())
    assert "reranked" not in held and json.loads(printed) == {**held, "out": "out"}
    assert (place / "out/notes.txt").read_text() == "the user's"


# Results as JSON.


def told(capsys, *words: object) -> tuple[int, dict, str]:
    """Exit status, the JSON document on standard output, standard error."""
    status, output, error = run(capsys, *words, "--json")
    return status, json.loads(output), error


def test_search_rank_and_caption_as_json(model: Path, place: Path, capsys) -> None:  # noqa: F811
    (place / "photos/b.png").rename(place / "photos/été 日本.png")
    names = ["a.png", "more/c.png", "été 日本.png"]
    ours = Unimodal.from_pretrained(model)
    status, found, error = told(capsys, "search", "photos", "a red circle", "--model", model, "--top_k", 3)
    assert status == 0 and "bad.jpg" in error and list(found["skipped"]) == ["bad.jpg"]
    assert list(found) == ["query", "folder", "pictures", "judged", "order", "hits", "skipped", "page"]
    assert sorted(hit["id"] for hit in found["hits"]) == names and [hit["rank"] for hit in found["hits"]] == [1, 2, 3]
    assert list(found["hits"][0]) == ["id", "document", "rank", "score", "first_score", "rerank_score"]
    vector = ours.encode("a red circle")
    for hit in found["hits"]:
        cosine = float(vector @ ours.encode(Path(hit["document"])))
        assert hit["first_score"] == pytest.approx(cosine, abs=1e-6) and hit["first_score"] != round(
            hit["first_score"], 3
        )
    assert "&lt;" not in Path(found["page"]).read_text() and "été 日本.png" in Path(found["page"]).read_text()

    status, ranked, error = told(capsys, "rank", "a red circle", "photos", "--model", model)
    expected = ours.rank("a red circle", [place / "photos" / name for name in names])
    assert status == 0 and "skipped: " in error and list(ranked["skipped"]) == [str(Path("photos/bad.jpg"))]
    assert [hit["score"] for hit in ranked["hits"]] == [one["score"] for one in expected]
    assert [hit["document"] for hit in ranked["hits"]] == [f"photos/{names[one['corpus_id']]}" for one in expected]

    status, written, _ = told(capsys, "caption", "photos", "--model", model, "--num_beams", 1)
    assert status == 0 and [one["image"] for one in written["captions"]] == [f"photos/{name}" for name in names]
    assert list(written["skipped"]) == ["photos/bad.jpg"]


def test_other_verbs_as_json(model: Path, place: Path, capsys) -> None:  # noqa: F811
    ask = ("--model", model)
    _, embedded, _ = told(capsys, "embed", "a star", *ask, "--out", "x.npy")
    assert embedded == {"vectors": "x.npy", "rows": "x.json", "shape": [1, 16], "dtype": "float32", "skipped": {}}
    _, drawn, _ = told(capsys, "generate", "a star", *ask, "--num_inference_steps", 1)
    assert drawn == {"picture": "picture.png"}
    _, why, _ = told(capsys, "explain", "photos/a.png", "a star", *ask, "--steps", 2)
    assert [one["word"] for one in why["words"]] == ["a", "star"] and why["picture"] == "why.png"
    _, mined, _ = told(capsys, "mine", *ask, *DATA, "--out", "n.jsonl", "--judge", "cosine")
    assert mined["negatives"] == "n.jsonl" and mined["kept"].keys() == {"images", "captions"}
    status, checked, _ = told(capsys, "data", "check", "photos")
    assert status == 1 and checked["splits"]["all"] == {"images": 4, "captions": 0}
    assert [one["kind"] for one in checked["findings"]][0] == "pictures" and "bad.jpg" in checked["findings"][0][
        "cases"
    ][0]
    for out in ("a", "b"):
        assert told(capsys, "evaluate", *ask, *DATA, "--out", out)[0] == 0
    _, compared, _ = told(capsys, "compare", "a", "b", "--samples", 20)
    assert compared["stage"] == "reranked" and compared["metrics"]["rsum"]["difference"] == 0
    assert {"a", "b", "low", "high", "p_value"} <= compared["metrics"]["t2i_r1"].keys()


def test_a_fault_leaves_no_json(place: Path, idle, capsys) -> None:
    status, output, error = run(capsys, "search", "nowhere", "a star", "--json")
    assert (status, output) == (1, "") and "nowhere: no such folder" in error


def test_each_search_has_its_page_and_old_ones_go(model: Path, place: Path, capsys, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("unimodal.cli.photos.PAGES", 3)
    pages = []
    for words in ("a star", "a circle", "a star", "a square", "red"):
        status, output, _ = run(capsys, "search", "photos", words, "--model", model, "--top_k", 1)
        pages.append(Path(output.splitlines()[-1]))
        assert status == 0 and f"<h1>{words}</h1>" in pages[-1].read_text()
    assert len(set(pages)) == 5 and [page.exists() for page in pages] == [False, False, True, True, True]


# Names that are not UTF-8, and terminals that cannot show a name.


def latin(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    try:
        Scenes("val", count=1).image(0).save(path)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return path


def test_a_name_that_is_not_utf8_comes_back_from_the_rows(model: Path, place: Path, capsys) -> None:  # noqa: F811
    path = latin(place)
    status, _, error = run(capsys, "embed", path, "photos/a.png", "--model", model, "--out", "vectors.npy")
    assert status == 0, error
    assert json.loads((place / "vectors.json").read_text()) == [str(path), "photos/a.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_verb_prints_any_name(encoding: str, model: Path, place: Path, monkeypatch) -> None:  # noqa: F811
    path = latin(place)
    Scenes("val", count=1).image(0).save(place / "日本é.png")
    latin(place / "photos")
    ask = ("--model", str(model))
    for words in (
        ("rank", "a star", str(path), str(place / "日本é.png"), *ask),
        ("rank", "a star", str(path), str(place / "日本é.png"), *ask, "--json"),
        ("caption", str(place), "--num_beams", "1", *ask),
        ("caption", str(place), "--num_beams", "1", *ask, "--json"),
        ("search", str(place), "a star", "--top_k", "9", *ask),
        ("search", str(place), str(path), "--top_k", "9", *ask, "--json"),
        ("embed", str(path), *ask, "--out", str(place / "é.npy"), "--overwrite"),
        ("explain", str(path), "a star", *ask, "--out", str(place / "caf\udce9.jpg"), "--overwrite", "--steps", "1"),
        ("data", "check", str(place / "photos")),
        ("data", "check", str(place / "photos"), "--json"),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        main(list(words))
        sys.stdout.flush()
        text = raw.getvalue()
        if "--json" in words:
            json.loads(text.decode("utf-8"))
            assert "日本é.png" in text.decode("utf-8") or words[0] == "data"
        else:
            assert text.decode(encoding)


# How a verb ends.


def unimodal(*words: str, stdout: object, unbuffered: str) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-m", "unimodal", *words], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, env=env)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_is_no_fault(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = unimodal("--help", stdout=writing, unbuffered=unbuffered)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_standard_output_is_one_line(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        ended = unimodal("--help", stdout=full, unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (1, "unimodal --help: [Errno 28] No space left on device\n")


def test_a_text_that_is_not_unicode_is_said_to_be_none(model: Path, place: Path, capsys) -> None:  # noqa: F811
    for words in (
        ("embed", "caf\udce9", "--out", "x.npy"),
        ("search", "photos", "caf\udce9"),
        ("search", "photos", "a star", "--prompt", "caf\udce9"),
        ("rank", "caf\udce9", "photos/a.png"),
        ("explain", "photos/a.png", "caf\udce9"),
        ("generate", "caf\udce9"),
    ):
        status, _, error = run(capsys, *words, "--model", model)
        assert status == 1 and "has half of a character, '\\udce9' at place 3" in error.splitlines()[-1], error


def test_an_interrupted_verb_says_so(place: Path, capsys, monkeypatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unimodal.cli.verbs.pictures_in", interrupted)
    status, _, error = run(capsys, "embed", "photos", "--out", "x.npy")
    assert (status, error) == (130, "unimodal embed: interrupted\n")


# Values of options.


@pytest.mark.parametrize(
    "words",
    [
        ("embed", "x", "--out", "x.npy", "--device", "gpu"),
        ("embed", "x", "--out", "x.npy", "--device", "cuda:300"),
        ("embed", "x", "--out", "x.npy", "--device", "meta"),
        ("embed", "x", "--out", "x.npy", "--device", ""),
        ("embed", "x", "--out", "x.npy", "--model", ""),
        ("embed", "x", "--out", "x.npy", "--truncate_dim", "0"),
        ("embed", "x", "--out", "x.npy", "--heads", ","),
        ("search", ".", "x", "--top_k", "0"),
        ("search", ".", "x", "--top_k", "9" * 30),
        ("search", ".", "x", "--rerank_top_k", "-1"),
        ("search", "tune", "--data", "scenes", "--recall", "nan"),
        ("search", "calibrate", "--data", "scenes", "--depth", "0"),
        ("rank", "x", "y.png", "--top_k", "1.5"),
        ("caption", "x.png", "--num_beams", "0"),
        ("caption", "x.png", "--max_new_tokens", "-3"),
        ("caption", "x.png", "--candidates", "0"),
        ("generate", "x", "--seed", "-1"),
        ("generate", "x", "--seed", "9" * 30),
        ("generate", "x", "--guidance_scale", "inf"),
        ("generate", "x", "--num_inference_steps", "0"),
        ("mine", "--data", "scenes", "--out", "x.jsonl", "--margin", "nan"),
        ("evaluate", "--data", "scenes", "--out", "x", "--folds", "0"),
        ("evaluate", "--data", "scenes", "--out", "x", "--batch_size", "0"),
        ("evaluate", "--data", "scenes", "--out", "x", "--device", "gpu"),
        ("compare", "a", "b", "--samples", "0"),
        ("explain", "x.png", "x", "--steps", "0"),
        ("survey", "--data", "scenes", "--noise", "nan"),
        ("survey", "--data", "scenes", "--shots", "0"),
        ("app", "--port", "0"),
        ("app", "--port", "70000"),
        ("data", "check", ".", "--max_length", "0"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line(words, place: Path, idle, capsys) -> None:
    status, printed, error = run(capsys, *words)
    assert (status, printed, len(error.splitlines())) == (2, "", 1), error
    assert (
        error.startswith(f"unimodal {words[0]}")
        and "argument --" in error
        and "expected" in error
        or "is not on" in error
    )


# Numbers.


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.5, 0.25], ["0.500", "0.250"]),
        ([0.5, 0.5], ["0.500", "0.500"]),
        ([0.00012, 0.00034], ["0.0001", "0.0003"]),
        ([1.2e-9, 3.4e-9, 0.5], ["1.2e-09", "3.4e-09", "0.5"]),
        ([0.12345, 0.12341], ["0.1235", "0.1234"]),
        ([0.123451, 0.123452, 0.5], ["0.123451", "0.123452", "0.500000"]),
        ([-0.0001], ["-0.0001"]),
        ([0.0], ["0.000"]),
        ([], []),
    ],
)
def test_numbers_that_differ_look_different(values, texts) -> None:
    assert told_apart(values) == texts


def test_chances_that_differ_look_different() -> None:
    assert chances([0.42, None, 0.9999]) == ["42.0%", "–", ">99.9%"]
    assert chances([1e-5, 2e-5, None]) == ["0.001%", "0.002%", "–"]
    assert chances([0.99991, 0.99992]) == ["99.991%", "99.992%"]
    assert chances([1.0, 0.999999999]) == ["100.00000%", "99.9999999%"] or len(set(chances([1.0, 0.999999999]))) == 2


def test_a_warning_is_a_line_without_the_place_in_the_code(model: Path, place: Path, capsys) -> None:  # noqa: F811
    picture = io.BytesIO()
    Scenes("test", count=1).image(0).resize((64, 64)).save(picture, "JPEG")
    (place / "cut.jpg").write_bytes(picture.getvalue()[:-2])
    status, _, said = run(capsys, "embed", (place / "cut.jpg").as_uri(), "--model", model, "--out", "cut.npy")
    assert status == 0 and "cut.jpg" in said and ".py" not in said and "Warning" not in said


def test_explain_takes_the_address_of_a_file(model: Path, place: Path, capsys) -> None:  # noqa: F811
    address = next((place / "photos").glob("*.png")).as_uri()
    status, *told = run(capsys, "explain", address, "a red circle", "--model", model, "--out", "why.png", "--steps", 2)
    assert status == 0 and (place / "why.png").is_file(), told
