"""What every tokenizer of ours asks of the texts that it is given."""

from collections.abc import Sequence
from typing import Any

from unimodal import arguments


class TruncationWarning(UserWarning):
    """Some texts were longer than the model reads."""


class UnknownWordsWarning(UserWarning):
    """A text of words that the model has never read: what it makes of the text says nothing."""


def unknown_words(tokenizer: Any, text: str) -> str:
    """What to say of a text none of whose words the tokenizer knows; empty where it knows one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if any(i != tokenizer.unk_token_id for i in ids):
        return ""
    return f"the model knows none of the words of {text[:80]!r}, so what it makes of them says nothing; use other words"


def require_texts(texts: Sequence[str]) -> None:
    """Refuse what is not a list of texts with words in them."""
    if isinstance(texts, str):
        raise TypeError(f"texts takes a list of strings, got the string {texts[:40]!r}; put it in a list")
    if len(texts) == 0:
        raise ValueError("texts: got an empty list; give at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: entry {i} is {type(text).__name__} {text!r}; expected a string")
        if not text.strip():
            raise ValueError(f"texts: entry {i} is empty; leave it out or give it words")
        arguments.text(text, f"texts: entry {i}")
