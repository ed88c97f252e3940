"""Checks of arguments at the public doors: one function for each kind of argument.

A function takes what came and the name that the user knows it by, and returns the checked value in the form that the library works with,
or raises a TypeError (another kind of thing) or a ValueError (the right kind, but not such a value). The message says the name, what was
expected, what came, and what to do. Functions behind the doors take their arguments as checked.
"""

import difflib
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sized
from collections.abc import Set as AbstractSet
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from unimodal.config import nearest

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LONGEST = 200  # characters of what came
SHORT = reprlib.Repr()  # of what came
SHORT.maxstring = SHORT.maxother = 80

MOST_MEMBERS = 10_000_000  # of an iterator: beyond it one is taken to have no end
WIDEST = 2**63  # whole numbers of a database have 64 bits with a sign


def described(value: Any) -> str:
    """What came, in a few words for a message: its type, and its shape or the beginning of its text."""
    kind = type(value).__name__
    if isinstance(value, np.ndarray | Tensor):
        return f"{kind} {list(value.shape)} of {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        words = SHORT.repr(value)
        words = words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
    except Exception:  # a number of thousands of digits, an object that cannot say what it is
        return kind
    return words if type(value) in (type(None), bool, int, float, str) else f"{kind} {words}"


def refused(name: str, expected: str, value: Any, advice: str = "") -> str:
    """The message about a value that is not what was expected."""
    return f"{name}: expected {expected}, got {described(value)}" + (f"; {advice}" if advice else "")


def optional(check: Callable[..., T], value: Any, *rest: Any, **options: Any) -> T | None:
    """None where nothing was given, otherwise what `check` makes of the value."""
    return None if value is None else check(value, *rest, **options)


# Numbers.


def flag(value: Any, name: str) -> bool:
    """True or False, also numpy's."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(refused(name, "True or False", value))
    return bool(value)


def integer(value: Any, name: str, *, least: int = 1, most: int = WIDEST - 1) -> int:
    """A whole number from `least` to `most`, also numpy's; a bool is none."""
    span = f"{least} to {most}" if most < WIDEST - 1 else f"at least {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(refused(name, f"a whole number, {span}", value))
    if not least <= int(value) <= most:
        raise ValueError(refused(name, span if int(value) < most else f"{least} to {most}", value))
    return int(value)


def number(
    value: Any, name: str, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> float:
    """A finite number from `least` to `most` and greater than `above`, also numpy's; a bool is none."""
    bounds = {"at least": least, "at most": most, "above": above}
    limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    expected = f"a finite number {limits}".rstrip()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(refused(name, expected, value))
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not least <= result <= most or not result > above:
        raise ValueError(refused(name, expected, value))
    return result


# Words, names and paths.


def text(value: Any, name: str, *, empty: bool = False) -> str:
    """A text that can be written as UTF-8; with `empty` it may have no words."""
    if not isinstance(value, str):
        raise TypeError(refused(name, "a text as str", value))
    if not empty and not value.strip():
        raise ValueError(f"{name}: the text is empty; leave it out, or give it words")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: the text has half of a character, {value[error.start]!r} at place {error.start}, which no file and no tokenizer "
            f"takes, in {described(value)}; read it again with the right encoding, or replace what text.encode(errors='replace') replaces"
        ) from None
    return value


def choice(value: Any, name: str, choices: Iterable[str]) -> str:
    """One of several names."""
    known = list(choices)
    expected = f"one of {', '.join(known)}"
    if not isinstance(value, str):
        raise TypeError(refused(name, expected, value))
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        raise ValueError(refused(name, expected, value, f"did you mean {close[0]!r}?" if close else ""))
    return value


def path(value: Any, name: str) -> Path:
    """The path of a file or folder, as a str or a pathlib.Path; whether something is there is not looked at."""
    try:
        given = os.fspath(value)
    except Exception:  # a TypeError, or what an object that says it is a path raises
        given = None
    if not isinstance(given, str):
        raise TypeError(refused(name, "a path as str or pathlib.Path", value))
    if not given.strip() or "\0" in given:
        raise ValueError(refused(name, "a path of at least one character and without null characters", value))
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise ValueError(refused(name, "a path that the file system can write", value, "rename it")) from None
    return Path(given)


# Collections.


