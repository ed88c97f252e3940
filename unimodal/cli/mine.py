"""`unimodal mine`: hard negatives of a split, found by a checkpoint's embedding and filtered by its matching head, in a file."""

import argparse
from collections.abc import Callable
from pathlib import Path

from unimodal.cli.options import number, whole
from unimodal.cli.output import add_json, add_overwrite, print_json, require_free_file
from unimodal.data.guess import open_split
from unimodal.data.negatives import write_negatives
from unimodal.search import Encoder, mine_negatives


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """What may be asked of mining, beside the model."""
    verb.add_argument(
        "--data", required=True, help="pairs: Karpathy's or COCO's JSON, a table, tar shards, a folder; or `scenes`"
    )
    verb.add_argument("--images", type=Path, help="folder of the pictures; by default images/ beside the file")
    verb.add_argument("--split", default="train", help="the split to mine")
    verb.add_argument("--out", type=Path, required=True, help="the .jsonl file, for data.negatives of a recipe")
    verb.add_argument("--num_negatives", type=whole(1), default=7, help="hard negatives per query")
    verb.add_argument("--top_k", type=whole(1), default=50, help="nearest wrong candidates that are judged")
    verb.add_argument(
        "--positive_threshold", type=number(), default=0.0, help="keep a query if a positive scores above this"
    )
    verb.add_argument(
        "--margin", type=number(), default=0.0, help="keep a negative below the mean of the positives plus this"
    )
    verb.add_argument(
        "--judge", choices=("match", "cosine"), default="match", help="match is the logit of the matching head"
    )
    add_overwrite(verb)
    add_json(verb)


def mine(options: argparse.Namespace, load: Callable[[], Encoder]) -> None:
    """Mine and write; the encoder is loaded once the output is known to be free."""
    require_free_file(options.out, (".jsonl",), overwrite=options.overwrite, inputs=[options.data])
    pairs = open_split(options.data, options.split, options.images)
    header, rows = mine_negatives(
        load(),
        pairs,
        num_negatives=options.num_negatives,
        top_k=options.top_k,
        positive_threshold=options.positive_threshold,
        margin=options.margin,
        judge=options.judge,
    )
    write_negatives(options.out, header, rows)
    if options.json:
        return print_json({"negatives": options.out, **header})
    kept = header["kept"]
    print(f"{options.out}: negatives for {kept['images']} images and {kept['captions']} captions")
