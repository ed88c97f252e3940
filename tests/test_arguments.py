"""Checks at the public doors: what each kind of argument takes, and what the refusal says."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unimodal import arguments

NAN = float("nan")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


ODD: list[Any] = [
    None,
    True,
    -1,
    0.5,
    NAN,
    10**30,
    10**5000,
    "",
    "\ud800",
    "\0",
    b"a",
    object(),
    {1},
    {1: 2},
    [[1], [1, 2]],
    [1, "a"],
    np.array([]),
    np.array(1),
    np.array(["a"]),
    np.array([1 + 1j]),
    np.longdouble([1]),
    np.datetime64("2026"),
    torch.tensor(True),
    torch.eye(2).to_sparse(),
    torch.ones(1, device="meta"),
    len,
    Unprintable(),
]

CHECKS: dict[str, Callable[[Any], Any]] = {
    "flag": lambda value: arguments.flag(value, "name"),
    "integer": lambda value: arguments.integer(value, "name"),
    "number": lambda value: arguments.number(value, "name"),
    "text": lambda value: arguments.text(value, "name"),
    "choice": lambda value: arguments.choice(value, "name", ["a", "b"]),
    "path": lambda value: arguments.path(value, "name"),
    "listed": lambda value: arguments.listed(value, "name", "things"),
    "mapping": lambda value: arguments.mapping(value, "name"),
    "function": lambda value: arguments.function(value, "name"),
    "identifier": lambda value: arguments.identifier(value, "name"),
    "ids": lambda value: arguments.ids(value, "name"),
    "metadata": lambda value: arguments.metadata(value, 1, "name"),
    "tensor": lambda value: arguments.tensor(value, "name", "numbers"),
    "vectors": lambda value: arguments.vectors(value, "name", dimensions=(1, 2, 3)),
    "integers": lambda value: arguments.integers(value, "name"),
    "device": lambda value: arguments.device(value, "name"),
    "dtype": lambda value: arguments.dtype(value, "name"),
    "generators": lambda value: arguments.generators(value, 2, "name"),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_whatever_comes_is_taken_or_refused_by_name(check: Callable[[Any], Any]) -> None:
    for value in ODD:
        try:
            check(value)
        except (TypeError, ValueError) as error:
            assert str(error).startswith("name"), error
            assert len(str(error)) < 400, error


@pytest.mark.parametrize(
    ("check", "value", "checked"),
    [
        ("flag", np.bool_(True), True),
        ("integer", np.int64(3), 3),
        ("number", np.float32(0.5), 0.5),
        ("number", 3, 3.0),
        ("identifier", np.uint8(3), 3),
        ("identifier", -(2**63), -(2**63)),
        ("identifier", "", ""),
        ("ids", np.arange(2), [0, 1]),
        ("ids", range(2), [0, 1]),
        ("ids", ("a", 1), ["a", 1]),
        ("path", Path("a") / "b", Path("a/b")),
        ("metadata", [{"a": np.int8(1), "b": None, "c": np.float64(0.5)}], [{"a": 1, "c": 0.5}]),
        ("device", torch.device("cpu"), torch.device("cpu")),
        ("dtype", "bfloat16", torch.bfloat16),
        ("dtype", "torch.float16", torch.float16),
    ],
)
def test_values_of_numpy_and_python_come_out_alike(check: str, value: Any, checked: Any) -> None:
    result = CHECKS[check](value)
    assert result == checked
    assert type(result) is type(checked)


@pytest.mark.parametrize(
    ("check", "value", "kind", "message"),
    [
        ("integer", True, TypeError, "name: expected a whole number, at least 1, got True"),
        ("integer", 2.0, TypeError, "got 2.0"),
        ("integer", 0, ValueError, "name: expected at least 1, got 0"),
        ("integer", 2**63, ValueError, "expected 1 to 9223372036854775807, got 9223372036854775808"),
        ("number", NAN, ValueError, "name: expected a finite number, got nan"),
        ("number", 10**400, ValueError, "a finite number"),
        ("number", "1", TypeError, "got '1'"),
        ("text", "a \ud800", ValueError, r"half of a character, '\\ud800' at place 2"),
        ("text", " ", ValueError, "the text is empty"),
        ("choice", "aa", ValueError, "did you mean 'a'"),
        ("path", "a\0b", ValueError, "without null characters"),
        ("path", b"a", TypeError, "str or pathlib.Path, got bytes"),
        ("listed", "abc", TypeError, "a list of things, got 'abc'"),
        ("listed", {1, 2}, TypeError, "a list of things, got set"),
        ("identifier", True, TypeError, "an id as int or str, got True"),
        ("identifier", b"a", TypeError, "got bytes"),
        ("identifier", 2**63, ValueError, "pass it as a text"),
        ("ids", [1, 0.5], TypeError, re.escape("name[1]: expected an id")),
        ("metadata", [{}, {}], ValueError, "expected 1 dicts, one for each document, got 2"),
        ("metadata", ["x"], TypeError, re.escape("name[0]: expected a dict, got 'x'")),
        ("metadata", [{"a": NAN}], ValueError, "a finite number"),
        ("metadata", [{"a": []}], TypeError, "a text, a number, True, False or None, got list"),
        ("vectors", np.array([[1, 2]]), TypeError, "unimodal.search.dequantise"),
        (
            "vectors",
            [[NAN, 1.0]],
            ValueError,
            "expected finite numbers, got NaN or infinite ones in list .*, first at place 0",
        ),
        ("vectors", np.float32(1), TypeError, "float vectors"),
        ("vectors", np.ma.masked_array([1.0, 2.0], [True, False]), TypeError, "fill them in first"),
        ("listed", itertools.repeat("a"), ValueError, "got more than 10,000,000 of them, or no end"),
        ("listed", (1 / x for x in (1, 0)), ValueError, "reading it raised ZeroDivisionError"),
        ("vectors", [[1.0], [1.0, 2.0]], ValueError, "same length"),
        ("integers", [0.5], TypeError, "whole numbers"),
        ("integers", np.array([2**63], np.uint64), ValueError, "64 bits"),
        ("device", "gpu", ValueError, r"name: expected a device of this machine \(cpu"),
        ("device", "cuda:99", ValueError, "got 'cuda:99'"),
        ("device", "meta", ValueError, "holds no numbers"),
        ("device", 99, ValueError, "got 99"),
        ("dtype", "int8", ValueError, "torch.bfloat16"),
        ("dtype", torch.int8, ValueError, "torch.bfloat16"),
        ("generators", 0, TypeError, r"torch.Generator\(\).manual_seed"),
        ("generators", [torch.Generator()], ValueError, "a list of 2, one for each result, got 1"),
    ],
)
def test_a_refusal_says_what_came_and_what_was_expected(
    check: str, value: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        CHECKS[check](value)


@pytest.mark.parametrize(("bounds", "value"), [({"least": 1}, 0.5), ({"most": 1}, 1.5), ({"above": 0}, 0)])
def test_a_number_keeps_within_its_bounds(bounds: dict[str, float], value: float) -> None:
    with pytest.raises(ValueError, match=r"name: expected a finite number (at least 1|at most 1|above 0), got"):
        arguments.number(value, "name", **bounds)


def test_vectors_come_as_lists_arrays_and_tensors() -> None:
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    forms = (expected.requires_grad_(), expected.detach().numpy(), expected.tolist(), list(expected))
    for form in forms:
        vectors = arguments.vectors(form, "vectors", width=2)
        assert torch.equal(vectors.float(), expected.detach())
        assert not vectors.requires_grad
    with pytest.raises(ValueError, match="E = 3"):
        arguments.vectors(expected, "vectors", width=3)
