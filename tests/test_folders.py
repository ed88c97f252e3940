"""Proves which files of a folder are taken for pictures, and that what is left out is told."""

from pathlib import Path

import pytest
from PIL import Image

from unimodal.data import ImageFolder, load_image, open_splits
from unimodal.data.folders import find_pictures, pictures_in


def save(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path, "PNG")
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_pictures(folder).pictures]


def test_pictures_are_told_by_their_ending_in_capitals_or_not(tmp_path: Path) -> None:
    for name in (
        "a.JPG",
        "b.jpe",
        "c.jfif",
        "d.HEIC",
        "e.avif",
        "f.jp2",
        "g.mpo",
        "h.txt",
        "i.jpg.part",
        "jpg",
        "more/k.PGM",
    ):
        save(tmp_path / name)
    assert names(tmp_path) == ["a.JPG", "b.jpe", "c.jfif", "d.HEIC", "e.avif", "f.jp2", "g.mpo", "more/k.PGM"]


def test_hidden_files_and_what_systems_keep_are_no_pictures(tmp_path: Path) -> None:
    for name in (
        "._a.jpg",
        ".hidden.png",
        ".jpg",
        ".thumbnails/a.png",
        "__MACOSX/a.jpg",
        "more/@eaDir/a.jpg/THUMB.jpg",
    ):
        save(tmp_path / name)
    for name in ("Thumbs.db", "$RECYCLE.BIN/a.jpg"):
        save(tmp_path / name)
    save(tmp_path / "more" / "a.jpg")
    assert names(tmp_path) == ["more/a.jpg"]
    assert [path.name for path in (s.file for s in ImageFolder(tmp_path).samples)] == ["a.jpg"]


def test_a_linked_folder_is_followed_once(tmp_path: Path) -> None:
    photos, nas = tmp_path / "photos", tmp_path / "nas"
    save(photos / "z" / "here.png")
    save(nas / "there.png")
    (photos / "2023").symlink_to(nas)
    (photos / "again").symlink_to(nas)
    (photos / "a").symlink_to(photos / "z")  # whose name comes before that of the folder itself
    found = find_pictures(photos)
    assert names(photos) == ["2023/there.png", "z/here.png"]
    assert found.left_out.startswith("not followed: 'a', 'again', linked to a folder that is read already")


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    save(photos / "one.png")
    save(tmp_path / "outside.png")
    (photos / "self").symlink_to(photos)
    (photos / "up").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    (photos / "out").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(photos)
    save(tmp_path / "other" / "two.png")
    found = find_pictures(photos)
    assert names(photos) == ["one.png", "out/two.png"]
    assert [link.relative_to(photos).as_posix() for link in found.links] == ["self", "up", "out/back"]


@pytest.mark.parametrize("name", ["loop.jpg", "loop"])
def test_a_link_to_itself_ends(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / name).symlink_to(tmp_path / name)
    assert names(tmp_path) == (["a.png", "loop.jpg"] if name == "loop.jpg" else ["a.png"])
    if name == "loop.jpg":
        with pytest.raises(ValueError, match="loop.jpg' cannot be the path of an image"):
            load_image(tmp_path / name)


def test_a_folder_may_be_called_like_a_picture(tmp_path: Path) -> None:
    save(tmp_path / "holiday.jpg" / "a.png")
    assert names(tmp_path) == ["holiday.jpg/a.png"]


def test_a_folder_that_is_itself_a_link_is_read(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "one.png")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    assert names(tmp_path / "link") == ["one.png"]


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    for name in ("a.dng", "b.DNG", "c.psd"):
        save(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"holds no pictures; expected files that end in \.jpg, .*; not read: 2 \.dng, 1 \.psd"
    ):
        pictures_in(tmp_path)
    save(tmp_path / "d.png")
    with pytest.warns(UserWarning, match="not read: 2 .dng, 1 .psd; convert these to JPEG"):
        ImageFolder(tmp_path)


def test_a_link_to_nothing_is_named_by_who_opens_it(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert names(tmp_path) == ["a.png", "gone.jpg"]
    with pytest.warns(UserWarning, match="gone.jpg.*there is no image file"):
        assert len(ImageFolder(tmp_path, on_error="skip")) == 1


def test_hidden_tables_and_shards_do_not_count(tmp_path: Path) -> None:
    """As a Mac leaves them beside one's own on a foreign disk."""
    for name in ("a.csv", "._a.csv"):
        (tmp_path / name).write_text("image,caption\na.png,one\n")
    (tmp_path / "._b.tar").write_bytes(b"x")
    save(tmp_path / "a.png")
    assert open_splits(tmp_path)[0] == "CsvTable"
    (tmp_path / "a.csv").unlink()
    assert open_splits(tmp_path)[0] == "ImageFolder"
    with pytest.raises(FileNotFoundError, match="no file fits"):
        open_splits(tmp_path / "*.tar")
