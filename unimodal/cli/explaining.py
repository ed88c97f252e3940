"""`unimodal explain PICTURE TEXT` writes why a model, or a system of the survey, matches the two: a picture of both.

Beside the picture the heat-map, under it the words with their weights: red speaks for the match, blue against it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unimodal.cli.options import Parser, whole, words
from unimodal.cli.output import add_json, add_overwrite, print_json, require_free_file
from unimodal.cli.verbs import DRAWN
from unimodal.data.endings import address_of
from unimodal.explain import Explanation
from unimodal.files import replacing
from unimodal.inference import Unimodal
from unimodal.recipes import CHECKPOINT, shipped_checkpoint
from unimodal.report.pieces import told_apart
from unimodal.survey.explain import explain
from unimodal.survey.run import RESULT, load_system


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the verb."""
    verb = Parser(prog="unimodal explain", description=__doc__)
    verb.add_argument("verb", choices=["explain"], help=argparse.SUPPRESS)
    verb.add_argument("picture", type=lambda text: Path(address_of(text)), help="a picture")
    verb.add_argument("text", help="a text")
    verb.add_argument("--model", type=words, help=f"a checkpoint folder or Hub id; by default {CHECKPOINT}")
    verb.add_argument("--system", type=Path, help="in its place a system that `unimodal survey` trained: OUT/NAME")
    verb.add_argument("--out", type=Path, default=Path("why.png"), help="the picture's file")
    verb.add_argument("--steps", type=whole(1), default=64, help="of integrated gradients")
    add_overwrite(verb)
    add_json(verb)
    return verb.parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Write the heat-map and print the words."""
    options = parse(arguments)
    require_free_file(options.out, DRAWN, overwrite=options.overwrite, inputs=[options.picture])
    name, found, test = _explained(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as unfinished:
        found.picture().save(unfinished, Image.registered_extensions()[options.out.suffix.lower()])
    if options.json:
        about = {"picture": options.out, "score": name, "logit": found.logit, "blank_logit": found.blank_logit}
        words_of = [{"word": word, "weight": weight} for word, weight in found.words]
        print_json({**about, "words": words_of, "deletion_test": test})
        return 0
    table = Table("word", f"{name} {found.logit:.3f}, of a blank picture {found.blank_logit:.3f}")
    weights = told_apart([weight for _, weight in found.words])
    for (word, _), weight in zip(found.words, weights):
        table.add_row(escape(word), weight if weight.startswith("-") else f"+{weight}")
    console = Console()
    console.print(table)
    if test:
        console.print(
            f"Deletion test of this system: with the most relevant image tokens removed first its score falls {test['gap']:.2f} standard "
            f"deviations further than at random, faster for {test['faster']:.0%} of {test['pairs']:.0f} pairs"
        )
    console.print(f"[bold]{escape(str(options.out))}[/]  red speaks for the match, blue against it")
    return 0


def _explained(options: argparse.Namespace) -> tuple[str, Explanation, dict[str, float] | None]:
    """What scored the pair, why, and of a system what its deletion test gave."""
    if options.system is None:
        model = Unimodal.from_pretrained(options.model or shipped_checkpoint())
        why = model.explain(options.picture, options.text, steps=options.steps)
        return why.score, why, None
    spec, system, encoders = load_system(options.system)
    found = explain(system, encoders, options.picture, options.text, steps=options.steps)
    return f"{spec.title}:", found, json.loads((options.system / RESULT).read_text())["deletion"]
