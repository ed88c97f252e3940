"""The verbs that use a model or look at data, `unimodal embed|search|rank|caption|generate|mine|export|push|data`, and their one parser.

Results go to standard output, messages to standard error. What a user can get wrong is one line and status 1; a file
that cannot be read is named and left out, and the others are done.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unimodal.cli import exporting, searching
from unimodal.cli import mine as mining
from unimodal.cli.data import add_parser, check_data
from unimodal.data.images import load_image
from unimodal.data.items import SUFFIXES
from unimodal.hub import push_to_hub
from unimodal.inference import Unimodal
from unimodal.search import Index

DEFAULT_MODEL = "checkpoints/demo/model"


def parser() -> argparse.ArgumentParser:
    """The parser of every verb that does not train."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help=f"a checkpoint folder or Hub id; by default {DEFAULT_MODEL}")
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

    verb = verbs.add_parser("search", parents=[model, prompt], help="search a folder of images by text, or by an image")
    verb.add_argument("folder", type=Path, help="where the pictures are; folders in it are searched too")
    verb.add_argument("query", help="a text, or the path of a picture")
    verb.add_argument("--top_k", type=int, default=5, help="how many to show")
    verb.add_argument("--rerank_top_k", type=int, default=50, help="how many the matching head judges; 0 for none")
    verb.add_argument("--index", type=Path, help="a folder that keeps what was read, for the next search")

    searching.add_parsers(verbs, model)

    verb = verbs.add_parser(
        "rank", parents=[model, prompt], help="rank images against a text, or texts against an image"
    )
    verb.add_argument("query", help="a text, or the path of a picture")
    verb.add_argument("documents", nargs="+", metavar="DOCUMENT", help="what to rank; a folder stands for its pictures")
    verb.add_argument("--top_k", type=int, help="how many to show")

    verb = verbs.add_parser("caption", parents=[model, prompt], help="caption images")
    verb.add_argument("paths", nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    verb.add_argument("--num_beams", type=int, help="hypotheses kept; 1 is greedy, by default 3")
    verb.add_argument(
        "--candidates", type=int, default=1, help="captions written, of which the model's own match score chooses one"
    )
    verb.add_argument("--max_new_tokens", type=int, help="longest caption, by default 30")

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
    verb.add_argument("folder", type=Path, help=f"a checkpoint, for example {DEFAULT_MODEL}")
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
            _say(f"unimodal {options.verb}: {error}")
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
        return searching.calibrate(_load(options), options, Path(options.model or DEFAULT_MODEL))
    pictures = _pictures(options.folder)
    index = _index(_load(options), pictures, options.index)
    depths = {"top_k": options.top_k, "rerank_top_k": options.rerank_top_k}
    hits = index.search(options.query, **depths, prompt=options.prompt)
    rows = [
        (hit["rank"], Path(hit["document"]).relative_to(options.folder), hit["first_score"], hit["rerank_score"])
        for hit in hits
    ]
    _table(f"{options.query!r} in {options.folder}", ("", "picture", "cosine", "match"), rows)


@_verb
def rank(options: argparse.Namespace) -> None:
    documents = _readable(_expand(options.documents))
    hits = _load(options).rank(options.query, documents, top_k=options.top_k, prompt=options.prompt)
    rows = [(place, documents[hit["corpus_id"]], hit["score"]) for place, hit in enumerate(hits, start=1)]
    _table(repr(options.query), ("", "document", "match"), rows)


@_verb
def caption(options: argparse.Namespace) -> None:
    paths = _readable([Path(path) for path in _expand(options.paths)])
    model = _load(options)
    # Candidates are drawn, always the same ones; a vision-language model draws nothing here.
    drawn: dict[str, Any] = {} if model.encoder.writes else {"generator": torch.Generator(model.device).manual_seed(0)}
    captions = model.caption(
        paths,
        prompt=options.prompt,
        num_beams=options.num_beams,
        candidates=options.candidates,
        max_new_tokens=options.max_new_tokens,
        **drawn,
    )
    for path, text in zip(paths, captions):
        print(f"{path}: {text}")


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
        raise FileNotFoundError(f"{options.folder}: no such folder; give a checkpoint, for example {DEFAULT_MODEL}")
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
    if options.model is None and not Path(DEFAULT_MODEL).is_dir():
        raise FileNotFoundError(f"no model in {DEFAULT_MODEL}; run `make demo` first, or give --model")
    return options.model or DEFAULT_MODEL


def _load(options: argparse.Namespace) -> Unimodal:
    return Unimodal.from_pretrained(_checkpoint(options), device=options.device, heads=options.heads)


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and the folders in it, by suffix, in order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no pictures; expected files that end in {', '.join(SUFFIXES)}")
    return found


def _expand(inputs: Iterable[str]) -> list[str | Path]:
    """Inputs with every folder replaced by its pictures."""
    return [item for text in inputs for item in (_pictures(Path(text)) if os.path.isdir(text) else [text])]


def _readable(items: list[str | Path]) -> list[str | Path]:
    """The items without the pictures that cannot be read, which are listed."""
    pictures = [item for item in items if isinstance(item, Path) or item.lower().endswith(SUFFIXES)]
    bad = _list_problems(pictures, len(pictures))
    if len(bad) == len(items):
        raise ValueError(f"none of the {len(items)} inputs can be read")
    return [item for item in items if item not in bad]


def _list_problems(pictures: Sequence[str | Path], total: int) -> list[str | Path]:
    """The pictures that cannot be read: each with its reason on standard error, then their number."""
    bad = []
    for picture in pictures:
        try:
            load_image(picture)
        except (OSError, ValueError) as error:
            _say(f"skipped: {error}")
            bad.append(picture)
    if bad:
        _say(f"{len(bad)} of {total} pictures skipped")
    return bad


def _index(model: Unimodal, pictures: list[Path], folder: Path | None) -> Index:
    """What the model reads from the pictures; read from `folder` where it is already there, and kept there."""
    # A file that was written again is another document: its id says when.
    files = {f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}": path for path in pictures}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be read and are not in the index.*")
        if folder is None or not (folder / "index.json").exists():
            index = model.build_index(pictures, list(files), on_error="skip", folder=folder)
        else:
            index = _kept(model, files, folder)
    _list_problems([files[str(name)] for name in index.skipped], len(pictures))
    if not len(index):
        raise ValueError(f"none of the {len(pictures)} pictures can be read")
    return index


def _kept(model: Unimodal, files: dict[str, Path], folder: Path) -> Index:
    """The index in a folder, brought up to date with the pictures."""
    try:  # as it was, or interrupted while these pictures were read
        return model.build_index(list(files.values()), list(files), on_error="skip", folder=folder)
    except ValueError:
        pass
    try:
        index = model.load_index(folder)
    except ValueError as error:
        _say(f"{error}; reading the pictures again")
        index = model.build_index(list(files.values()), list(files), on_error="skip")
        index.save(folder)
        return index
    kept = {*index.ids, *index.skipped}
    new, gone = [name for name in files if name not in kept], [name for name in kept if name not in files]
    _say(f"{folder}: {len(new)} pictures are new or changed, {len(gone)} are gone or changed")
    index.delete(gone)
    index.add([files[name] for name in new], new, on_error="skip")
    return index


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(title=escape(title), title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("picture", "document") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else escape(str(cell or "-")) for cell in row))
    Console().print(table)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
