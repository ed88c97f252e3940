"""Filters of any length and of any shape: a right result, or an error that says what is wrong. Nothing else."""

import numpy as np
import pytest
from toy import toy_model, toy_processor

from unimodal.search import Encoder, Index, build_index
from unimodal.search.backends import open_backend
from unimodal.search.filters import DEEPEST, Selection, parse

METADATA = [{"year": 2024, "place": "Oslo", "sharp": True}, {"year": 2026, "place": "it's"}, {}]
FIELDS: dict = {"year": "number", "place": "text", "sharp": "flag"}


@pytest.fixture(scope="module")
def index() -> Index:
    encoder = Encoder(toy_model(), toy_processor())
    return build_index(encoder, ["a red circle", "a blue star", "two green squares"], metadata=METADATA)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (" or ".join(f"year = {i}" for i in range(1000, 2025)), {0}),
        (" or ".join(f"year = {i}" for i in range(20000)), {0, 1}),
        (" and ".join(f"year != {i}" for i in range(2025)), {1}),
        (" or ".join(f"(year > {i} and year < {i + 2})" for i in range(2000, 5000)), {0, 1}),
        (" or ".join(f"place like 'x{i}%'" for i in range(3000)), set()),
        (" and ".join("year > 2000" for _ in range(1500)), {0, 1}),
        ("year in (" + ", ".join(map(str, range(30000))) + ")", {0, 1}),
        ("(" * DEEPEST + "year = 2024" + ")" * DEEPEST, {0}),
        ("not " * 3001 + "year = 2024", {1}),
        ("year < " + "9" * 25, {0, 1}),
        ("year > -1e300 and year > 1e-400", {0, 1}),
        ("place = '''; drop table documents; --'", set()),
        ("place = 'it''s'", {1}),
        ("place = '\U0001f600' or sharp = true", {0}),
        ("year\t=\n2024", {0}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_long_and_odd_filters_let_the_right_documents_through(index: Index, text: str, ids: set[int]) -> None:
    assert {hit["id"] for hit in index.search("a star", filter=text)} == ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("year < 1e400", "expected a finite number, got 1e400"),
        ("year > -1e999", "expected a finite number, got -1e999"),
        ("year < " + "9" * 5000, "expected a finite number"),
        ("place = 'a\0b'", "a null character cannot be compared"),
        ("year = \0", "a null character cannot be compared"),
        ("place = '\ud800'", "half of a character"),
        ("(" * 200 + "year = 2024" + ")" * 200, f"brackets within brackets go {DEEPEST} deep at most"),
        ("(" * 3000, "brackets within brackets"),
        ("not (" * 3000 + "year = 1" + ")" * 3000, "brackets within brackets"),
        ("place like '" + "a" * 60000 + "%'", "cannot be evaluated .* make it shorter"),
        ("year in ()", r"expected a number, a 'text', true or false at '\)'"),
        ("year in ((1, 2), (3))", "expected a number"),
        ("year in [1]", "expected a field, a value or an operator"),
        ("year = '2024'", "field 'year' holds a number, got the text '2024'"),
        ("place = 2024", "field 'place' holds a text, got the number 2024"),
        ("year == 3", "expected a number"),
        ("year ~ 3", "expected a field, a value or an operator"),
        ("year between 1 and 2", "expected an operator"),
        ("place glob 'x'", "expected an operator"),
        ("place = 'Oslo", "expected a field, a value or an operator"),
        ('place = "Oslo"', "expected a field, a value or an operator"),
        ("`year` = 1", "expected a field, a value or an operator"),
        ("select = 1", "no field 'select'"),
        ("rowid = 1", "no field 'rowid'"),
        ("m_year = 1", "no field 'm_year'"),
        ("__class__ = 1", "no field '__class__'"),
        ("place = 'x'; drop table documents; --", "expected a field, a value or an operator"),
        ("place = 'x' or 1 = 1", "expected a field"),
        ("   ", "expected a field at the end"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_filters_that_cannot_be_are_named(index: Index, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        index.search("a star", filter=text)
    assert len(str(raised.value)) < 1000
    assert len(index.search("a star")) == 3


@pytest.mark.parametrize("text", [5, b"year = 1", ["year = 1"], {"year": 1}, True, 1.5])
def test_a_filter_is_a_text(index: Index, text) -> None:
    with pytest.raises(TypeError, match="filter: expected a text as str"):
        index.search("a star", filter=text)


@pytest.mark.parametrize("name", ["lancedb", "milvus"])
def test_backends_with_their_own_filters_take_long_ones(name: str, tmp_path) -> None:
    pytest.importorskip({"lancedb": "lancedb", "milvus": "milvus_lite"}[name])
    backend = open_backend(name, tmp_path / "it", 8, "float32")
    backend.add(np.arange(3), np.eye(8, dtype=np.float32)[:3], METADATA)
    for text, keys in (
        (" or ".join(f"year = {i}" for i in range(1500, 3000)), {0, 1}),
        (" or ".join(f"year > {i} and year < {i + 2}" for i in range(2020, 2100)), {0, 1}),
    ):
        selection = Selection(parse(text, FIELDS), lambda _: np.empty(0))
        found = backend.search(np.eye(8, dtype=np.float32)[:1], 3, selection)[0]
        assert set(found[found >= 0].tolist()) == keys
    backend.close()
