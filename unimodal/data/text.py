"""Text as users' files hold it: in UTF-8, or in another Unicode that says so by its first bytes, as Excel and Notepad write it."""

import codecs
import json
from typing import Any

MARKS = (  # a mark of UTF-32 begins with one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def decoded(content: bytes) -> str:
    """The text of a file, without its byte-order mark. Bytes that are no text stay visible, for `caption_fault` to name."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode(errors="surrogateescape")


def table_text(content: bytes, where: str) -> str:
    """The text of a table.

    Raises:
        ValueError: it holds a NUL, which no text does.
    """
    text = decoded(content)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{where} line {line}: a byte of zero, which no text holds; save the file as UTF-8 (it may be UTF-16 without its mark)"
        )
    return text


def lines(content: bytes) -> list[str]:
    """One caption a line, in a file of captions."""
    rows = decoded(content).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [row for row in rows if row.strip()]


def parse_json(content: bytes | str, where: str) -> Any:
    """What JSON holds.

    Raises:
        ValueError: it is no JSON, or an object of it gives a key twice.
    """
    try:
        return json.loads(content, object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is no JSON that can be read: it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"one object has the key {twice!r} twice; give it once")
    return out
