"""What is wrong with a configuration, in a few lines: jsonargparse's message without usage, alternatives and values repeated."""

import dataclasses
import difflib
import inspect
import re

from pytorch_lightning import Trainer

from unimodal import config, tasks
from unimodal.data.module import PairData


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which setting, and what to do."""


NOISE = re.compile(
    r"Given value( type)?:|Subtypes:|Errors:|Does not validate against any of the Union|- Expected a <class 'NoneType'>|- None\b|"
    r"(- )?Problem with given class_path 'unimodal\.(config\.)?\w+Config':"  # nobody names these classes
)
NESTED = re.compile(r'Parser key "([^"]*)":\nParser key "')


def short(message: str) -> str:
    """The message without noise, with the nearest known name where a key or a class is unknown."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if not NOISE.match(line.strip())]
    lines = NESTED.sub(r'Parser key "\1.', "\n".join(lines)).splitlines()
    unknown = re.search(r"(?:does not accept option|has no attribute|Option) '([^']*)'", message)
    if unknown and (near := difflib.get_close_matches(unknown[1].rpartition(".")[2], _known_names(), n=1)):
        lines.append(f"did you mean {near[0]!r}?")
    return "\n  ".join(dict.fromkeys(_both_ends(line) for line in lines if line))


def _both_ends(line: str, most: int = 1000) -> str:
    """A line that is not too long to read: what is wrong stands at its beginning, what to do about it at its end."""
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def _known_names() -> set[str]:
    """Keys that a configuration may have, and the classes it may name."""
    shapes = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]
    classes = [one for name in tasks.__all__ if callable(one := getattr(tasks, name))]
    parameters = {key for kind in (*shapes, *classes, PairData, Trainer) for key in inspect.signature(kind).parameters}
    return {"model", "data", "trainer", "seed_everything"} | parameters | set(tasks.__all__)
