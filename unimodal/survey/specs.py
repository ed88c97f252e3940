"""A system's configuration: what it is, how it trains, how it ranks, what was published of it. One YAML file each, in `configs/systems`."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from unimodal import words
from unimodal.systems import Encoders, Published, Scoring, Stage, System


@dataclass(frozen=True)
class Spec:
    """One system of the survey.

    Args:
        title: its name in tables.
        paper: authors, year and arXiv number.
        interaction: how finely images and texts meet, in the words of the survey's taxonomy.
        system: class and settings; the shared encoders are given by the run.
        scoring: how it ranks.
        stages: in their order; none for what is fitted in closed form, or not trained at all.
        inferred: what the public text does not fix, and is our reading; empty where the public code was followed.
        published: results of the literature, for a column of their own.
    """

    title: str
    paper: str
    interaction: str
    system: Callable[[Encoders], System]
    scoring: Scoring = field(default_factory=Scoring)
    stages: dict[str, Stage] = field(default_factory=dict)
    inferred: str = ""
    published: list[Published] = field(default_factory=list)


def systems_folder() -> Path:
    """The folder of the systems' YAML files: inside the package when installed, `configs/systems` in a clone."""
    package = Path(__file__).parent.parent
    installed = package / "configs" / "systems"
    return installed if installed.is_dir() else package.parent / "configs" / "systems"


def read_spec(path: str | Path) -> Spec:
    """Read a system's YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds a key, a class or a value that does not exist; the message names it and the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; expected the YAML file of a system, as those in configs/systems"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Spec, "spec")
    try:
        content = words.untyped({"spec": _in_words_of_today(words.load(path.read_text(encoding="utf-8")))})
        return parser.instantiate(words.told(parser.parse_object(content))).spec
    except Exception as error:  # jsonargparse raises its own kinds
        if missing := re.search(r"No module named '(\w+)'", str(error)):
            raise ValueError(
                f"{path}: no module named {missing[1]!r}; put the folder of {missing[1]}.py on PYTHONPATH, as in "
                "`PYTHONPATH=. unimodal survey ...`"
            ) from error
        raise ValueError(f"{path}: {error}") from error


def _in_words_of_today(spec: Any) -> Any:
    """A file of a survey that ran before `scoring.first` was `embed` or `pair` alone: it also named the system of the shortlist."""
    scoring = spec.get("scoring") if isinstance(spec, dict) else None
    if not isinstance(scoring, dict) or (first := scoring.get("first", "embed")) in ("embed", "pair"):
        return spec
    told = {"first": "pair"} if first == "pairs" else {"first": "embed", "shortlist": first}
    return {**spec, "scoring": {**scoring, **told}}
