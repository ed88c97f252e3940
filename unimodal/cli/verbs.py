"""The verbs that use a model or look at data, `unimodal embed|search|rank|caption|app|generate|...`, and their one parser.

Results go to standard output, messages to standard error. What a user can get wrong is one line and status 1; a file
that cannot be read is named and left out, and the others are done.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unimodal.cli import exporting, photos, searching
from unimodal.cli import mine as mining
from unimodal.cli.data import add_parser, check_data
from unimodal.cli.photos import say, say_skipped
from unimodal.data.images import load_image
from unimodal.data.items import SUFFIXES, as_item, pictures_in
from unimodal.hub import push_to_hub
from unimodal.inference import Unimodal
from unimodal.recipes import CHECKPOINT, shipped_checkpoint
from unimodal.report.pieces import chance


def parser() -> argparse.ArgumentParser:
    """The parser of every verb that does not train."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help=f"a checkpoint folder or Hub id; by default {CHECKPOINT}")
    model.add_argument("--device", help="where to run, for example cuda; by default the CPU")
    model.add_argument(
        "--heads", type=lambda names: names.split(","), help="load only these, for example embedding,matching"
    )
    prompt = argparse.ArgumentParser(add_help=False)
    prompt.add_argument("--prompt", help="an instruction, or of captions a question, for models that take one")
    whole = argparse.ArgumentParser(prog="unimodal")
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("embed", parents=[model, prompt], help="embed images or texts into a .npy file")
    verb.add_argument("inputs", nargs="+", metavar="PATH_OR_TEXT", help="pictures, folders of pictures, or texts")
    verb.add_argument("--out", type=Path, required=True, help="the .npy file; a .json beside it names the rows")
    verb.add_argument("--precision", default="float32", help="float32, int8, uint8, binary or ubinary")
    verb.add_argument("--truncate_dim", type=int, help="keep the first dimensions")

    photos.add_parsers(verbs, model, prompt)
    searching.add_parsers(verbs, model)

    verb = verbs.add_parser(
        "rank", parents=[model, prompt], help="rank images against a text, or texts against an image"
    )
    verb.add_argument("query", help="a text, or the path of a picture")
    verb.add_argument("documents", nargs="+", metavar="DOCUMENT", help="what to rank; a folder stands for its pictures")
    verb.add_argument("--top_k", type=int, help="how many to show")

    verb = verbs.add_parser("generate", parents=[model], help="draw a picture from a text")
    verb.add_argument("text")
    verb.add_argument("--out", type=Path, default=Path("picture.png"), help="the picture's file")
    verb.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture")
    verb.add_argument("--num_inference_steps", type=int, default=20, help="steps from noise to picture")
    verb.add_argument(
        "--guidance_scale", type=float, default=2.0, help="1 follows the text as learned, more overdoes it"
    )

    verb = verbs.add_parser("mine", parents=[model], help="mine hard negatives of a split into a .jsonl file")
    mining.add_arguments(verb)

    exporting.add_parser(verbs)

    verb = verbs.add_parser("push", help="push a checkpoint folder to the Hub")
    verb.add_argument("folder", type=Path, help="a checkpoint, for example checkpoints/demo/model")
    verb.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; made if it does not exist")
    verb.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    verb.add_argument("--revision", help="the branch to commit to")
    verb.add_argument("--create_pr", action="store_true", help="open a pull request")

    add_parser(verbs)

    return whole


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a verb; `search` may be of two words."""
    words = list(arguments)
    if words[:1] == ["search"] and words[1:2] in (["tune"], ["calibrate"]):  # a folder of this name is given as ./tune
        words[:2] = [" ".join(words[:2])]
    return parser().parse_args(words)


def _verb(work: Callable[[argparse.Namespace], int | None]) -> Callable[[Sequence[str]], int]:
    """The verb on its argument list; bad input becomes one line on standard error and status 1."""

    def run(arguments: Sequence[str]) -> int:
        options = parse(arguments)
        try:
            return work(options) or 0
        except (OSError, ValueError, TypeError, ImportError) as error:
            say(f"unimodal {options.verb}: {error}")
            return 1

    return run


@_verb
def embed(options: argparse.Namespace) -> None:
    inputs = _readable(_expand(options.inputs))
    model = _load(options)
    vectors = model.encode(
        inputs, prompt=options.prompt, precision=options.precision, truncate_dim=options.truncate_dim
    )
    with open(options.out, "wb") as file:
        np.save(file, vectors)
    names = options.out.with_suffix(".json")
    names.write_text(json.dumps([str(item) for item in inputs], ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {list(vectors.shape)} {vectors.dtype}; its rows are named in {names}")


@_verb
def search(options: argparse.Namespace) -> None:
    if options.verb == "search tune":
        return searching.tune(_load(options), options)
    if options.verb == "search calibrate":
        return searching.calibrate(_load(options), options, Path(_checkpoint(options)))
    photos.require_folder(options.folder, options.query)
    as_item(options.query)  # what is wrong with it, too, is said before a model is loaded
    options.model = _checkpoint(options)
    hits, order, page = photos.search(_load(options), options)
    rows = [(hit["rank"], hit["id"], hit["first_score"], chance(hit["rerank_score"])) for hit in hits]
    _table(f"{options.query!r} in {options.folder}", ("", "picture", "cosine", "match"), rows)
    print(order)
    print(page)


@_verb
def rank(options: argparse.Namespace) -> None:
    documents = _readable(_expand(options.documents))
    hits = _load(options).rank(options.query, documents, top_k=options.top_k, prompt=options.prompt)
    rows = [(place, documents[hit["corpus_id"]], hit["score"]) for place, hit in enumerate(hits, start=1)]
    _table(repr(options.query), ("", "document", "match"), rows)


@_verb
def caption(options: argparse.Namespace) -> None:
    paths = [Path(path) for path in _expand(options.paths)]
    captions = photos.caption(_load(options), options, paths)
    if sys.stdout.isatty():
        _table("", ("picture", "caption"), captions.items())
    else:
        for path, text in captions.items():
            print(f"{path}: {text}")


@_verb
def app(options: argparse.Namespace) -> None:
    if options.folder is not None:
        pictures_in(options.folder)
    photos.app(_load(options), options)


@_verb
def generate(options: argparse.Namespace) -> None:
    model = _load(options)
    drawn = model.generate_image(
        options.text,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator(model.device).manual_seed(options.seed),
    )
    drawn.images[0].save(options.out)
    print(options.out)


@_verb
def mine(options: argparse.Namespace) -> None:
    mining.mine(options, _load(options).encoder)


@_verb
def export(options: argparse.Namespace) -> None:
    exporting.export(options, _checkpoint(options))


@_verb
def push(options: argparse.Namespace) -> None:
    if not options.folder.is_dir():
        raise FileNotFoundError(
            f"{options.folder}: no such folder; give a checkpoint, for example checkpoints/demo/model"
        )
    commit = push_to_hub(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
    )
    print(commit.pr_url or commit.commit_url)


@_verb
def data(options: argparse.Namespace) -> int:
    return check_data(options)


def _checkpoint(options: argparse.Namespace) -> str:
    return options.model or str(shipped_checkpoint())


def _load(options: argparse.Namespace) -> Unimodal:
    return Unimodal.from_pretrained(_checkpoint(options), device=options.device, heads=options.heads)


def _expand(inputs: Iterable[str]) -> list[str | Path]:
    """Inputs with every folder replaced by its pictures."""
    return [item for text in inputs for item in (pictures_in(Path(text)) if os.path.isdir(text) else [text])]


def _readable(items: list[str | Path]) -> list[str | Path]:
    """The items without the pictures that cannot be read, which are listed."""
    bad: dict[str, str] = {}
    pictures = [item for item in items if isinstance(item, Path) or item.lower().endswith(SUFFIXES)]
    for picture in pictures:
        try:
            load_image(picture)
        except (OSError, ValueError) as error:
            bad[str(picture)] = str(error)
    say_skipped(bad, len(pictures))
    if len(bad) == len(items):
        raise ValueError(f"none of the {len(items)} inputs can be read")
    return [item for item in items if str(item) not in bad]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(title=escape(title), title_justify="left")
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("picture", "document", "caption") else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else escape(str(cell or "-")) for cell in row))
    Console().print(table)
