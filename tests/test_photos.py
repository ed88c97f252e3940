"""One's own pictures: a folder is read once, what changed is read again, what cannot be read is named, what was found is shown."""

import csv
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from test_cli import model, photos, run, wide  # noqa: F401
from test_report import Balanced
from toy import toy_model, toy_processor

from unimodal import recipes
from unimodal.data import CsvTable, JsonLines
from unimodal.data.scenes import Scenes
from unimodal.data.texts import UnknownWordsWarning
from unimodal.files import LOCK
from unimodal.inference import Unimodal
from unimodal.search import Encoder, build_index, cache_folder, index_folder


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Encoder:
    """The toy model's, with the pictures that it was given to read in `read`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder = Encoder(toy_model(), toy_processor())
    encoder.read_images = []  # type: ignore[attr-defined]
    images = encoder.images

    def counted(sources):
        encoder.read_images += sources  # type: ignore[attr-defined]
        return images(sources)

    encoder.images = counted  # type: ignore[method-assign]
    return encoder


def times(encoder: Encoder) -> int:
    """How many pictures were read since the last time that this was asked."""
    count = len(encoder.read_images)  # type: ignore[attr-defined]
    encoder.read_images.clear()  # type: ignore[attr-defined]
    return count


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_what_has_not_changed_is_not_read_again(encoder: Encoder, photos: Path) -> None:  # noqa: F811
    first = index_folder(encoder, photos)
    assert (times(encoder), first.fresh, first.stale) == (3, 4, 0)
    assert first.index.ids == ["a.png", "b.png", "more/c.png"]
    assert list(first.skipped) == ["bad.jpg"] and "is no image" in first.skipped["bad.jpg"]

    again = index_folder(encoder, photos)
    assert (times(encoder), again.fresh, again.stale, again.skipped) == (0, 0, 0, first.skipped)

    Scenes("val", count=4).image(3).save(photos / "b.png")
    os.utime(photos / "b.png", ns=(1, 1))
    (photos / "a.png").unlink()
    Scenes("val", count=5).image(4).save(photos / "d.png")
    Scenes("val", count=5).image(4).save(photos / "bad.jpg")
    third = index_folder(encoder, photos)
    assert (times(encoder), third.fresh, third.stale, third.skipped) == (
        3,
        3,
        3,
        {},
    )  # b changed, bad mended, d new; a is gone
    assert sorted(map(str, third.index.ids)) == ["b.png", "bad.jpg", "d.png", "more/c.png"]
    (hit,) = third.index.search(photos / "b.png", top_k=1)
    assert hit["id"] == "b.png" and hit["first_score"] == pytest.approx(1, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_an_interrupted_folder_is_gone_on_with(encoder: Encoder, photos: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("unimodal.search.store.PART", 2)
    read = encoder.images

    def interrupted(sources):
        if len(encoder.read_images) == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return read(sources)

    encoder.images = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        index_folder(encoder, photos, batch_size=1)
    assert times(encoder) == 2
    encoder.images = read  # type: ignore[method-assign]
    assert len(index_folder(encoder, photos, batch_size=1).index) == 3
    assert times(encoder) == 1  # the first part was kept


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_another_model_has_an_index_of_its_own(encoder: Encoder, photos: Path) -> None:  # noqa: F811
    other = Encoder(toy_model(seed=1), toy_processor())
    mine, theirs = index_folder(encoder, photos).index, index_folder(other, photos).index
    assert mine.folder != theirs.folder and mine.folder.parent == theirs.folder.parent == cache_folder(photos)
    assert not any(path.is_relative_to(photos) for path in (mine.folder, theirs.folder))
    kept = photos.parent / "kept"
    index_folder(encoder, photos, kept)
    with pytest.warns(UserWarning, match=f"was made by model .* All pictures in {photos} are read again"):
        taken = index_folder(other, photos, kept)
    assert taken.fresh == 4 and len(taken.index) == 3


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
@pytest.mark.parametrize("whose", ["mine", "another model's", "another folder's", "of another format", "foreign"])
def test_an_index_of_something_else_stays_as_it_is(whose: str, encoder: Encoder, photos: Path) -> None:  # noqa: F811
    kept = photos.parent / "kept"
    held = "something that is not the index of a folder"
    if whose == "another folder's":
        index_folder(encoder, photos / "more", kept)
        held = f"the index of {photos / 'more'}"
    elif whose == "foreign":
        kept.mkdir()
        (kept / "index.json").write_text("[]")
    else:
        maker = Encoder(toy_model(seed=1), toy_processor()) if whose == "another model's" else encoder
        build_index(maker, ["a red circle"], folder=kept)
    if whose == "of another format":
        (kept / "index.json").write_text('{"format": 1}')
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    expected = f"kept holds {held}, expected the index of {photos}; choose another folder for the index, or delete it"
    with pytest.raises(ValueError, match=expected):
        index_folder(encoder, photos, kept)
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    index_folder(encoder, photos, photos.parent / "free")
    with pytest.raises(ValueError, match="free holds another index: other .*root"):
        build_index(encoder, ["a red circle"], folder=photos.parent / "free")


def test_folders_of_one_name_are_told_apart_and_one_folder_by_two_names_is_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x/photos").mkdir(parents=True)
    assert cache_folder("x/photos") == cache_folder(tmp_path / "x/photos") != cache_folder("photos")
    assert cache_folder("photos").name.startswith("photos-")


def test_an_index_that_cannot_be_kept_says_what_to_do(encoder: Encoder, photos: Path, monkeypatch) -> None:  # noqa: F811
    advice = "the index cannot be kept there .*; give another folder for the index, or set XDG_CACHE_HOME"
    with pytest.raises(PermissionError, match=f"a.png/x: {advice}"):
        index_folder(encoder, photos, photos / "a.png/x")
    with pytest.raises(ValueError, match="is not empty and holds no index; choose another folder"):
        index_folder(encoder, photos, photos)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"kept: {advice}"):
        index_folder(encoder, photos, photos.parent / "kept")


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
@pytest.mark.parametrize("broken", ["index.json", "documents.sqlite", "part-00000.safetensors"])
def test_an_index_that_is_broken_is_made_again(broken: str, encoder: Encoder, photos: Path) -> None:  # noqa: F811
    folder = index_folder(encoder, photos).index.folder
    content = (folder / broken).read_bytes()
    if broken == "index.json":
        (folder / broken).write_bytes(content.replace(b'"part": 1024', b'"part": "no"'))
    else:
        (folder / broken).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=f"{broken}.* All pictures in .* are read again"):
        again = index_folder(encoder, photos)
    assert (again.fresh, len(again.index)) == (4, 3)


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_an_index_of_the_version_before_is_gone_on_with(encoder: Encoder, photos: Path) -> None:  # noqa: F811
    folder = index_folder(encoder, photos).index.folder
    (folder / LOCK).unlink()  # that version locked nothing, and numbered no changes
    with closing(sqlite3.connect(folder / "documents.sqlite")) as db, db:
        assert db.execute("delete from facts where name = 'generation'").rowcount == 1
    times(encoder)
    found = index_folder(encoder, photos)
    assert (found.fresh, found.stale, times(encoder), len(found.index)) == (0, 0, 0, 3)
    Image.new("RGB", (40, 30), "red").save(photos / "new.png")
    assert index_folder(encoder, photos).fresh == 1
    assert len(found.index.search("a red circle", top_k=9)) == len(found.index) == 4


def test_from_python(photos: Path) -> None:  # noqa: F811
    ours = Unimodal(toy_model(), toy_processor())
    with pytest.warns(UserWarning, match="1 of 4 documents could not be read"):
        index = ours.index_folder(photos)
    assert [hit["rank"] for hit in index.search("a red circle", top_k=2)] == [1, 2]


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_hidden_and_foreign_files_are_no_pictures(encoder: Encoder, photos: Path) -> None:  # noqa: F811
    (photos / ".thumbnails").mkdir()
    for name in (".thumbnails/a.png", "._a.png"):
        Scenes("val", count=1).image(0).save(photos / name)
    for name in ("one.DNG", "two.dng", "three.cr2", "four.txt"):
        (photos / name).write_bytes(b"x")
    found = index_folder(encoder, photos)
    assert found.index.ids == ["a.png", "b.png", "more/c.png"] and list(found.skipped) == ["bad.jpg"]
    assert found.others == "not read: 1 .cr2, 2 .dng; convert these to JPEG"
    only = photos.parent / "only"
    only.mkdir()
    (only / "one.dng").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"only holds no pictures; expected files that end in \.jpg.*; not read: 1 \.dng"
    ):
        index_folder(encoder, only)
    with pytest.raises(ValueError, match="a.png is a file; give the folder that holds the pictures"):
        index_folder(encoder, photos / "a.png")


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_linked_folders_are_indexed_once_and_links_to_nothing_are_named(encoder: Encoder, photos: Path) -> None:  # noqa: F811
    elsewhere = photos.parent / "elsewhere"
    elsewhere.mkdir()
    Scenes("val", count=1).image(0).save(elsewhere / "d.png")
    for name, target in {"2023": elsewhere, "again": elsewhere, "loop": photos, "gone.jpg": photos / "nowhere"}.items():
        (photos / name).symlink_to(target)
    found = index_folder(encoder, photos)
    assert found.index.ids == ["2023/d.png", "a.png", "b.png", "more/c.png"]
    assert sorted(found.skipped) == ["bad.jpg", "gone.jpg"] and "No such file" in found.skipped["gone.jpg"]
    assert found.others == "not followed: 'again', 'loop', linked to a folder that is read already or holds this one"
    assert index_folder(encoder, photos).fresh == 0


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_a_name_that_no_index_can_hold_is_left_out(encoder: Encoder, photos: Path, model, capsys) -> None:  # noqa: F811
    odd = os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")
    try:
        Scenes("val", count=1).image(0).save(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = index_folder(encoder, photos)
    assert len(found.index) == 3 and "caf\\udce9.png' has a name that is not UTF-8; rename it" in " ".join(
        found.skipped.values()
    )
    status, output, error = run(capsys, "caption", photos, "--model", model, "--num_beams", 1)
    assert status == 0 and len(output.splitlines()) == 3 and "2 of 5 pictures skipped" in error


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_a_picture_that_may_not_be_read_is_left_out(encoder: Encoder, photos: Path, monkeypatch) -> None:  # noqa: F811
    opened = Path.open

    def refused(path: Path, *args, **options):
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    found = index_folder(encoder, photos)
    assert found.index.ids == ["a.png", "more/c.png"] and "Permission denied" in found.skipped["b.png"]


def test_none_can_be_read(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("no picture")
    with (
        pytest.warns(UserWarning, match="1 of 1 documents"),
        pytest.raises(ValueError, match="none of the 1 pictures in .* can be read: .*x.jpg' is no image"),
    ):
        index_folder(encoder, tmp_path)


# The page of a search.


def test_search_writes_its_page(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    out = photos.parent / "pages/found.html"
    ask = ("search", photos, "a <red> circle", "--model", model, "--top_k", 2, "--rerank_top_k", 1, "--out", out)
    status, output, error = run(capsys, *ask)
    assert status == 0 and output.splitlines()[-1] == str(out), error
    text = out.read_text()
    tags = [tag for tag, _ in Balanced(text).seen]
    assert "http:" not in text and "https:" not in text and not {"script", "link", "iframe"} & set(tags)
    assert tags.count("img") == 4  # two results, each with its heat-map
    for shown in (
        "a &lt;red&gt; circle",
        "&lt;red&gt;</span>",
        "The best 2 of 3 pictures",
        "1 of 3",
        "bad.jpg",
        "Ordered by the match score. The match score tells better from worse; uncalibrated, it is no probability.",
        f'<a href="{photos.as_uri()}/',
    ):
        assert shown in text, shown
    assert "Ordered by the match score" in output
    assert text.count("<span>match <b>") == 1  # the second was not judged


def test_a_picture_is_asked(model: Path, photos: Path, capsys, monkeypatch) -> None:  # noqa: F811
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    status, output, _ = run(capsys, "search", photos, photos / "a.png", "--model", model, "--top_k", 1, "--open")
    page = Path(output.splitlines()[-1])
    assert status == 0 and page.parent == cache_folder(photos) / "pages" and opened == [page.as_uri()]
    text = page.read_text()
    tags = [tag for tag, _ in Balanced(text).seen]
    assert tags.count("img") == 2 and "red speaks" not in text and "Pictures like this one" in text


def test_what_was_read_is_said(model: Path, photos: Path, capsys, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos.parent / "cache"))
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    ask = ("search", photos, "a star", "--model", model, "--top_k", 1)
    _, _, error = run(capsys, *ask, "--open")
    assert f"{photos}: read 3 pictures; what was read is kept in {cache_folder(photos)}" in error
    assert "no browser could be started; open the page yourself" in error
    (photos / "a.png").unlink()
    for place in range(20):
        (photos / f"bad{place:02}.jpg").write_text("no picture")
    _, output, error = run(capsys, *ask)
    assert f"{photos}: read what is new or has changed (20), forgot what is gone or has changed (1)" in error
    assert error.count("skipped: ") == 10 and "21 of 23 pictures skipped, 10 of them named above" in error
    assert Path(output.splitlines()[-1]).read_text().count("is no image") == 21


@pytest.mark.filterwarnings("ignore:.*could not be read and are not in the index")
def test_another_models_index_is_made_again_and_that_is_said(model: Path, photos: Path, capsys) -> None:  # noqa: F811
    kept = photos.parent / "kept"
    index_folder(Encoder(toy_model(seed=1), toy_processor()), photos, kept)
    _, _, error = run(capsys, "search", photos, "a star", "--model", model, "--top_k", 1, "--index", kept)
    said = [line for line in error.splitlines() if line.startswith(f"{kept} was made by model ")]
    assert len(said) == 1 and said[0].endswith(f"All pictures in {photos} are read again")
    assert error.index(said[0]) < error.index(f"{photos}: read 3 pictures; what was read is kept in {kept}")


def test_folder_and_query_that_changed_places(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    status, _, error = run(capsys, "search", "a dog", photos)
    assert status == 1 and f"a dog: no such folder; the folder comes first: unimodal search {photos} 'a dog'" in error


def test_words_that_the_model_does_not_know_are_said_in_place_of_a_match(model: Path, photos: Path, capsys) -> None:  # noqa: F811
    unknown = "the model knows none of the words of 'zxqv flurb'"
    status, output, error = run(capsys, "search", photos, "zxqv flurb", "--model", model)
    assert status == 0 and unknown in error and "%" not in output and "Ordered by the cosine" in output
    assert unknown[1:] in Path(output.splitlines()[-1]).read_text().replace("&#x27;", "'")
    status, output, error = run(capsys, "search", photos, "zxqv flurb", "--model", model, "--json")
    assert [hit["rerank_score"] for hit in json.loads(output)["hits"]] == [None] * 3 and unknown[1:] in json.loads(
        output
    )["order"]
    status, output, error = run(capsys, "rank", "zxqv flurb", photos, "--model", model)
    assert (status, output) == (1, "") and f"query: {unknown}" in error


def test_python_says_what_words_are_not_known(photos: Path) -> None:  # noqa: F811
    ours = Unimodal(toy_model(), toy_processor())
    pictures = [photos / "a.png", photos / "b.png"]
    index = ours.build_index(pictures)
    with pytest.warns(UnknownWordsWarning, match="knows none of the words of '日本'"):
        known, unknown = index.search(["a red circle", "日本"], top_k=2)
    assert all(hit["rerank_score"] is not None for hit in known)
    assert all(hit["rerank_score"] is None and hit["score"] == hit["first_score"] for hit in unknown)
    with pytest.warns(UnknownWordsWarning, match="zxqv"):
        ours.predict([(pictures[0], "zxqv")])
    with pytest.raises(ValueError, match="query: the model knows none of the words of 'zxqv'"):
        ours.rank("zxqv", pictures)
    ours.rank("zxqv circle", pictures)  # one of them is known


# Captions.


@pytest.mark.parametrize(("suffix", "reader"), [(".jsonl", JsonLines), (".csv", CsvTable)])
def test_captions_are_written_as_our_readers_read_them(suffix: str, reader, model, photos: Path, capsys) -> None:  # noqa: F811
    out = photos.parent / f"captions{suffix}"
    status, output, error = run(capsys, "caption", photos, "--model", model, "--num_beams", 1, "--out", out)
    assert status == 0 and "1 of 4 pictures skipped" in error
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        rows = list(csv.DictReader(out.open(newline="")))
    assert [f"{row['image']}: {row['caption']}" for row in rows] == output.splitlines() and len(rows) == 3
    assert [Path(row["image"]).relative_to(photos).as_posix() for row in rows] == ["a.png", "b.png", "more/c.png"]


def test_captions_on_a_terminal_are_a_table(model, photos: Path, capsys, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    status, output, _ = run(capsys, "caption", photos / "a.png", "--model", model, "--num_beams", 1)
    assert status == 0 and all(shown in output for shown in ("┃", "caption", "a.png"))


def test_captions_go_to_no_other_file(model, photos: Path, capsys) -> None:  # noqa: F811
    status, _, error = run(capsys, "caption", photos, "--model", model, "--out", photos.parent / "captions.txt")
    assert status == 1 and "captions.txt: expected a name that ends in .jsonl or .csv" in error


# The shipped checkpoint.


def test_the_shipped_checkpoint_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "clone/unimodal")
    with pytest.raises(FileNotFoundError, match="no model in checkpoints/unimodal-small.*give --model"):
        recipes.shipped_checkpoint()
    for root in (tmp_path / "here", tmp_path / "clone"):  # the clone's goes before
        (root / recipes.CHECKPOINT).mkdir(parents=True)
        (root / recipes.CHECKPOINT / "config.json").write_text("{}")
        assert recipes.shipped_checkpoint().resolve() == root / recipes.CHECKPOINT
