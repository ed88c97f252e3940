"""The verbs that use a model or look at data, `unimodal embed|search|rank|caption|app|generate|...`, and their one parser.

Results go to standard output, as a table or with `--json` as one JSON document, messages to standard error. A file that cannot be read is
named and left out, and the others are done.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unimodal.cli import exporting, photos, searching
from unimodal.cli import mine as mining
from unimodal.cli.data import add_parser, check_data
from unimodal.cli.options import Parser, add_model, names, number, whole
from unimodal.cli.output import add_json, add_overwrite, print_json, require_free_file, say
from unimodal.cli.photos import say_skipped
from unimodal.data.endings import address_of, is_data, names_picture, shown
from unimodal.data.folders import pictures_in
from unimodal.data.images import load_image
from unimodal.data.items import as_item
from unimodal.files import replacing, write_json
from unimodal.hub import push_to_hub
from unimodal.inference import Unimodal
from unimodal.recipes import shipped_checkpoint
from unimodal.report.pieces import chances, told_apart
from unimodal.search import Precision

DRAWN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # endings of a picture that is written


def parser() -> argparse.ArgumentParser:
    """The parser of every verb that does not train."""
    model = Parser(add_help=False)
    add_model(model)
    model.add_argument("--heads", type=names, help="load only these, for example embedding,matching")
    prompt = Parser(add_help=False)
    prompt.add_argument("--prompt", help="an instruction, or of captions a question, for models that take one")
    whole_parser = Parser(prog="unimodal")
    verbs = whole_parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("embed", parents=[model, prompt], help="embed images or texts into a .npy file")
    verb.add_argument("inputs", nargs="+", metavar="PATH_OR_TEXT", help="pictures, folders of pictures, or texts")
    verb.add_argument("--out", type=Path, required=True, help="the .npy file; a .json beside it names the rows")
    verb.add_argument(
        "--precision", choices=get_args(Precision), default="float32", help="of the vectors; all but float32 are codes"
    )
    verb.add_argument("--truncate_dim", type=whole(1), help="keep the first dimensions")
    add_overwrite(verb)
    add_json(verb)

    photos.add_parsers(verbs, model, prompt)
    searching.add_parsers(verbs, model)

    verb = verbs.add_parser(
        "rank", parents=[model, prompt], help="rank images against a text, or texts against an image"
    )
    verb.add_argument("query", help="a text, or the path of a picture")
    verb.add_argument("documents", nargs="+", metavar="DOCUMENT", help="what to rank; a folder stands for its pictures")
    verb.add_argument("--top_k", type=whole(1), help="how many to show")
    add_json(verb)

    verb = verbs.add_parser("generate", parents=[model], help="draw a picture from a text")
    verb.add_argument("text")
    verb.add_argument("--out", type=Path, default=Path("picture.png"), help="the picture's file")
    verb.add_argument("--seed", type=whole(0), default=0, help="the same seed gives the same picture")
    verb.add_argument("--num_inference_steps", type=whole(1, 1000), default=20, help="steps from noise to picture")
    verb.add_argument(
        "--guidance_scale", type=number(), default=2.0, help="1 follows the text as learned, more overdoes it"
    )
    verb.add_argument(
        "--candidates",
        type=whole(1, 1000),
        default=1,
        help="pictures drawn, of which the model's other heads choose one",
    )
    add_overwrite(verb)
    add_json(verb)

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

    return whole_parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a verb; `search` may be of two words."""
    given = list(arguments)
    if given[:1] == ["search"] and given[1:2] in (["tune"], ["calibrate"]):  # a folder of this name is given as ./tune
        given[:2] = [" ".join(given[:2])]
    return parser().parse_args(given)


def _verb(work: Callable[[argparse.Namespace], int | None]) -> Callable[[Sequence[str]], int]:
    """The verb on its argument list. A warning is a line on standard error, without the place in the code that it came from."""

    def run(arguments: Sequence[str]) -> int:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(str(message))
            return work(parse(arguments)) or 0

    return run


