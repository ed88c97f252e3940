"""One writer at a time, any number of readers: nobody waits for a reader, nobody sees half a change, and nothing is lost by a kill."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import toy_model, toy_processor

from unimodal.files import LOCK, InUseError, locked
from unimodal.search import Encoder, Index, build_index, index_folder
from unimodal.search import access as access_module
from unimodal.search import folder as folder_module

ENCODER = Encoder(toy_model(matching=None), toy_processor())
WORDS = ["red", "green", "blue", "yellow", "large", "small", "circle", "square", "star", "triangle"]
TEXTS = [f"a {WORDS[i % 10]} {WORDS[i // 10 % 10]}" for i in range(40)]


def begin(folder: Path, count: int = 8, **options) -> Index:
    ids = [f"d{i}" for i in range(count)]
    return build_index(ENCODER, TEXTS[:count], ids, folder=folder, **options)


def whole(index: Index) -> list:
    """The ids of an index, when keys, rows and hits agree."""
    state = index.state
    ids = [document.id for document in state.catalogue.documents().values()]
    assert set(state.catalogue.rows().tolist()) <= set(state.backend.keys().tolist())
    assert len(np.unique(state.backend.keys())) == len(state.backend.keys())
    assert len(state.catalogue) == len(ids)
    return ids


# Writers.


@pytest.mark.parametrize(
    "work",
    [
        lambda index: index.add(["a star"]),
        lambda index: index.add(["a star"], ["d0"], replace=True),
        lambda index: index.delete(["d0"]),
        lambda index: build_index(ENCODER, TEXTS[:8], [f"d{i}" for i in range(8)], folder=index.folder),
        lambda index: build_index(ENCODER, ["a star"]).save(index.folder),
    ],
)
def test_a_second_writer_is_told_which_index_is_in_use(work: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(access_module, "WAIT", 0.05)
    first = begin(tmp_path / "kept")
    second = Index.load(tmp_path / "kept", ENCODER)
    with first.writing():
        thread_errors: list[BaseException] = []

        def other() -> None:
            try:
                work(second)
            except BaseException as error:
                thread_errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert isinstance(thread_errors[0], InUseError) and str(tmp_path / "kept") in str(thread_errors[0])
        assert len(second.search("a star", top_k=8)) == 8  # reading goes on
    assert whole(second) == [f"d{i}" for i in range(8)]
    work(second)


def test_writers_take_turns_and_lose_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "kept", 2)

    def add(who: int) -> None:
        index = Index.load(tmp_path / "kept", ENCODER)
        for turn in range(3):
            index.add([TEXTS[turn]], [f"{who}-{turn}"])

    threads = [threading.Thread(target=add, args=(who,)) for who in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    ids = whole(Index.load(tmp_path / "kept", ENCODER))
    assert sorted(ids) == sorted(["d0", "d1", *(f"{who}-{turn}" for who in range(3) for turn in range(3))])


def test_what_one_handle_adds_another_finds(tmp_path: Path) -> None:
    first = begin(tmp_path / "kept", 3)
    second = Index.load(tmp_path / "kept", ENCODER)
    before = second.state
    first.add(["a small green star"], ["new"])
    assert first.ids == second.ids == ["d0", "d1", "d2", "new"]
    assert second.search("a small green star", top_k=1)[0]["id"] == "new"
    second.delete(["d0", "new"])
    assert first.ids == ["d1", "d2"] and len(first.search("a star")) == 2
    assert len(before.catalogue) == 3 and len(before.backend.keys()) == 3  # a state that was taken stays
    assert before.parts.embeddings(before.catalogue.rows()).shape[0] == 3


@pytest.mark.parametrize("backend", ["exact", "faiss", "lancedb", "milvus"])
def test_searches_in_threads_while_documents_come_go_and_are_replaced(backend: str, tmp_path: Path) -> None:
    pytest.importorskip({"exact": "numpy", "milvus": "milvus_lite"}.get(backend, backend))
    index = begin(tmp_path / "kept", 10, backend=backend)
    done, faults, sizes = threading.Event(), [], set()

    def read() -> None:
        while not done.is_set():
            try:
                hits = index.search(["a red circle", "a star"], top_k=100)
                ids = [[hit["id"] for hit in some] for some in hits]
                assert set(ids[0]) == set(ids[1]) and len(set(ids[0])) == len(ids[0])
                assert {f"d{i}" for i in range(10)} <= set(ids[0])  # these are replaced, never gone
                sizes.add(len(ids[0]))
            except BaseException as error:
                faults.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    [thread.start() for thread in threads]
    for turn in range(3):
        index.add(TEXTS[10:15], [f"n{i}" for i in range(5)])
        index.add(TEXTS[turn : turn + 10], [f"d{i}" for i in range(10)], replace=True)
        index.delete([f"n{i}" for i in range(5)])
    done.set()
    [thread.join() for thread in threads]
    assert not faults and sizes <= {10, 15}, faults[:1]


def process(code: str, *arguments: object) -> subprocess.Popen:
    root = Path(__file__).parent
    path = os.pathsep.join([str(root), str(root.parent)])
    ask = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


WRITER = """
import sys
from test_search_writers import ENCODER, Index, TEXTS
index = Index.load(sys.argv[1], ENCODER)
turn = 0
while True:
    index.add(TEXTS[turn % 30 : turn % 30 + 3], [f"t{turn}-{i}" for i in range(3)])
    print("added", turn, flush=True)
    index.add(TEXTS[turn % 20 : turn % 20 + 1], ["d0"], replace=True)
    index.delete([f"t{turn}-0"])
    print("deleted", turn, flush=True)
    turn += 1