def listed(value: Any, name: str, of: str) -> list[Any]:
    """The members of a list, a tuple, an array or another iterable in its order; `of` says in the message what they are.

    A str, bytes, a mapping and a set are none: the first two are single values, the others have no order to go by.
    """
    if isinstance(value, str | bytes | bytearray | Mapping | AbstractSet) or not isinstance(value, Iterable):
        raise TypeError(refused(name, f"a list of {of}", value))
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 0:
        raise TypeError(refused(name, f"a list of {of}", value, "put it into a list"))
    if isinstance(value, Tensor):
        return list(tensor(value, name, f"a list of {of}"))
    try:
        members = list(value if isinstance(value, Sized) else islice(value, MOST_MEMBERS + 1))
    except Exception as error:  # whatever the caller's own iterator raises
        raise ValueError(
            f"{name}: expected a list of {of}; reading it raised {type(error).__name__}: {error}"
        ) from error
    if len(members) > MOST_MEMBERS and not isinstance(value, Sized):
        raise ValueError(f"{name}: expected a list of {of}, got more than {MOST_MEMBERS:,} of them, or no end")
    return members


def mapping(value: Any, name: str, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """A dict whose keys are texts, those of `keys` alone where they are given."""
    if not isinstance(value, Mapping):
        raise TypeError(refused(name, "a dict", value))
    for key in value:
        text(key, f"{name}: a key")
        if keys is not None and key not in (known := list(keys)):
            raise ValueError(f"{name}: unknown key {key!r}; {nearest(key, known)}")
    return dict(value)


def function(value: Any, name: str) -> Callable[..., Any]:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(refused(name, "a function", value))
    return value


def passed_on(function: Callable[..., T], inputs: Mapping[str, Any], options: Mapping[str, Any], name: str) -> T:
    """What a function of another library makes of our inputs and the caller's options; where it fails, the options are named."""
    try:
        return function(**inputs, **options)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{name}: the options {', '.join(options)} end in {type(error).__name__}: {str(error)[:500]}; look them up in the "
            f"documentation of {function.__module__}"
        ) from error


# Documents.


def identifier(value: Any, name: str) -> int | str:
    """What a document is called: a text, or a whole number of 64 bits, also numpy's."""
    if isinstance(value, str):
        return str(text(value, name, empty=True))
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(refused(name, "an id as int or str", value))
    if not -WIDEST <= int(value) < WIDEST:
        raise ValueError(refused(name, "a whole number of up to 64 bits", value, "pass it as a text"))
    return int(value)


def ids(value: Any, name: str = "ids") -> list[int | str]:
    """What several documents are called; whether they differ is not looked at."""
    return [identifier(one, f"{name}[{i}]") for i, one in enumerate(listed(value, name, "ids, each an int or a str"))]


def metadata(value: Any, count: int, name: str = "metadata") -> list[dict[str, Any]]:
    """One dict of texts, finite numbers and flags for each of `count` documents; entries that are None are left out."""
    rows = listed(value, name, "dicts, one for each document")
    if len(rows) != count:
        raise ValueError(f"{name}: expected {count} dicts, one for each document, got {len(rows)}")
    return [_fields(row, f"{name}[{i}]") for i, row in enumerate(rows)]


