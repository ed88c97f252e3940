"""Filters over documents' metadata: a small part of SQL's `where` that every backend can evaluate.

    year >= 2020 and place in ('Oslo', 'Rome') and not (title like 'Draft%' or blurred = true)

A field is a key of the metadata. It is compared with a number, a 'text' (a quote inside is doubled) or true / false by `=`, `!=`, `<`,
`<=`, `>`, `>=`, `in (...)`, `like` (% stands for any characters, _ for one; case counts), or asked for by `is null`; `not`, `and`, `or` and
parentheses join these. A document without the field fails every comparison with it, negated ones too, as in SQL.

Negations are moved down to the comparisons when a filter is read, so that no backend's own idea of `not` and null matters. Long chains of
`and` and `or` are written as balanced trees, and `year = 1 or year = 2 or ...` as `year in (1, 2, ...)`: databases bound the depth of an
expression, not its length.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from unimodal import arguments
from unimodal.config import nearest

Kind = Literal["text", "number", "flag"]  # what the values of one field are

OPPOSITE = {"=": "!=", "<": ">=", "<=": ">", "in": "not in", "like": "not like", "is null": "is not null"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
DEEPEST = 20  # brackets within brackets
SHOWN = 200  # characters of a filter in an error
WHOLE = 2**53  # beyond it whole numbers are compared as floats
WORDS = {"and", "or", "not", "in", "like", "is", "null", "true", "false"}
TOKEN = re.compile(
    r"\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<text>'(?:[^']|'')*')|(?P<word>[A-Za-z_]\w*)|(?P<sign><=|>=|!=|<>|[=<>(),]))",
    re.ASCII,
)


def column(field: str) -> str:
    """The name under which backends keep a field, apart from their own columns."""
    return f"m_{field}"


@dataclass(frozen=True)
class Test:
    """One comparison of a field with a value, or with several under `in`."""

    field: str
    operator: str
    value: Any = None

    def sql(self) -> str:
        """In the SQL that SQLite and LanceDB share."""
        name = f"`{column(self.field)}`"
        if self.operator.startswith("is"):
            return f"{name} {self.operator}"
        if isinstance(self.value, tuple):
            return f"{name} {self.operator} ({', '.join(map(_sql, self.value))})"
        return f"{name} {self.operator} {_sql(self.value)}"

    def milvus(self) -> str:
        """In the expressions of Milvus, where only `exists` makes a missing field fail a negated comparison."""
        name = column(self.field)
        if self.operator.startswith("is"):
            return f"exists {name}" if self.operator == "is not null" else f"not (exists {name})"
        if isinstance(self.value, tuple):
            test = f"{name} {self.operator} [{', '.join(map(_json, self.value))}]"
        elif self.operator == "not like":
            test = f"not ({name} like {_json(self.value)})"
        else:
            test = f"{name} {'==' if self.operator == '=' else self.operator} {_json(self.value)}"
        return f"(exists {name} and {test})"


@dataclass(frozen=True)
class Joined:
    """Several filters, all or one of which must hold."""

    word: Literal["and", "or"]
    parts: tuple["Filter", ...]

    def sql(self) -> str:
        return self._balanced([part.sql() for part in self.parts])

    def milvus(self) -> str:
        return self._balanced([part.milvus() for part in self.parts])

    def _balanced(self, parts: Sequence[str]) -> str:
        if len(parts) == 1:
            return parts[0]
        half = len(parts) // 2
        return f"({self._balanced(parts[:half])} {self.word} {self._balanced(parts[half:])})"


Filter = Test | Joined


class Selection:
    """The documents that a filter lets through, in the form that a backend prefers.

    Attributes:
        filter: for a backend that keeps the metadata itself.
        keys: [n] int64, of the vectors that are let through; looked up when first asked for.
    """

    def __init__(self, filter: Filter, find: Callable[[Filter], np.ndarray]) -> None:
        self.filter, self._find = filter, find

    @cached_property
    def keys(self) -> np.ndarray:
        return self._find(self.filter)


def parse(text: str, fields: Mapping[str, Kind]) -> Filter:
    """Read a filter.

    Args:
        text: see above.
        fields: what the values of each known field are.

    Raises:
        TypeError: no text.
        ValueError: not such a filter, an unknown field, or a value of another kind than the field's.
    """
    arguments.text(text, "filter", empty=True)
    if "\0" in text:
        raise ValueError("filter: a null character cannot be compared; leave it out")
    return _Reader(text, fields).read()


class _Reader:
    """Recursive descent: or < and < not < comparison."""

    def __init__(self, text: str, fields: Mapping[str, Kind]) -> None:
        self.text, self.fields, self.at, self.depth = text, fields, 0, 0
        self.name = f"filter {text[:SHOWN]!r}" + ("..." if len(text) > SHOWN else "")
        self.tokens: list[tuple[str, str, int]] = []  # (kind, text, place)
        place, end = 0, len(text.rstrip())
        while place < end:
            found = TOKEN.match(text, place)
            if found is None:
                raise self._error(place, "a field, a value or an operator")
            assert found.lastgroup
            self.tokens.append((found.lastgroup, found[found.lastgroup], found.start(found.lastgroup)))
            place = found.end()

    def read(self) -> Filter:
        whole = self._any(False)
        if self.at < len(self.tokens):
            raise self._error(self.tokens[self.at][2], "`and`, `or` or the end")
        return whole

    def _any(self, negated: bool) -> Filter:
        return self._joined("or", self._all, negated)

    def _all(self, negated: bool) -> Filter:
        return self._joined("and", self._one, negated)

    def _joined(self, word: Literal["and", "or"], part: Callable[[bool], Filter], negated: bool) -> Filter:
        parts = [part(negated)]
        while self._take(word):
            parts.append(part(negated))
        other: Literal["and", "or"] = "and" if word == "or" else "or"
        return _joined(other if negated else word, parts)

    def _one(self, negated: bool) -> Filter:
        while self._take("not"):
            negated = not negated
        if self._take("("):
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"{self.name}: brackets within brackets go {DEEPEST} deep at most; leave some out")
            inner = self._any(negated)
            self._need(")")
            self.depth -= 1
            return inner
        test = self._test()
        return Test(test.field, OPPOSITE[test.operator], test.value) if negated else test

    def _test(self) -> Test:
        kind, field, place = self._next("a field")
        if kind != "word" or field.lower() in WORDS:
            raise self._error(place, "a field")
        if field not in self.fields:
            known = nearest(field, self.fields) if self.fields else "the documents have no metadata"
            raise ValueError(f"{self.name}: no field {field!r:.80}; {known}")
        if self._take("is"):
            operator = "is not null" if self._take("not") else "is null"
            self._need("null")
            return Test(field, operator)
        inverted = self._take("not")
        _, sign, place = self._next("an operator")
        operator = {"<>": "!="}.get(sign, sign.lower())
        if operator not in (("in", "like") if inverted else OPPOSITE):
            raise self._error(
                place, "`in` or `like`" if inverted else "an operator (=, !=, <, <=, >, >=, in, like, is)"
            )
        operator = OPPOSITE[operator] if inverted else operator
        if not operator.endswith("in"):
            return Test(field, operator, self._value(field, operator))
        self._need("(")
        values = [self._value(field, operator)]
        while self._take(","):
            values.append(self._value(field, operator))
        self._need(")")
        return Test(field, operator, tuple(values))

    def _value(self, field: str, operator: str) -> Any:
        kind, token, place = self._next("a value")
        value: Any
        if kind == "text":
            value, given = token[1:-1].replace("''", "'"), "text"
        elif kind == "number":
            value, given = float(token), "number"
            if not math.isfinite(value):
                raise ValueError(f"{self.name}: expected a finite number, got {token[:40]}; floats end at 1.8e308")
            if not re.search(r"[.eE]", token) and abs(value) <= WHOLE:
                value = int(token)
        elif token.lower() in ("true", "false"):
            value, given = token.lower() == "true", "flag"
        else:
            raise self._error(place, "a number, a 'text', true or false")
        if given != self.fields[field]:
            raise ValueError(f"{self.name}: field {field!r} holds a {self.fields[field]}, got the {given} {token:.80}")
        if (operator.endswith("like") and (given != "text" or "\\" in value)) or (
            given == "flag" and operator not in ("=", "!=")
        ):
            raise ValueError(
                f"{self.name}: {operator} does not go with the {given} {token:.80}; `like` takes a text without "
                "backslashes, true and false go with = and !="
            )
        return value

    def _next(self, wanted: str) -> tuple[str, str, int]:
        if self.at == len(self.tokens):
            raise self._error(len(self.text), wanted)
        self.at += 1
        return self.tokens[self.at - 1]

    def _take(self, word: str) -> bool:
        kind, token, _ = self.tokens[self.at] if self.at < len(self.tokens) else ("", "", 0)
        found = kind in ("word", "sign") and token.lower() == word
        self.at += found
        return found

    def _need(self, word: str) -> None:
        if not self._take(word):
            raise self._error(self.tokens[self.at][2] if self.at < len(self.tokens) else len(self.text), f"`{word}`")

    def _error(self, place: int, wanted: str) -> ValueError:
        rest = self.text[place:].strip()
        return ValueError(
            f"{self.name}: expected {wanted} at {rest[:20]!r}; an example: year >= 2020 and place = 'Oslo'"
            if rest
            else f"{self.name}: expected {wanted} at the end; an example: year >= 2020 and place = 'Oslo'"
        )


def _joined(word: Literal["and", "or"], parts: Sequence[Filter]) -> Filter:
    """Filters joined; those that compare one field for equality become one comparison with several values."""
    one, several = ("=", "in") if word == "or" else ("!=", "not in")
    values: dict[str, dict[Any, None]] = {}
    kept: list[Filter | str] = []  # a field stands for what it is compared with
    for part in parts:
        if isinstance(part, Test) and part.operator == one and not isinstance(part.value, bool):
            if part.field not in values:
                kept.append(part.field)
            values.setdefault(part.field, {})[part.value] = None
        else:
            kept.append(part)
    filters = [
        part
        if not isinstance(part, str)
        else Test(part, several, tuple(values[part]))
        if len(values[part]) > 1
        else Test(part, one, next(iter(values[part])))
        for part in kept
    ]
    return filters[0] if len(filters) == 1 else Joined(word, tuple(filters))


def _sql(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