"""


def test_another_process_writes_whole_states_and_after_its_kill_what_it_said_is_there(tmp_path: Path) -> None:
    reader = begin(tmp_path / "kept", 3)
    said: list[list[str]] = []
    with process(WRITER, tmp_path / "kept") as writer:
        assert writer.stdout is not None
        for _ in range(9):
            said.append(writer.stdout.readline().split())
            assert said[-1], writer.communicate()
            ids = [{hit["id"] for hit in some} for some in reader.search(["a red circle", "a star"], top_k=100)]
            assert ids[0] == ids[1] and {"d0", "d1", "d2"} <= ids[0]
            turns = [one.partition("-")[0] for one in ids[0] if one[0] == "t"]
            assert {turns.count(turn) for turn in turns} <= {2, 3}
        writer.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        said += [line.split() for line in writer.stdout]
    index = Index.load(tmp_path / "kept", ENCODER)
    ids_now = set(whole(index))
    for what, turn in said:
        assert {f"t{turn}-1", f"t{turn}-2"} <= ids_now and (what == "added" or f"t{turn}-0" not in ids_now)
    assert sorted(index.backend.keys().tolist()) == index.catalogue.rows().tolist()
    assert {hit["id"] for hit in index.search("a star", top_k=100)} == ids_now == set(reader.ids)
    index.add(["a star"], ["next"])  # nothing stands in the way


def test_a_forked_process_searches_by_itself(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    index = begin(tmp_path / "kept", 5)
    with index._lock:  # as if another thread were at it
        child = os.fork()
        if child == 0:
            os._exit(0 if len(index.catalogue.documents()) == 5 and len(index) == 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Readers write nothing.


@pytest.mark.parametrize("backend", ["exact", "faiss", "lancedb"])
def test_opening_and_searching_writes_nothing(backend: str, tmp_path: Path) -> None:
    pytest.importorskip({"exact": "numpy"}.get(backend, backend))
    begin(tmp_path / "kept", backend=backend, metadata=[{"year": i} for i in range(8)])
    paths = sorted(path for path in (tmp_path / "kept").rglob("*"))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}
    index = Index.load(tmp_path / "kept", ENCODER)
    assert len(index.search("a star", filter="year > 3")) == 4 and len(index.ids) == 8
    assert sorted(path for path in (tmp_path / "kept").rglob("*")) == paths
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths} == before


def closed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No lock can be taken in a folder, as where it is read-only: modes do not bind every user."""

    def refuse(path, *arguments, **options):
        if Path(path).is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return locked(path, *arguments, **options)

    monkeypatch.setattr(access_module, "locked", refuse)


def test_a_folder_that_cannot_be_written_is_searched_and_damage_is_mended_elsewhere(tmp_path, monkeypatch) -> None:
    index = begin(tmp_path / "kept")
    expected = index.search("a star", top_k=8)
    closed(monkeypatch, tmp_path / "kept")
    assert Index.load(tmp_path / "kept", ENCODER).search("a star", top_k=8) == expected
    with pytest.raises(PermissionError, match="the index cannot be changed .*; save it to a folder that you may write"):
        Index.load(tmp_path / "kept", ENCODER).delete(["d0"])
    shutil.rmtree(tmp_path / "kept/exact")
    with pytest.warns(UserWarning, match="exact is damaged and cannot be written"):
        again = Index.load(tmp_path / "kept", ENCODER)
    assert again.search("a star", top_k=8) == expected and not (tmp_path / "kept/exact").exists()


