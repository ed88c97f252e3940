"""`unimodal mine`: hard negatives of a split, found by a checkpoint's embedding and filtered by its matching head, in a file."""

import argparse
from pathlib import Path

from unimodal.data.guess import open_split
from unimodal.data.negatives import write_negatives
from unimodal.search import Encoder, mine_negatives


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """What may be asked of mining, beside the model."""
    verb.add_argument(
        "--data", required=True, help="pairs: Karpathy's JSON, a table, tar shards, a folder; or `scenes`"
    )
    verb.add_argument("--images", type=Path, help="folder of the pictures; by default images/ beside the file")
    verb.add_argument("--split", default="train", help="the split to mine")
    verb.add_argument("--out", type=Path, required=True, help="the .jsonl file, for data.negatives of a recipe")
    verb.add_argument("--num_negatives", type=int, default=7, help="hard negatives per query")
    verb.add_argument("--top_k", type=int, default=50, help="nearest wrong candidates that are judged")
    verb.add_argument(
        "--positive_threshold", type=float, default=0.0, help="keep a query if a positive scores above this"
    )
    verb.add_argument(
        "--margin", type=float, default=0.0, help="keep a negative below the mean of the positives plus this"
    )
    verb.add_argument("--judge", default="match", help="match (logit of the matching head) or cosine")


def mine(options: argparse.Namespace, encoder: Encoder) -> None:
    """Mine and write."""
    header, rows = mine_negatives(
        encoder,
        open_split(options.data, options.split, options.images),
        num_negatives=options.num_negatives,
        top_k=options.top_k,
        positive_threshold=options.positive_threshold,
        margin=options.margin,
        judge=options.judge,
    )
    write_negatives(options.out, header, rows)
    kept = header["kept"]
    print(f"{options.out}: negatives for {kept['images']} images and {kept['captions']} captions")
