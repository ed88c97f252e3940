"""`unimodal finetune`: a model, own pairs and a folder; no recipe. What it does is `unimodal.finetune`; here it is parsed and printed."""

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from unimodal.cli.messages import short
from unimodal.cli.options import Parser, device, names, number, whole
from unimodal.cli.output import add_json, print_json, say
from unimodal.cli.train import quiet, write_traceback
from unimodal.finetuning import Finetuned, Row, finetune
from unimodal.finetuning.place import TRAINING
from unimodal.finetuning.plan import Train
from unimodal.recipes import CHECKPOINT, shipped_checkpoint
from unimodal.tasks import Interrupted

TITLES = {
    "first": "search by the embedding",
    "reranked": "search, reranked by the matching head",
    "captions": "captions",
}


def parser() -> argparse.ArgumentParser:
    """The parser of the verb."""
    verb = Parser(
        prog="unimodal finetune",
        description="Train a model on your own pairs, keep the best step, and say what changed. The same command goes on where it stopped.",
    )
    verb.add_argument("--model", help=f"a checkpoint or published model: folder or Hub id; by default {CHECKPOINT}")
    verb.add_argument(
        "--data", required=True, help="a table, a JSON file in Karpathy's format, tar shards or a folder; or `scenes`"
    )
    verb.add_argument("--images", type=Path, help="folder of the pictures; by default as the data has it")
    verb.add_argument("--val", help="validation data, likewise; by default the data's own, or a tenth of the images")
    verb.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint and its table")
    verb.add_argument(
        "--train",
        choices=get_args(Train),
        default="heads",
        help="what stands behind the towers; lora: also low-rank matrices in the towers; all: everything",
    )
    verb.add_argument("--jobs", type=names, help="of embedding,matching,captioning; by default all the model has")
    verb.add_argument("--seed", type=whole(0), default=0, help="of the split and of the training")
    verb.add_argument(
        "--epochs", type=whole(1), help="passes over the images at most; by default 40 for heads, else 10"
    )
    verb.add_argument("--batch_size", type=whole(2), help="images of a step")
    verb.add_argument("--learning_rate", type=number(1e-9, 1), help="peak rate; by default one that fits --train")
    verb.add_argument("--device", type=device, help="where to train; by default a GPU where there is one")
    add_json(verb)
    return verb


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the verb."""
    return parser().parse_args(arguments[1:])


def run(arguments: Sequence[str]) -> int:
    """Train and print; a warning is a plain line on standard error."""
    options = parse(arguments)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        quiet()
        warnings.showwarning = lambda message, *_, **__: say(str(message))
        try:
            done = _finetune(options)
        except Interrupted as stop:
            say(f"unimodal finetune: {stop}; the same command goes on from there")
            return int(stop.code or 0)
        except (ImportError, OSError, TypeError, ValueError):
            raise  # a sentence already
        except Exception as error:  # of whatever is in the training
            told = short(str(error)) or type(error).__name__
            say(f"unimodal finetune: {told}\n  the traceback is in {write_traceback(options.out / TRAINING)}")
            return 1
    if options.json:
        print_json({**done.report, "out": done.folder})
    else:
        _print(done)
    return 0


def _finetune(options: argparse.Namespace) -> Finetuned:
    return finetune(
        options.model or shipped_checkpoint(),
        options.data,
        options.out,
        images=options.images,
        val=options.val,
        train=options.train,
        jobs=options.jobs,
        seed=options.seed,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        device=options.device,
    )


def _print(done: Finetuned) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for stage, protocol in done.report["protocol"].items():
        rows = [row for row in done.rows if row.stage == stage]
        console.print(_table(f"{TITLES[stage]}\n{protocol}", rows))
    report = done.report
    trained, parameters = sum(report["trained"].values()), report["parameters"]
    chosen = (
        f"step {report['best_step']} of {report['steps']}" if report["best_step"] else "no step; the model is as it was"
    )
    console.print(
        f"best on validation: {chosen}. {trained:,} of {parameters:,} parameters trained, {report['seconds']:.0f} s."
    )
    if report["chose_the_best_step"]:
        console.print("These images also chose the best step; a `test` split in the data would be measured alone.")
    console.print(f"checkpoint and table: {done.folder}")


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "before", "after", "difference", "95 % interval", "p"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(
            row.measure,
            f"{row.before:.1f} ({row.before_interval[0]:.1f} to {row.before_interval[1]:.1f})",
            f"{row.after:.1f} ({row.after_interval[0]:.1f} to {row.after_interval[1]:.1f})",
            f"{row.difference:+.1f}",
            f"{row.interval[0]:+.1f} to {row.interval[1]:+.1f}",
            f"{row.p_value:.4f}",
        )
    return table