@_verb
def embed(options: argparse.Namespace) -> None:
    rows = options.out.with_suffix(".json")
    inputs = _expand(options.inputs)
    for path, suffix in ((options.out, ".npy"), (rows, ".json")):
        require_free_file(path, (suffix,), overwrite=options.overwrite, inputs=inputs)
    inputs, skipped = _readable(inputs)
    model = _load(options)
    vectors = model.encode(
        inputs, prompt=options.prompt, precision=options.precision, truncate_dim=options.truncate_dim
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as unfinished, open(unfinished, "wb") as file:
        np.save(file, vectors)
        write_json(rows, [str(item) for item in inputs])
    about = {"shape": list(vectors.shape), "dtype": str(vectors.dtype)}
    if options.json:
        return print_json({"vectors": options.out, "rows": rows, **about, "skipped": skipped})
    print(f"{options.out}: {about['shape']} {about['dtype']}; its rows are named in {rows}")


@_verb
def search(options: argparse.Namespace) -> None:
    if options.verb == "search tune":
        return searching.tune(lambda: _load(options), options)
    if options.verb == "search calibrate":
        return searching.calibrate(lambda: _load(options), options, Path(_checkpoint(options)))
    photos.require_folder(options.folder, options.query)
    as_item(options.query)  # what is wrong with it, too, is said before a model is loaded
    page = photos.page_path(options)
    options.model = _checkpoint(options)
    results = photos.search(_load(options), options, page)
    if options.json:
        return print_json(results)
    hits = results["hits"]
    cosines, matches = told_apart([hit["first_score"] for hit in hits]), chances([hit["rerank_score"] for hit in hits])
    rows = [(hit["rank"], hit["id"], cosine, match) for hit, cosine, match in zip(hits, cosines, matches)]
    _table(f"{shown(options.query)} in {options.folder}", ("", "picture", "cosine", "match"), rows)
    print(results["order"])
    print(page)


@_verb
def rank(options: argparse.Namespace) -> None:
    documents, skipped = _readable(_expand(options.documents))
    best = _load(options).rank(options.query, documents, top_k=options.top_k, prompt=options.prompt)
    hits = [
        {"rank": place, "document": str(documents[hit["corpus_id"]]), "score": hit["score"]}
        for place, hit in enumerate(best, start=1)
    ]
    if options.json:
        return print_json({"query": options.query, "hits": hits, "skipped": skipped})
    scores = told_apart([hit["score"] for hit in hits], ends=(0, 1))
    rows = [(hit["rank"], _in_table(hit["document"]), score) for hit, score in zip(hits, scores)]
    _table(shown(options.query), ("", "document", "match"), rows)


@_verb
def caption(options: argparse.Namespace) -> None:
    paths = [Path(address_of(str(path))) for path in _expand(options.paths)]
    if options.out is not None:
        require_free_file(options.out, photos.CAPTION_FILES, overwrite=options.overwrite, inputs=paths)
    captions, skipped = photos.caption(_load(options), options, paths)
    if options.json:
        rows = [{"image": name, "caption": text} for name, text in captions.items()]
        return print_json({"captions": rows, "skipped": skipped})
    if sys.stdout.isatty():
        return _table("", ("picture", "caption"), captions.items())
    for name, text in captions.items():
        print(f"{name}: {text}")


@_verb
def app(options: argparse.Namespace) -> None:
    if options.folder is not None:
        pictures_in(options.folder)
    photos.app(_load(options), options)


@_verb
def generate(options: argparse.Namespace) -> None:
    require_free_file(options.out, DRAWN, overwrite=options.overwrite)
    model = _load(options)
    drawn = model.generate_image(
        options.text,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        candidates=options.candidates,
        generator=torch.Generator(model.device).manual_seed(options.seed),
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as unfinished:
        drawn.images[0].save(unfinished, Image.registered_extensions()[options.out.suffix.lower()])
    if options.json:
        return print_json({"picture": options.out})
    print(options.out)


@_verb
def mine(options: argparse.Namespace) -> None:
    mining.mine(options, lambda: _load(options).encoder)


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
    """Inputs with every folder replaced by its pictures; what is left out of a folder is said."""
    items: list[str | Path] = []
    for text in inputs:
        if not os.path.isdir(text):
            items.append(text)
            continue
        found = pictures_in(Path(text))
        items += found.pictures
        if found.left_out:
            say(f"{text}: {found.left_out}")
    return items


def _readable(items: list[str | Path]) -> tuple[list[str | Path], dict[str, str]]:
    """The items without the pictures that cannot be read, and these, each with its reason, which are also listed."""
    bad: dict[str, str] = {}
    pictures = [item for item in items if isinstance(item, Path) or names_picture(item)]
    for picture in pictures:
        try:
            load_image(picture)
        except (OSError, ValueError) as error:
            bad[str(picture)] = str(error)
    say_skipped(bad, len(pictures))
    if len(bad) == len(items):
        raise ValueError(f"none of the {len(items)} inputs can be read")
    return [item for item in items if str(item) not in bad], bad


def _in_table(document: str) -> str:
    return shown(document) if is_data(document) else document


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(title=escape(title), title_justify="left")
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("picture", "document", "caption") else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console().print(table)