def _fields(row: Any, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in mapping(row, name).items():
        where = f"{name}[{key!r}]"
        if isinstance(value, str):
            fields[key] = str(text(value, where, empty=True))
        elif isinstance(value, bool | np.bool_):
            fields[key] = bool(value)
        elif isinstance(value, Integral):
            fields[key] = int(value)
        elif isinstance(value, Real):
            fields[key] = number(value, where)
        elif value is not None:
            raise TypeError(refused(where, "a text, a number, True, False or None", value))
    return fields


# Arrays and tensors.


def tensor(value: Any, name: str, expected: str) -> Tensor:
    """Numbers as a tensor on the device where they are, without gradients, from a tensor, an array, or lists of numbers or of these."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type == "meta":
            raise TypeError(refused(name, expected, value, "pass a plain tensor"))
        return value.detach()
    if not isinstance(value, np.ndarray | list | tuple):
        raise TypeError(refused(name, expected, value))
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        rows = [tensor(one, f"{name}[{i}]", expected) for i, one in enumerate(value)]
        if len({(row.shape, row.dtype, row.device) for row in rows}) > 1:
            raise ValueError(refused(name, expected, value, "give all rows one length, dtype and device"))
        return torch.stack(rows)
    try:
        array = np.asarray(value)
    except Exception:  # numpy's of unlike rows, and what the members of the caller raise
        raise ValueError(refused(name, expected, value, "give all rows the same length")) from None
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(refused(name, expected, value, "its values are not all numbers of up to 64 bits"))
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(refused(name, expected, value, "a masked array hides values; fill them in first"))
    copy = np.empty(
        array.shape, np.dtype(f"{array.dtype.kind}{array.dtype.itemsize}")
    )  # in the order of bytes of this machine
    copy[...] = array
    return torch.from_numpy(copy)


def vectors(value: Any, name: str, *, dimensions: tuple[int, ...] = (2,), width: int | None = None) -> Tensor:
    """Finite embeddings as a float32 tensor, from a tensor, an array or lists of floating-point numbers.

    Args:
        value: what came.
        name: what it is called.
        dimensions: how many it may have: 1 for a vector [E], 2 for several [N, E], 3 for several of each item [N, Q, E].
        width: the size E of the last dimension; None takes any above zero.
    """
    shapes = {1: "[E]", 2: "[N, E]", 3: "[N, Q, E]"}
    expected = f"float vectors {' or '.join(shapes[n] for n in dimensions)}" + (f" with E = {width}" if width else "")
    found = tensor(value, name, expected)
    if not found.is_floating_point():
        raise TypeError(refused(name, expected, value, "unimodal.search.dequantise makes vectors of codes"))
    if found.ndim not in dimensions or found.shape[-1] != (width or found.shape[-1]) or not found.shape[-1]:
        raise ValueError(refused(name, expected, value))
    found = found.float()
    if found.numel() and not bool((finite := found.isfinite().flatten(1 if found.ndim > 1 else 0)).all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected finite numbers, got NaN or infinite ones in {described(value)}, first at place {row}; look at what made them"
        )
    return found


def integers(value: Any, name: str, count: int | None = None) -> Tensor:
    """Whole numbers as a long tensor [N], from a tensor, an array or a list; `count` is the N that is needed."""
    expected = "whole numbers [N]" if count is None else f"{count} whole numbers [{count}]"
    if isinstance(value, range) or (isinstance(value, list | tuple) and not value):
        value = list(value)
        found = torch.tensor(value, dtype=torch.long)
    else:
        found = tensor(value, name, expected)
    if found.dtype == torch.bool or found.is_floating_point():
        raise TypeError(refused(name, expected, value))
    if found.ndim != 1 or len(found) != (len(found) if count is None else count):
        raise ValueError(refused(name, expected, value))
    if found.dtype == torch.uint64 and len(found) and int(found.cpu().numpy().max()) >= WIDEST:
        raise ValueError(refused(name, f"{expected} of up to 64 bits with a sign", value))
    return found.long()


# Torch's own.


def device(value: Any, name: str = "device") -> torch.device:
    """A device that this machine has: a torch.device, its name, or the number of an accelerator."""
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    here += ["mps"] if torch.backends.mps.is_available() else []
    expected = f"a device of this machine ({', '.join(here)})"
    if isinstance(value, bool) or not isinstance(value, str | torch.device | Integral):
        raise TypeError(refused(name, expected, value))
    try:
        found = torch.device(int(value) if isinstance(value, Integral) else value)
        torch.empty(1, device=found)
    except Exception:  # torch, each of its backends and each driver have their own for a device that is not there
        raise ValueError(refused(name, expected, value)) from None
    if found.type == "meta":
        raise ValueError(refused(name, expected, value, "a meta device holds no numbers"))
    return found


def dtype(value: Any, name: str = "dtype") -> torch.dtype:
    """A floating-point precision: a torch.dtype or its name."""
    found = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    expected = f"one of {', '.join(f'torch.{known}' for known in DTYPES)}"
    if isinstance(value, str) and found is None:
        raise ValueError(refused(name, expected, value))
    if not isinstance(found, torch.dtype):
        raise TypeError(refused(name, expected, value))
    if found not in DTYPES.values():
        raise ValueError(refused(name, expected, value))
    return found


def generators(value: Any, count: int, name: str = "generator") -> torch.Generator | list[torch.Generator]:
    """One source of random numbers for all, or one for each of `count` results."""
    expected = f"a torch.Generator, or a list of {count}, one for each result"
    advice = "torch.Generator().manual_seed(0) makes one"
    if isinstance(value, torch.Generator):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(one, torch.Generator) for one in value):
        raise TypeError(refused(name, expected, value, advice))
    if len(value) != count:
        raise ValueError(f"{name}: expected {expected}, got {len(value)} of them")
    return list(value)
