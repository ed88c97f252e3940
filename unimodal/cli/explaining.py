"""`unimodal explain PICTURE TEXT` writes why a model, or a system of the survey, matches the two: a picture of both.

Beside the picture the heat-map, under it the words with their weights: red speaks for the match, blue against it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unimodal.explain import Explanation
from unimodal.inference import Unimodal
from unimodal.recipes import CHECKPOINT, shipped_checkpoint
from unimodal.survey.explain import explain
from unimodal.survey.run import RESULT, load_system


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the verb."""
    verb = argparse.ArgumentParser(prog="unimodal explain", description=__doc__)
    verb.add_argument("verb", choices=["explain"], help=argparse.SUPPRESS)
    verb.add_argument("picture", type=Path, help="a picture")
    verb.add_argument("text", help="a text")
    verb.add_argument("--model", help=f"a checkpoint folder or Hub id; by default {CHECKPOINT}")
    verb.add_argument("--system", type=Path, help="in its place a system that `unimodal survey` trained: OUT/NAME")
    verb.add_argument("--out", type=Path, default=Path("why.png"), help="the picture's file")
    verb.add_argument("--steps", type=int, default=64, help="of integrated gradients")
    return verb.parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Write the heat-map and print the words; bad input becomes one line on standard error and status 1."""
    options = parse(arguments)
    try:
        name, found, test = _explained(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found.picture().save(options.out)
    except (ImportError, OSError, ValueError, TypeError) as error:
        print(f"unimodal explain: {error}", file=sys.stderr)
        return 1
    table = Table("word", f"{name} {found.logit:.3f}, of a blank picture {found.blank_logit:.3f}")
    for word, weight in found.words:
        table.add_row(word, f"{weight:+.3f}")
    console = Console()
    console.print(table)
    if test:
        console.print(
            f"Deletion test of this system: with the most relevant image tokens removed first its score falls {test['gap']:.2f} standard "
            f"deviations further than at random, faster for {test['faster']:.0%} of {test['pairs']:.0f} pairs"
        )
    console.print(f"[bold]{options.out}[/]  red speaks for the match, blue against it")
    return 0


def _explained(options: argparse.Namespace) -> tuple[str, Explanation, dict[str, float] | None]:
    """What scored the pair, why, and of a system what its deletion test gave."""
    if options.system is None:
        model = Unimodal.from_pretrained(options.model or shipped_checkpoint())
        return "match logit", model.explain(options.picture, options.text, steps=options.steps), None
    spec, system, encoders = load_system(options.system)
    found = explain(system, encoders, options.picture, options.text, steps=options.steps)
    return f"{spec.title}:", found, json.loads((options.system / RESULT).read_text())["deletion"]
