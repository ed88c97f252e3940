"""`unimodal explain PICTURE TEXT` writes why a model, or a system of the survey, matches the two: a heat-map, and word weights."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unimodal.explain import Explanation
from unimodal.inference import Unimodal
from unimodal.recipes import CHECKPOINT, shipped_checkpoint
from unimodal.survey.explain import explain
from unimodal.survey.run import load_system


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the verb."""
    verb = argparse.ArgumentParser(prog="unimodal explain", description=__doc__)
    verb.add_argument("verb", choices=["explain"], help=argparse.SUPPRESS)
    verb.add_argument("picture", type=Path, help="a picture")
    verb.add_argument("text", help="a text")
    verb.add_argument("--model", help=f"a checkpoint folder or Hub id; by default {CHECKPOINT}")
    verb.add_argument("--system", type=Path, help="in its place a system that `unimodal survey` trained: OUT/NAME")
    verb.add_argument("--out", type=Path, default=Path("why.png"), help="the heat-map's file")
    verb.add_argument("--steps", type=int, default=64, help="of integrated gradients")
    return verb.parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Write the heat-map and print the words; bad input becomes one line on standard error and status 1."""
    options = parse(arguments)
    try:
        name, found = _explained(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found.overlay().save(options.out)
    except (ImportError, OSError, ValueError, TypeError) as error:
        print(f"unimodal explain: {error}", file=sys.stderr)
        return 1
    table = Table("word", f"{name} {found.logit:.3f}, of a blank picture {found.blank_logit:.3f}")
    for word, weight in found.words:
        table.add_row(word, f"{weight:+.3f}")
    console = Console()
    console.print(table)
    console.print(f"[bold]{options.out}[/]  red speaks for the match, blue against it")
    return 0


def _explained(options: argparse.Namespace) -> tuple[str, Explanation]:
    """What scored the pair, and why."""
    if options.system is None:
        model = Unimodal.from_pretrained(options.model or shipped_checkpoint())
        return "match logit", model.explain(options.picture, options.text, steps=options.steps)
    spec, system, encoders = load_system(options.system)
    return f"{spec.title}:", explain(system, encoders, options.picture, options.text, steps=options.steps)
