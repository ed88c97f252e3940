"""`unimodal survey` trains and scores every system of the survey alike, and writes the page of its tables."""

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from rich.console import Console

from unimodal.cli.options import Parser, number, whole, words
from unimodal.cli.output import require_free_folder, say
from unimodal.data.guess import open_split
from unimodal.data.noise import Noise
from unimodal.data.pairs import Pairs
from unimodal.recipes import CHECKPOINT, shipped_checkpoint
from unimodal.survey.data import First, Shots, SurveyData
from unimodal.survey.encoders import SharedEncoders
from unimodal.survey.page import PAGE, accuracy, printed, read_results, taxonomy, write_page
from unimodal.survey.run import CONFIG, Run, configs, run_system
from unimodal.survey.specs import systems_folder
from unimodal.survey.train import Budget

# On the page alone: a terminal is narrow.
NOT_PRINTED = ("Interaction", "Deletion test", "T→I mR", "I→T mR", "mR of six")


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    verb = Parser(prog="unimodal survey", description=__doc__)
    verb.add_argument("verb", choices=["survey"], help=argparse.SUPPRESS)
    verb.add_argument(
        "--data",
        required=True,
        help="a JSON file in Karpathy's or COCO's format, a table, tar shards or a folder; or `scenes`",
    )
    verb.add_argument("--images", type=Path, help="folder of the pictures; by default `images` beside the file")
    verb.add_argument(
        "--ranked", metavar="DATA", help="other data, whose --split is ranked: zero-shot; by default that of --data"
    )
    verb.add_argument("--ranked_images", type=Path, help="folder of its pictures")
    verb.add_argument("--train_split", default="train", help="the split that systems learn from")
    verb.add_argument("--split", default="val", help="the split that is ranked")
    verb.add_argument("--train_images", type=whole(1), help="learn from the first so many images; by default all")
    verb.add_argument("--budget", default="200 steps", help="of each system: '200 steps' or '2.5 minutes'")
    verb.add_argument("--systems", nargs="+", metavar="NAME", help="by default all; a path is a YAML file of your own")
    verb.add_argument(
        "--encoders", type=words, help=f"checkpoint whose frozen backbone all share; by default {CHECKPOINT}"
    )
    verb.add_argument(
        "--grid", type=whole(1), help="average image tokens to so many a side: faster; by default the encoder's own"
    )
    verb.add_argument("--out", type=Path, default=Path("checkpoints/survey"), help="folder of the results")
    verb.add_argument("--cache", type=Path, help="folder of the encoders' features; by default OUT/features")
    verb.add_argument("--noise", type=number(), default=0.0, help="share of the training captions that is corrupted")
    verb.add_argument("--noise_kind", choices=("random", "category", "swap"), default="random", help="how")
    verb.add_argument("--shots", type=whole(1), help="learn from so few examples")
    verb.add_argument(
        "--shots_of",
        choices=("class", "pair"),
        default="class",
        help="images of each category, or captions of each image",
    )
    verb.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of training")
    verb.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of first weights and draws")
    return verb


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the verb."""
    return parser().parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Run the survey."""
    options = parse(arguments)
    with quiet_trainer():
        survey(options)
    return 0


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Lightning's own lines would say the same for each stage of each system."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning\.")
            yield
    finally:
        logger.setLevel(level)


def survey(options: argparse.Namespace) -> None:
    """Train, score, write."""
    inputs = (options.data, options.images, options.ranked, options.ranked_images, options.encoders)
    require_free_folder(options.out, (PAGE,), inputs=inputs, is_ours=lambda out: any(out.rglob(CONFIG)))
    chosen = configs(systems_folder(), options.systems)
    budget = Budget.read(options.budget)
    noise = Noise(options.noise, options.noise_kind, options.seed) if options.noise else None
    shots = None if options.shots is None else Shots(options.shots, options.shots_of)
    setting = " ".join(
        part
        for part in (
            f"noise {options.noise:g} {options.noise_kind}" if noise else "",
            f"shots {options.shots} of a {options.shots_of}" if shots else "",
        )
        if part
    )
    train = open_split(options.data, options.train_split, options.images)
    if options.ranked is None:
        val = open_split(options.data, options.split, options.images)
    else:
        val = open_split(options.ranked, options.split, options.ranked_images)
    if options.train_images is not None:
        train = cast(Pairs, First(train, options.train_images))
    encoders = SharedEncoders(options.encoders or shipped_checkpoint(), options.grid)
    cache = options.cache or options.out / "features"
    data = SurveyData(train, val, encoders, cache, noise=noise, shots=shots, seed=options.seed)
    run = Run(
        data,
        budget,
        options.out / setting.replace(" ", "-"),
        seed=options.seed,
        setting=setting,
        precision=options.precision,
        zero_shot=options.ranked is not None,
    )
    facts = {
        "Learned from": f"{train.name} {train.split}, {len(train):,} images",
        "Ranked": f"{val.name} {val.split}, {len(val):,} images",
        "Encoders": f"{options.encoders or CHECKPOINT}, {sum(encoders.sizes.values()) / 1e6:.1f} M parameters, frozen",
        "Image tokens": str(encoders.image_tokens),
        "Seed": str(options.seed),
    }
    failed = {}
    for place, (name, config) in enumerate(chosen.items(), 1):
        say(f"{place} of {len(chosen)}: {name}")
        try:
            run_system(name, config, run, say)
        except (RuntimeError, ValueError) as error:  # one system's fault is not the others'
            failed[name] = error
            say(f"{name} failed: {error}")
        page = write_page(options.out, facts)
    console, measured = Console(), list(read_results(options.out).get(setting, {}).values())
    console.print(*(printed(grid, NOT_PRINTED) for grid in (taxonomy(measured), accuracy(measured))))
    console.print(f"[bold]{page}[/]")
    if failed:
        raise ValueError(f"{len(failed)} of {len(chosen)} systems failed: {', '.join(failed)}; see above")
