"""Every backend gives what exact search gives: candidates, filters, deletion, and the same again after closing and opening."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import toy_model, toy_processor

from unimodal.inference import Unimodal
from unimodal.search import Encoder, Index, build_index, store
from unimodal.search.backends import open_backend
from unimodal.search.filters import Selection, parse

BACKENDS = {"exact": "numpy", "faiss": "faiss", "lancedb": "lancedb", "milvus": "milvus_lite"}
PRECISIONS = ("float32", "int8", "binary")
COUNT, WIDTH = 120, 16


@pytest.fixture(params=list(BACKENDS))
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(BACKENDS[request.param])
    return request.param


def unit(count: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


VECTORS = unit(COUNT, WIDTH)
METADATA: list[dict] = [
    {"year": 2000 + i % 40, "place": "O'slo" if i % 3 else 'Ro"me', "size": i / 8} if i % 2 else {"sharp": i % 4 == 0}
    for i in range(COUNT)
]
FILTERS = {
    "year >= 2020 and place = 'O''slo'": lambda m: m.get("year", 0) >= 2020 and m["place"] == "O'slo",
    "NOT (year < 2010 OR place LIKE 'R%')": lambda m: "year" in m and m["year"] >= 2010 and m["place"][0] != "R",
    "sharp = true": lambda m: m.get("sharp") is True,
    "sharp != true": lambda m: m.get("sharp") is False,
    "not sharp = true or year in (2001, 2003)": lambda m: m.get("sharp") is False or m.get("year") in (2001, 2003),
    "year is null": lambda m: "year" not in m,
    "year not in (2001, 2003) and size <= 7.5": lambda m: "year" in m and m["year"] not in (2001, 2003) and m["size"] <= 7.5,
    "year is not null and not place like 'o_slo'": lambda m: "year" in m,  # case counts
    "place <> 'nowhere'": lambda m: "place" in m,
}  # fmt: skip
FIELDS: dict = {"year": "number", "place": "text", "size": "number", "sharp": "flag"}


# The protocol.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_backend_finds_filters_deletes_and_comes_back(name: str, precision: str, tmp_path: Path) -> None:
    backend = open_backend(name, tmp_path / "it", WIDTH, precision)
    assert len(backend) == 0 and len(backend.keys()) == 0
    backend.add(np.arange(70), VECTORS[:70], METADATA[:70])
    backend.add(np.arange(70, COUNT), VECTORS[70:], METADATA[70:])
    assert len(backend) == COUNT

    queries = VECTORS[:4]
    keys, scores = backend.search(queries, 10)
    x = np.sign(VECTORS) if precision == "binary" else VECTORS
    truth = (queries if name in ("exact", "milvus") else x[:4]) @ x.T  # these ask signs with full queries
    got = np.take_along_axis(truth, keys, 1)  # ties of signs may fall either way, their scores may not
    assert np.allclose(
        np.sort(got)[:, ::-1], np.sort(truth)[:, ::-1][:, :10], atol=0.02 if precision == "int8" else 1e-5
    )
    assert (np.diff(scores) <= 0).all()

    for text, passes in FILTERS.items():
        wanted = {i for i, one in enumerate(METADATA) if passes(one)}
        assert 0 < len(wanted) < COUNT
        selection = Selection(parse(text, FIELDS), lambda _, wanted=wanted: np.array(sorted(wanted)))
        for found in backend.search(queries[:2], COUNT, selection)[0]:
            assert set(found[found >= 0].tolist()) == wanted, text

    backend.delete(np.arange(20))
    backend.close()
    again = open_backend(name, tmp_path / "it", WIDTH, precision)
    assert sorted(again.keys().tolist()) == list(range(20, COUNT))
    assert set(again.search(queries, COUNT)[0].ravel().tolist()) - {-1} == set(range(20, COUNT))
    again.delete(np.arange(20, 100))
    assert len(again) == 20
    assert set(again.search(queries, COUNT)[0].ravel().tolist()) - {-1} == set(range(100, COUNT))
    again.close()


def test_exact_survives_a_torn_write(tmp_path: Path) -> None:
    backend = open_backend("exact", tmp_path, WIDTH, "int8")
    backend.add(np.arange(5), VECTORS[:5], METADATA[:5])
    with open(tmp_path / "codes.bin", "ab") as file:
        file.write(b"torn")
    again = open_backend("exact", tmp_path, WIDTH, "int8")
    again.add(np.arange(5, 9), VECTORS[5:9], METADATA[5:9])
    assert again.search(VECTORS[:9], 1)[0].ravel().tolist() == list(range(9))


def test_backends_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no 'fais'; did you mean 'faiss'"):
        open_backend("fais", tmp_path, 8, "float32")
    with pytest.raises(ValueError, match="first_precision: expected one of float32, int8, binary, got 'uint8'"):
        open_backend("exact", tmp_path, 8, "uint8")
    with pytest.raises(ValueError, match="packs eight dimensions to a byte, got the width 12"):
        open_backend("exact", tmp_path, 12, "binary")
    with pytest.raises(ValueError, match="only the milvus backend has a server"):
        open_backend("faiss", tmp_path, 8, "float32", "http://localhost:19530")


@pytest.mark.parametrize(("backend", "library"), [("faiss", "faiss"), ("lancedb", "lancedb"), ("milvus", "pymilvus")])
def test_a_missing_library_names_its_extra(
    backend: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ImportError, match=rf"pip install 'unimodal\[{backend}\]'"):
        open_backend(backend, tmp_path, 8, "float32")


# Filters.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yeer > 3", "no field 'yeer'; did you mean 'year'"),
        ("year > 'x'", "field 'year' holds a number, got the text 'x'"),
        ("year >", "expected a value at the end"),
        ("year 3", r"expected an operator .* at '3'"),
        ("year = 3 year = 4", "expected `and`, `or` or the end at 'year = 4'"),
        ("(year = 3", r"expected `\)` at the end"),
        ("year = 3; drop table documents", "expected a field, a value or an operator at '; drop table documen'"),
        ("and", "expected a field at 'and'"),
        ("", "expected a field at the end"),
        ("sharp < true", "< does not go with the flag true"),
        (r"place like '\%'", "`like` takes a text without backslashes"),
        ("place not = 'x'", "expected `in` or `like`"),
        ("year like 3", "like does not go with the number 3"),
    ],
)  # fmt: skip
def test_bad_filters_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, FIELDS)


# The index on top.


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def encoder(seed: int = 0, **overrides) -> Encoder:
    return Encoder(toy_model(seed, **overrides), toy_processor())


PICTURES = [picture(i) for i in range(7)]
TEXTS = ["a red circle", "two yellow triangles", "a small blue square left of a large green star"]


@pytest.mark.parametrize(("precision", "width"), [("float32", None), ("int8", None), ("binary", 8)])
def test_an_index_on_any_backend_equals_exact_search(name: str, precision, width, tmp_path: Path) -> None:
    one = encoder()
    plain = build_index(one, PICTURES, metadata=[{"even": i % 2 == 0} for i in range(7)])
    index = build_index(
        one, PICTURES, metadata=[{"even": i % 2 == 0} for i in range(7)], backend=name, first_precision=precision,
        first_width=width, folder=tmp_path / "index",
    )  # fmt: skip
    assert index.search(TEXTS, rerank_top_k=3) == plain.search(TEXTS, rerank_top_k=3)
    assert index.search(TEXTS, filter="even = true") == plain.search(TEXTS, filter="even = true")
    assert [hit["id"] % 2 for hit in index.search(TEXTS[0], filter="even = true")] == [0, 0, 0, 0]
    assert index.search(TEXTS[0])[0]["metadata"] == {"even": index.search(TEXTS[0])[0]["id"] % 2 == 0}

    for either in (plain, index):
        either.delete([2, 4])
        either.add([picture(9)], ["nine"], [{"even": False, "year": 2020}])
        either.add([picture(10)], [3], replace=True)
    assert index.ids == plain.ids == [0, 1, 5, 6, "nine", 3]
    assert index.search(TEXTS) == plain.search(TEXTS)
    assert [hit["id"] for hit in index.search(TEXTS[0], filter="year > 2000")] == ["nine"]
    index.backend.close()
    assert Index.load(tmp_path / "index", one).search(TEXTS) == plain.search(TEXTS)
    with pytest.raises(ValueError, match=r"was made by model [0-9a-f]{16}, this is model [0-9a-f]{16}"):
        Index.load(tmp_path / "index", encoder(1))
    with pytest.raises(ValueError, match=r"the index was made by model .* their vectors cannot be compared"):
        Unimodal(toy_model(1), toy_processor()).search(TEXTS, plain)


def test_several_vectors_per_image(name: str, tmp_path: Path) -> None:
    one = encoder(embedding={"dim": 16, "pool": "query"})
    plain = build_index(one, PICTURES)
    index = build_index(one, PICTURES, backend=name, folder=tmp_path / "index")
    assert len(index.backend) == 4 * len(PICTURES)
    assert index.search(TEXTS, top_k=3, rerank_top_k=0) == plain.search(TEXTS, top_k=3, rerank_top_k=0)
    index.delete([0, 1])
    assert len(index.backend) == 4 * 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Milvus server: milvus-lite's, in a process of its own."""
    pytest.importorskip("milvus_lite")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = tmp_path_factory.mktemp("milvus") / "data"
    ask = [sys.executable, "-m", "milvus_lite", "server", "--host", "127.0.0.1", "--port", port, "--data-dir", data]
    with subprocess.Popen([str(one) for one in ask], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_vectors_on_a_server(server: str, precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILVUS_TOKEN", "user:secret")
    one, metadata = encoder(), [{"even": i % 2 == 0} for i in range(7)]
    plain = build_index(one, PICTURES, metadata=metadata)
    kept = {"backend": "milvus", "uri": server, "first_precision": precision}
    index = build_index(one, PICTURES, metadata=metadata, folder=tmp_path / "index", **kept)
    other = build_index(
        one, PICTURES[:2], folder=tmp_path / "other", **kept
    )  # the same server, a collection of its own
    for either in (plain, index):
        either.delete([2, 4])
        either.add([picture(9)], ["nine"], [{"even": False}])
    assert index.search(TEXTS) == plain.search(TEXTS) and len(other.search(TEXTS[0])) == 2
    assert index.search(TEXTS, filter="even = true") == plain.search(TEXTS, filter="even = true")
    index.backend.close()
    with pytest.raises(ValueError, match=f"keeps its vectors on the server {server}, .* got uri=None; give uri="):
        Index.load(tmp_path / "index", one)
    again = Index.load(tmp_path / "index", one, uri=server)
    assert (
        again.search(TEXTS) == plain.search(TEXTS) and sorted(again.backend.keys()) == plain.catalogue.rows().tolist()
    )
    with pytest.raises(ValueError, match="on a Milvus server, which a folder cannot copy"):
        again.save(tmp_path / "copy")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(b"secret" in path.read_bytes() for path in files)
    with pytest.raises(ValueError, match="an address with a password would be kept in index.json.* MILVUS_TOKEN"):
        build_index(one, PICTURES, backend="milvus", uri="http://user:secret@localhost", folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Killed(BaseException):
    """Not an Exception: nothing in between may catch it."""


def test_killed_anywhere_nothing_is_lost_or_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, add, replace and delete, killed before every write in turn and run again: always the index of an undisturbed run."""
    from unimodal.search import ledger, writer
    from unimodal.search.backends import exact

    monkeypatch.setattr(store, "PART", 2)
    one = encoder()
    read: list[int] = []
    real_read = writer.read_items

    def counted(encoder: Encoder, items, *rest):
        read.append(len(items))
        return real_read(encoder, items, *rest)

    monkeypatch.setattr(writer, "read_items", counted)
    countdown = [10**9]

    def mortal(owner, method: str) -> None:
        real = getattr(owner, method)

        def call(*arguments, **options):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            return real(*arguments, **options)

        monkeypatch.setattr(owner, method, call)

    for method in ("plan", "read", "reveal", "delete", "set_in_line"):
        mortal(ledger.Ledger, method)
    for method in ("add", "delete"):
        mortal(exact.ExactIndex, method)
    mortal(writer, "write_part")

    def work(folder: Path) -> None:
        index = build_index(one, PICTURES[:3], folder=folder, batch_size=1)
        index.add(PICTURES[3:6], ["a", "b", "c"], batch_size=1)
        index.add([PICTURES[6]], [0], replace=True)
        index.delete(["b"])

    def resumed(folder: Path) -> Index:
        """The same work by someone who looks what is done."""
        if not (folder / "index.json").exists() or not ledger.Ledger(folder / "documents.sqlite", 2).built:
            index = build_index(one, PICTURES[:3], folder=folder, batch_size=1)
        else:
            index = Index.load(folder, one)
        if "a" not in index.ids:
            assert len(index) == 3  # the old state, whole
            index.add(PICTURES[3:6], ["a", "b", "c"], batch_size=1)
        if index.ids[0] == 0:
            index.add([PICTURES[6]], [0], replace=True)
        if "b" in index.ids:
            index.delete(["b"])
        return index

    work(tmp_path / "whole")
    whole = Index.load(tmp_path / "whole", one)
    expected, writes = whole.search(TEXTS), 0
    assert whole.ids == [1, 2, "a", "c", 0]
    while True:
        writes += 1
        folder = tmp_path / str(writes)
        countdown[0] = writes
        read.clear()
        try:
            work(folder)
            break
        except Killed:
            countdown[0] = 10**9
        assert sum(read) <= 7
        index = resumed(folder)
        assert sum(read) <= 7 + 2  # at most the part that was being read is read again
        assert index.ids == whole.ids and index.search(TEXTS) == expected
        assert sorted(index.backend.keys().tolist()) == index.catalogue.rows().tolist()
    assert writes > 20


def test_what_an_index_refuses(tmp_path: Path) -> None:
    one = encoder()
    index = build_index(one, PICTURES[:2], metadata=[{"year": 1}, {}])
    with pytest.raises(ValueError, match="1 of 2 ids are in the index already, for example 1; give other ids"):
        index.add(PICTURES[:2], [1, 7])
    with pytest.raises(ValueError, match="1 of 2 ids are not in the index, for example 9"):
        index.delete([0, 9])
    with pytest.raises(ValueError, match="keeps image documents with their tokens, got text ones"):
        index.add(TEXTS)
    with pytest.raises(ValueError, match="expected 1 dicts, one for each document, got 2"):
        index.add([picture(5)], metadata=[{}, {}])
    for metadata, error, message in (
        ({"year": "x"}, ValueError, "field 'year' holds a number, got the text 'x'"),
        ({"Year": 3}, ValueError, "differ by case alone"),
        ({"a b": 3}, ValueError, "'a b' is no name for a field"),
        ({"like": 3}, ValueError, "'like' is no name for a field"),
        ({"tags": ["x"]}, TypeError, "expected a text, a number, True, False or None, got list"),
        ({"big": 2**60}, ValueError, "finite numbers up to 2\\^53"),
        ({"nan": float("nan")}, ValueError, "expected a finite number"),
    ):
        with pytest.raises(error, match=message):
            index.add([picture(5)], metadata=[metadata])
    assert len(index) == 2
    index.add([picture(5)])
    assert index.ids == [0, 1, 2]
    with pytest.raises(ValueError, match="first_width: expected .*1 to 16, got .*17"):
        build_index(one, PICTURES, first_width=17)
    with pytest.raises(ValueError, match="no field 'colour'"):
        index.search(TEXTS[0], filter="colour = 'red'")
