"""What a word of a recipe or of the command line means: what the type of its key says.

YAML 1.1, as PyYAML reads it, takes `2026-11-30` for a date, `007` for 7, `010` for 8, `no` for false and `12:30:00` for 45000, whatever
the key takes. Here the word keeps its text until its type is known: `007` is text for a key of text and 7 for a key of whole numbers. A
key of no type (`Any`) reads the word by the core schema of YAML 1.2.

A mapping's keys are names, so they are always text. `null` and `~` in a file are no word but nothing.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, _loaders_dumpers, set_dumper, set_loader
from jsonargparse.typing import register_type

BOOL, INT, FLOAT, NULL = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null"))
CORE = (  # the core schema of YAML 1.2
    (NULL, re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    (BOOL, re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    (INT, re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    (
        FLOAT,
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
)


class Word(str):
    """A number or truth value that Python would write otherwise: its text, and in `value` what the core schema reads in it."""

    value: Any

    def __new__(cls, text: str, value: Any = None) -> "Word":
        word = super().__new__(cls, text)
        word.value = value
        return word


class _Quoted(str):
    """Text that would be a number, a truth value or nothing without its quotes."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML by the core schema of 1.2; what Python would write otherwise is a `Word`."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_word(self, node: yaml.ScalarNode) -> Any:
        value = _value(text := node.value, node.tag)
        return value if _text(value) == text or node.tag == NULL else Word(text, value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(
                "while reading a mapping", node.start_mark, f"found {twice!r} twice; give it once", node.start_mark
            )
        self.flatten_mapping(node)
        return {
            key.value if isinstance(key, yaml.ScalarNode) else self.construct_object(key, deep=True): self.construct_object(
                value, deep=deep
            )
            for key, value in node.value
        }  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """YAML that PyYAML's readers and ours read alike."""


class _Dumped(str):
    """YAML that remembers what it was made from: jsonargparse reads parts of what it prints again, without their types."""

    content: Any


class _Written(dict[Any, Any]):
    """A mapping whose words keep their text; where a key takes any mapping, `_plain` reads them."""

    __slots__ = ()


class _WrittenList(list[Any]):
    """A list, likewise."""

    __slots__ = ()


def load(text: str) -> Any:
    """YAML whose words keep their text where Python would write them otherwise.

    Raises:
        yaml.YAMLError: it is no YAML, or gives a key twice.
    """
    return yaml.load(text, Loader=_Loader)


def dump(content: Any) -> str:
    """YAML of settings, in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def word(text: str) -> Any:
    """What stands behind a key on the command line: YAML, or the text itself where it is none (`*.tar`)."""
    try:
        return load(text)
    except yaml.YAMLError:
        return text


def untyped(content: Any) -> Any:
    """The same settings with every number and truth value as its text, for a parser of jsonargparse, which knows the types."""
    if isinstance(content, dict):
        return _Written({key: untyped(value) for key, value in content.items()})
    if isinstance(content, list | tuple):
        return _WrittenList(untyped(value) for value in content)
    if isinstance(content, Word | bool | int | float):
        return _text(content)
    return _Quoted(content) if isinstance(content, str) and not isinstance(_core(content), str) else content


def told(parsed: Any) -> Any:
    """What a parser of jsonargparse gave, with text that was quoted as any other."""
    if isinstance(parsed, Namespace):
        for key, value in vars(parsed).items():
            setattr(parsed, key, told(value))
        return parsed
    if isinstance(parsed, dict):
        return {key: told(value) for key, value in parsed.items()}
    if isinstance(parsed, list):
        return [told(value) for value in parsed]
    return str(parsed) if isinstance(parsed, _Quoted) else parsed


def as_type(kind: Any, content: Any, name: str) -> Any:
    """Settings as a type takes them.

    Raises:
        ArgumentError: they are none of this type; the message names them.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    return told(parser.parse_object({name: untyped(content)}))[name]


def _value(text: str, tag: str) -> Any:
    """What the core schema reads in a scalar."""
    if tag == NULL:
        return None
    if tag == BOOL:
        return text.lower() == "true"
    if tag == FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    prefix = {"0x": 16, "0o": 8}
    return int(text, prefix.get(text[:2], 10))


def _text(value: Any) -> str:
    """A number or truth value as YAML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"(inf|nan)", r".\1", repr(value)) if isinstance(value, float) else str(value)


def _plain(content: Any) -> Any:
    """Settings of a key that takes anything: words by the core schema."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    if isinstance(content, _Quoted):
        return str(content)
    return _core(content) if isinstance(content, str) else content


def _core(text: str) -> Any:
    """A scalar without quotes by the core schema."""
    tag = next((tag for tag, pattern, _ in CORE if pattern.fullmatch(text)), None)
    return text if tag is None else _value(text, tag)


def _dump_for_parser(content: Any) -> str:
    dumped = _Dumped(dump(content))
    dumped.content = content
    return dumped


def _load_for_parser(text: str) -> Any:
    """What jsonargparse takes from a file or a word: words are read by their types, a lone one by the core schema."""
    if isinstance(text, _Dumped):
        return text.content
    content = load(text)
    return content.value if isinstance(content, Word) else untyped(content)


def _read_numbers_alike() -> None:
    """Where a key takes a whole number, jsonargparse reads its word by YAML 1.1, to which 12:30:00 is 45000 and +010 is 8, and has no
    public way to change that."""
    loader = _loaders_dumpers.get_yaml_default_loader()
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != INT]
        for first, pairs in loader.yaml_implicit_resolvers.items()
    }
    pattern = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$")
    loader.add_implicit_resolver(INT, pattern, list("-+0123456789"))
    loader.add_constructor(INT, lambda _, node: _value(node.value, INT))


for _tag, _pattern, _first in CORE:
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern.pattern})$"), _first)
    _Loader.add_constructor(_tag, _Loader.construct_word)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Dumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str(text)))
for _kind in (_Written, _WrittenList, _Quoted):
    register_type(_kind, serializer=_plain, deserializer=_plain, type_check=lambda value, kind: False)
set_loader("yaml", _load_for_parser, (yaml.YAMLError,))
set_dumper("yaml", _dump_for_parser)
_read_numbers_alike()