def test_a_catalogue_that_was_killed_in_its_change_is_read_without_writing(tmp_path: Path, monkeypatch) -> None:
    """The journal that a kill leaves is undone in a copy."""
    begin(tmp_path / "kept")
    code = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("pragma cache_size = 1")
db.execute("begin immediate")
db.execute("create table more (x)")
db.executemany("insert into more values (?)", [("x" * 1000,) for _ in range(1000)])
db.execute("delete from documents")
os._exit(0)
"""
    with process(code, tmp_path / "kept/documents.sqlite") as killed:
        assert killed.wait() == 0
    assert (tmp_path / "kept/documents.sqlite-journal").exists()
    before = (tmp_path / "kept/documents.sqlite").read_bytes()
    closed(monkeypatch, tmp_path / "kept")
    assert len(Index.load(tmp_path / "kept", ENCODER).search("a star", top_k=8)) == 8
    assert (tmp_path / "kept/documents.sqlite").read_bytes() == before
    monkeypatch.undo()
    index = Index.load(tmp_path / "kept", ENCODER)
    index.delete(["d0"])
    assert len(index) == 7


# Damage.

DAMAGE: dict[str, Callable[[Path], object]] = {
    "keys cut": lambda kept: os.truncate(kept / "exact/keys.bin", 32),
    "keys cut within one": lambda kept: os.truncate(kept / "exact/keys.bin", 35),
    "keys emptied": lambda kept: os.truncate(kept / "exact/keys.bin", 0),
    "keys zeroed": lambda kept: (kept / "exact/keys.bin").write_bytes(bytes(64)),
    "keys of others": lambda kept: np.arange(100, 108).tofile(kept / "exact/keys.bin"),
    "keys twice": lambda kept: np.array([0, 1, 2, 3, 4, 5, 6, 0]).tofile(kept / "exact/keys.bin"),
    "keys gone": lambda kept: (kept / "exact/keys.bin").unlink(),
    "codes cut": lambda kept: os.truncate(kept / "exact/codes.bin", 100),
    "codes gone": lambda kept: (kept / "exact/codes.bin").unlink(),
    "all gone": lambda kept: shutil.rmtree(kept / "exact"),
    "a file in its place": lambda kept: (shutil.rmtree(kept / "exact"), (kept / "exact").write_text("x")),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_vectors_that_are_lost_are_made_again(damage: str, tmp_path: Path) -> None:
    expected = begin(tmp_path / "kept").search("a star", top_k=8)
    DAMAGE[damage](tmp_path / "kept")
    index = Index.load(tmp_path / "kept", ENCODER)
    assert index.search("a star", top_k=8) == expected and index.search("a star", top_k=1) == expected[:1]
    assert sorted(index.backend.keys().tolist()) == index.catalogue.rows().tolist()
    assert Index.load(tmp_path / "kept", ENCODER).search("a star", top_k=8) == expected


@pytest.mark.parametrize("how", ["gone", "cut", "text"])
@pytest.mark.parametrize("backend", ["faiss", "lancedb", "milvus"])
def test_a_backend_whose_files_are_lost_is_made_again(backend: str, how: str, tmp_path: Path) -> None:
    pytest.importorskip({"milvus": "milvus_lite"}.get(backend, backend))
    index = begin(tmp_path / "made", backend=backend)
    expected = index.search("a star", top_k=8)
    index.save(tmp_path / "kept")
    if how == "gone":
        shutil.rmtree(tmp_path / "kept" / backend)
    else:
        for path in (tmp_path / "kept" / backend).rglob("*"):
            if path.is_file() and path.name != "LOCK":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if how == "cut" else b"text")
    again = Index.load(tmp_path / "kept", ENCODER)
    assert again.search("a star", top_k=8) == expected
    assert sorted(again.backend.keys().tolist()) == again.catalogue.rows().tolist()


@pytest.mark.parametrize("how", ["gone", "cut", "emptied"])
def test_a_part_that_is_lost_names_its_documents_and_is_read_again(how: str, tmp_path: Path) -> None:
    expected = begin(tmp_path / "kept").search("a star", top_k=8)
    part = tmp_path / "kept/part-00000.safetensors"
    if how == "gone":
        part.unlink()
    else:
        os.truncate(part, 200 if how == "cut" else 0)
    message = r"has lost part-00000.safetensors .* held 8 of its 8 documents \('d0', 'd1', .*\); copy it back from a backup, or build"
    with pytest.raises(ValueError, match=message):
        Index.load(tmp_path / "kept", ENCODER)
    assert begin(tmp_path / "kept").search("a star", top_k=8) == expected
    assert Index.load(tmp_path / "kept", ENCODER).search("a star", top_k=8) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "index.json is damaged"),
        (b"[]", "index.json is damaged"),
        (b"\xff\xfe", "index.json is damaged"),
        ({"part": 0}, "part is 0"),
        ({"backend": "../../x"}, "backend is '../../x'"),
        ({"first_width": None}, "first_width is None"),
        ({"kind": "sound"}, "kind is 'sound'"),
        ({"uri": "http://far.example#x", "backend": "milvus"}, "on the server http://far.example, .* give uri="),
    ],
    ids=str,
)
def test_what_index_json_says_is_not_followed_blindly(content, message: str, tmp_path: Path) -> None:
    begin(tmp_path / "kept")
    path = tmp_path / "kept/index.json"
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps({**json.loads(path.read_text()), **content}).encode()
    )
    with pytest.raises(ValueError, match=message):
        Index.load(tmp_path / "kept", ENCODER)


def test_a_catalogue_that_is_lost_or_no_database_is_named(tmp_path: Path) -> None:
    begin(tmp_path / "kept")
    (tmp_path / "kept/documents.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="documents.sqlite is damaged .*; copy it back from a backup, or build"):
        Index.load(tmp_path / "kept", ENCODER)
    (tmp_path / "kept/documents.sqlite").unlink()
    with pytest.raises(ValueError, match="has lost documents.sqlite"):
        Index.load(tmp_path / "kept", ENCODER)


@pytest.mark.parametrize("name", ["index.json", "documents.sqlite", "part-00000.safetensors", "exact/keys.bin"])
def test_what_may_not_be_read_is_not_called_damaged(name: str, tmp_path: Path, monkeypatch) -> None:
    begin(tmp_path / "kept")
    refused = str(tmp_path / "kept" / name)
    opened, allowed, read = open, os.access, Path.read_text

    def refuse(path, *arguments, **options):
        if str(path) == refused:
            raise PermissionError(13, "Permission denied", refused)
        return opened(path, *arguments, **options)

    def refuse_text(path, *arguments, **options):
        if str(path) == refused:
            raise PermissionError(13, "Permission denied", refused)
        return read(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse_text)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != refused and allowed(path, mode))
    with pytest.raises(PermissionError, match=name):
        Index.load(tmp_path / "kept", ENCODER)
    monkeypatch.undo()
    assert len(Index.load(tmp_path / "kept", ENCODER)) == 8


# Saving.


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("backend", ["exact", "faiss", "lancedb"])
def test_files_follow_the_umask(backend: str, tmp_path: Path) -> None:
    pytest.importorskip({"exact": "numpy"}.get(backend, backend))
    before = os.umask(0o022)
    try:
        index = begin(tmp_path / "kept", backend=backend)
        index.add(["a star"])
        index.delete(["d0"])
        index.save(tmp_path / "copy")
    finally:
        os.umask(before)
    private = [path for path in tmp_path.rglob("*") if path.is_file() and not path.stat().st_mode & stat.S_IRGRP]
    assert private == []


def test_an_index_is_saved_where_the_folder_cannot_be_renamed(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "volume"
    begin(place, 3)
    new, rename, replace = build_index(ENCODER, ["a star", "a circle"]), os.rename, os.replace

    def on_a_mount(move):
        def moved(source, target, **options):
            if place in (Path(source), Path(target)):
                raise OSError(16, "Device or resource busy", str(target))
            return move(source, target, **options)

        return moved

    monkeypatch.setattr(os, "rename", on_a_mount(rename))
    monkeypatch.setattr(os, "replace", on_a_mount(replace))
    new.save(place)
    assert Index.load(place, ENCODER).documents == ["a star", "a circle"]
    monkeypatch.chdir(place)
    begin(tmp_path / "other", 4).save(".")
    assert len(Index.load(".", ENCODER)) == 4


def test_a_failure_at_any_rename_leaves_the_old_index_or_the_new_one(tmp_path: Path, monkeypatch) -> None:
    new, rename, place = build_index(ENCODER, ["a star", "a circle"]), os.rename, tmp_path / "kept"
    for number in range(1, 30):
        shutil.rmtree(place, ignore_errors=True)
        begin(place, 3)
        count = [0]

        def failing(source, target, count=count, number=number, **options):
            count[0] += 1
            if count[0] == number:
                raise OSError(28, "No space left on device")
            return rename(source, target, **options)

        monkeypatch.setattr(os, "rename", failing)
        try:
            new.save(place)
            break
        except OSError:
            monkeypatch.setattr(os, "rename", rename)
            assert len(Index.load(place, ENCODER)) in (2, 3)
            assert len(Index.load(place, ENCODER).search("a star")) in (2, 3)
    assert number > 5 and len(Index.load(place, ENCODER)) == 2


def test_a_reader_goes_on_when_another_index_takes_the_place(tmp_path: Path) -> None:
    reader = begin(tmp_path / "kept", 3)
    assert len(reader.search("a star")) == 3
    build_index(ENCODER, TEXTS[:5]).save(tmp_path / "kept")
    assert reader.ids == [0, 1, 2, 3, 4] and len(reader.search("a star")) == 5


# Folders of pictures.


def test_two_first_searches_of_one_folder_read_it_once(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(
            tmp_path / f"photos/{i}.png"
        )
    monkeypatch.setattr(access_module, "WAIT", 0.05)
    found, errors = [], []

    def search() -> None:
        try:
            found.append(index_folder(ENCODER, tmp_path / "photos", tmp_path / "kept"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors and sum(one.fresh for one in found) == 5
    assert all(len(one.index.search("a star", top_k=9)) == 5 for one in found)
    monkeypatch.setattr(folder_module, "WAIT", 0.05)
    monkeypatch.setattr(folder_module, "SILENT", 0.01)
    (tmp_path / "photos/0.png").unlink()
    with (
        locked(tmp_path / "kept" / LOCK, "it"),
        pytest.warns(
            UserWarning, match=r"another search reads the pictures in .*photos just now; this one waits for it"
        ),
        pytest.raises(InUseError, match="kept"),
    ):
        index_folder(ENCODER, tmp_path / "photos", tmp_path / "kept")


# Ids and the order of results.


@pytest.mark.parametrize("ids", [[True], [np.True_], [1.0], [object()], [None], [("a",)], True, 3, {"a": 1}])
def test_what_is_no_id_deletes_nothing(ids, tmp_path: Path) -> None:
    index = build_index(ENCODER, TEXTS[:3])
    with pytest.raises(TypeError, match="ids"):
        index.delete(ids)
    assert index.ids == [0, 1, 2]


@pytest.mark.parametrize("ids", [[10**30], [-(2**63) - 1], ["\ud800"], ["1"], [7]])
def test_ids_that_are_not_there_delete_nothing(ids) -> None:
    index = build_index(ENCODER, TEXTS[:3])
    with pytest.raises(ValueError, match="ids"):
        index.delete(ids)
    assert index.ids == [0, 1, 2]
    index.delete([np.int64(1)])
    assert index.ids == [0, 2]


@pytest.mark.parametrize(
    "metadata", [["x"], [5], "x", {"year": 1}, [{1: 2}], [{"a": object()}], [{"a": 1j}], [[("a", 1)]]]
)
def test_metadata_of_wrong_kinds_are_named(metadata) -> None:
    with pytest.raises((TypeError, ValueError), match="metadata"):
        build_index(ENCODER, ["a star"], metadata=metadata)


@pytest.mark.parametrize("first", [("float32", None), ("int8", None), ("binary", 8)])
@pytest.mark.parametrize("backend", ["exact", "faiss", "lancedb", "milvus"])
def test_equal_documents_come_in_the_order_of_their_ids(backend: str, first: tuple) -> None:
    pytest.importorskip({"exact": "numpy", "milvus": "milvus_lite"}.get(backend, backend))
    ids = [3, "b", 10, "a", -1, 2, "B", 7, "", 0]
    texts = ["a red circle"] * 10 + [f"a {WORDS[i]} star" for i in range(3)]
    precision, width = first
    options = {"backend": backend, "first_precision": precision, "first_width": width}
    for order in (ids, ids[::-1]):
        index = build_index(ENCODER, texts, [*order, "x", "y", "z"], batch_size=len(texts), **options)
        for top_k in (1, 4, 10):
            hits = index.search("a red circle", top_k=top_k, rerank_top_k=0)
            assert [hit["id"] for hit in hits] == [-1, 0, 2, 3, 7, 10, "", "B", "a", "b"][:top_k]
