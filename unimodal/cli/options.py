"""The parser of the verbs, and what the values of their options may be: a wrong one is one line on standard error and status 2."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from unimodal import arguments
from unimodal.recipes import CHECKPOINT

LARGEST = 2**63 - 1  # of the whole numbers that torch and SQLite take
RULE = "by default as the model's scoring rule says"


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, and where to read more."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells more\n")


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """The type of an option that takes a whole number."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            bound = f"from {least} up" if most == LARGEST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {bound}, got {text!r}")
        return value

    return read


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option that takes a finite number."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most:
            bounds = [f"from {least:g}"] * (least > -math.inf) + [f"to {most:g}"] * (most < math.inf)
            raise argparse.ArgumentTypeError(f"expected {' '.join(['a finite number', *bounds])}, got {text!r}")
        return value

    return read


def device(text: str) -> str:
    """The type of an option that takes a device of this machine."""
    try:
        return str(arguments.device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def names(text: str) -> list[str]:
    """The type of an option that takes names with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return parts


def words(text: str) -> str:
    """The type of an option that takes what may not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected some text, got none")
    return text


def add_model(verb: argparse.ArgumentParser) -> None:
    """Add `--model` and `--device`."""
    verb.add_argument("--model", type=words, help=f"a checkpoint folder or Hub id; by default {CHECKPOINT}")
    verb.add_argument("--device", type=device, help="where to run, for example cuda; by default the CPU")
