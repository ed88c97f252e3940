"""`unimodal data check PATH`: what is wrong with a data set, and what to do about it, before a model trains on it."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import AutoTokenizer

from unimodal.cli.options import whole
from unimodal.cli.output import add_json, print_json
from unimodal.data.findings import Finding, audit
from unimodal.data.guess import open_splits
from unimodal.data.pairs import Pairs, is_gallery
from unimodal.data.processor import scenes_tokenizer


def add_parser(verbs: Any) -> None:
    """Add `data check` to the verbs of the command line."""
    data = verbs.add_parser("data", help="check a data set before training").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    check = data.add_parser("check", help="find broken files, duplicates and captions that would be cut")
    check.add_argument(
        "path", help="Karpathy's or COCO's .json, .jsonl, .csv, .tsv, tar shards ('train-*.tar') or a folder"
    )
    check.add_argument("--root", type=Path, help="the folder of the pictures, for a table or Karpathy's JSON")
    check.add_argument("--split", nargs="+", help="the splits to check; by default all")
    check.add_argument("--image", help="the column of the picture, where its name is unusual")
    check.add_argument("--captions", nargs="+", help="the columns of the captions, where their names are unusual")
    check.add_argument("--tokenizer", help="a folder or Hub id, or 'scenes': also find captions that it would cut")
    check.add_argument(
        "--max_length", type=whole(1), help="longest caption in tokens; by default the tokenizer's limit"
    )
    check.add_argument("--show", type=whole(0), default=10, help="how many cases of a kind to print")
    add_json(check)


def check_data(options: argparse.Namespace) -> int:
    """Print what was found; returns 1 when there is anything, 0 for a sound data set."""
    if options.max_length is not None and options.tokenizer is None:
        raise ValueError("--max_length counts the tokens of a tokenizer; give --tokenizer too")
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    reader, splits = open_splits(
        options.path, options.root, options.split, image=options.image, captions=options.captions
    )
    findings = audit(
        splits, tokenizer=tokenizer, max_length=options.max_length, show_progress_bar=Console(stderr=True).is_terminal
    )
    if options.json:
        about = {"path": options.path, "reader": reader, "captions_measured": tokenizer is not None}
        sizes = {split: dict(zip(("images", "captions"), _count(pairs))) for split, pairs in splits.items()}
        print_json({**about, "splits": sizes, "findings": [asdict(finding) for finding in findings]})
    else:
        _report(options, reader, splits, findings)
    return 1 if findings else 0


def _tokenizer(name: str) -> Any:
    if name == "scenes":
        return scenes_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--tokenizer {name}: no tokenizer can be read there: {error}") from error


def _report(options: argparse.Namespace, reader: str, splits: dict[str, Pairs], findings: list[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{escape(options.path)}: read by unimodal.data.{reader}")
    for split, pairs in splits.items():
        console.print(f"  {escape(split)}: {_size(pairs)}")
    if options.tokenizer is None:
        console.print("  length of captions: not checked; give --tokenizer and --max_length")
    for finding in findings:
        _print(console, finding, options.show)
    kinds = f"{len(findings)} kinds of fault found" if len(findings) != 1 else "1 kind of fault found"
    console.print(f"\n{kinds}." if findings else "\nNothing wrong found.")


def _count(pairs: Pairs) -> tuple[int, int]:
    """How many images and captions there are."""
    captions = [pairs.captions(i) for i in range(len(pairs))]
    return len(pairs), sum(len(texts) for texts in captions if isinstance(texts, list))


def _size(pairs: Pairs) -> str:
    if is_gallery(pairs):
        return f"{len(pairs)} images without captions, a gallery: enough to search and to caption, not to train"
    images, captions = _count(pairs)
    return f"{images} images, {captions} captions"


def _print(console: Console, finding: Finding, show: int) -> None:
    console.print(f"\n[bold]{escape(finding.told)}[/bold]")
    for case in finding.cases[:show]:
        console.print(f"  {escape(case)}")
    if finding.count > show:
        console.print(f"  ... and {finding.count - show} more; --show {finding.count} prints all")
    console.print(f"  What to do: {escape(finding.advice)}")
