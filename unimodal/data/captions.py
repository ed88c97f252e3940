"""Captions as the cells of tables hold them: which columns are captions, and what a cell says.

The captions of a table are in the first of these that it has: a column `captions`; the columns `caption`, `caption_0`, `caption_1`, ...
together; and likewise `texts` and `text`, `sentences` and `sentence`, `raw`, `titles` and `title`, `comments` and `comment`. Case does
not matter.
"""

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any

WORDS = ("caption", "text", "sentence", "raw", "title", "comment")
# How pandas, R, SQL and Excel write that a cell has no value.
MISSING = frozenset(("nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NA", "N/A", "#N/A", "NaT"))
QUOTED = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
NUMPY_LIST = re.compile(rf"\[\s*{QUOTED}(?:\s+{QUOTED})*\s*\]", re.DOTALL)
# Such a text is no caption, even where it cannot be read as a list (numpy writes "..." for a long one), or its end was cut off.
LIST = re.compile(r"(?:array\()?[\[{]+\s*['\"].*['\"]\s*,?\s*[\]}]+(?:, *dtype=\w+)?\)?|\[\s*['\"][^\]]*", re.DOTALL)


def caption_column(names: Sequence[str], where: str) -> re.Pattern[str]:
    """What fits the columns of captions, by the names of all columns.

    Raises:
        ValueError: there is no such column; the message begins with `where`.
    """
    for word in WORDS:
        for kind in (rf"\s*{word}s\s*", rf"\s*{word}(?:s?[ _.-]?\d+)?\s*"):
            pattern = re.compile(kind, re.IGNORECASE)
            if any(map(pattern.fullmatch, names)):
                return pattern
    raise ValueError(
        f"{where}: none of the columns {list(names)} is called captions, caption, caption_1, text, sentence, raw, title or comment; name "
        "it with captions=..."
    )


def usual_captions(names: Sequence[str], where: str) -> list[str]:
    """The columns of captions by the names of all columns; arguments and errors as `caption_column`."""
    return list(filter(caption_column(names, where).fullmatch, names))


def is_missing(cell: Any) -> bool:
    """Whether a cell says that it has no value."""
    if isinstance(cell, str):
        return not cell.strip() or cell.strip() in MISSING
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def as_captions(cell: Any) -> list[Any]:
    """The captions of a cell: its text, or each of a list, which may be written as text in JSON, in Python or by numpy.

    What is no text stays as it is, for `caption_fault` to name.
    """
    listed = written_list(cell) if isinstance(cell, str) else cell
    if not isinstance(listed, list | tuple):
        return [cell]
    return [one.get("raw", one) if isinstance(one, dict) else one for one in listed]


def written_list(text: str) -> list[Any] | None:
    """The list that is written in a text, or None: `["a", "b"]`, `['a', 'b']`, `('a', 'b')`, `['a' 'b']` or `[null]`."""
    text = text.strip()
    if NUMPY_LIST.fullmatch(text):  # Python would join these to one
        return [ast.literal_eval(part) for part in re.findall(QUOTED, text, re.DOTALL)]
    if not (text[:1] in ("[", "(") and text[-1:] in ("]", ")")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if not isinstance(value, list | tuple) or not all(
            is_missing(one) or isinstance(one, str | dict | list) for one in value
        ):
            continue
        joined = all(isinstance(one, str) for one in value) and len(re.findall(QUOTED, text, re.DOTALL)) != len(value)
        return None if joined and read is ast.literal_eval else list(value)
    return None


def is_written_list(text: str) -> bool:
    """Whether a text is most likely a list that was written as text."""
    return LIST.fullmatch(text.strip()) is not None
