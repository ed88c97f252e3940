"""`unimodal search FOLDER QUERY`, `unimodal caption PATH ...` and `unimodal app FOLDER`: what a model makes of one's own pictures."""

import argparse
import csv
import json
import os
import signal
import sys
import warnings
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unimodal.app import require_gradio, serve
from unimodal.cli.options import RULE, Parser, whole
from unimodal.cli.output import add_json, add_overwrite, require_free_file, say
from unimodal.data.folders import pictures_in, require_unicode
from unimodal.data.images import load_image
from unimodal.data.items import as_item
from unimodal.files import replacing
from unimodal.inference import Unimodal
from unimodal.report import Found, write_search
from unimodal.retrieval import depth, rule_for
from unimodal.search import FolderIndex, Hit, cache_folder, index_folder
from unimodal.search.encoder import batches, progress

STEPS = 16  # of a heat-map, on the path from a blank picture
CAPTIONS = 8  # pictures at a time
REASONS = 10  # for leaving out a picture, that are said
PAGES = 20  # of searches of one folder, that are kept
CAPTION_FILES = (".jsonl", ".csv")


def add_parsers(verbs: Any, model: argparse.ArgumentParser, prompt: argparse.ArgumentParser) -> None:
    """The three verbs."""
    kept = Parser(add_help=False)
    kept.add_argument("--index", type=Path, help="a folder for what was read; by default one in ~/.cache/unimodal")

    verb = verbs.add_parser(
        "search", parents=[model, prompt, kept], help="search a folder of images by text, or by an image"
    )
    verb.add_argument("folder", type=Path, help="where the pictures are; folders in it are searched too")
    verb.add_argument("query", help="a text, or the path of a picture")
    verb.add_argument("--top_k", type=whole(1), default=5, help="how many to show, by default 5")
    verb.add_argument("--rerank_top_k", type=whole(0), help=f"how many the matching head judges, {RULE}; 0 for none")
    verb.add_argument(
        "--out", type=Path, help=f"the page of results, .html; by default a new one in ~/.cache, where {PAGES} are kept"
    )
    verb.add_argument("--open", action="store_true", help="open the page in the browser")
    add_overwrite(verb)
    add_json(verb)

    verb = verbs.add_parser("caption", parents=[model, prompt], help="caption images")
    verb.add_argument("paths", nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    verb.add_argument("--num_beams", type=whole(1), help="hypotheses kept; 1 is greedy, by default 3")
    verb.add_argument(
        "--candidates",
        type=whole(1),
        default=1,
        help="captions written, of which the model's own match score chooses one",
    )
    verb.add_argument("--max_new_tokens", type=whole(1), help="longest caption, by default 30")
    verb.add_argument("--out", type=Path, help="also write them to this file, .jsonl or .csv")
    add_overwrite(verb)
    add_json(verb)

    verb = verbs.add_parser("app", parents=[model, kept], help="search, captions and drawings on a page of your own")
    verb.add_argument("folder", type=Path, nargs="?", help="where the pictures are; without it nothing is searched")
    verb.add_argument("--port", type=whole(1, 65535), help="of 127.0.0.1; by default the first free one from 7860")
    verb.add_argument("--open", action="store_true", help="open the page in the browser")


def page_path(options: argparse.Namespace) -> Path:
    """Where the page of a search goes: to `--out`, or to a file of its own in the user's cache.

    Raises:
        OSError, ValueError: nothing can be written there, or something else is there.
    """
    if options.out is not None:
        require_free_file(options.out, (".html", ".htm"), overwrite=options.overwrite, inputs=[options.query])
        return Path(options.out)
    pages = cache_folder(options.folder) / "pages"
    try:
        pages.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(
            f"{pages}: the page of results cannot be kept there ({error.strerror}); give --out, or set XDG_CACHE_HOME to a "
            "folder that you may write"
        ) from error
    return pages / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{os.urandom(2).hex()}.html"


def search(model: Unimodal, options: argparse.Namespace, page: Path) -> dict[str, Any]:
    """Write the page that shows what was found and says why; returns the hits and what is to be known of them."""
    folder = open_folder(model, options.folder, options.index)
    depths = {"top_k": options.top_k, "rerank_top_k": options.rerank_top_k}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hits: list[Hit] = folder.index.search(options.query, **depths, prompt=options.prompt)
    told = [str(warning.message) for warning in caught]
    for message in told:
        say(message)
    rule = rule_for(model.model.config, k=options.rerank_top_k)
    judged = 0 if hits[0]["rerank_score"] is None else depth(rule, len(folder.index))
    item = as_item(options.query)
    text = None if item.text is None else (options.prompt or "") + item.text
    order = " ".join([*(f"{message[0].upper()}{message[1:]}." for message in told), order_of(model, judged=judged > 0)])
    left_out = [folder.others] if folder.others else []
    write_search(
        page,
        load_image(item.image) if item.text is None else item.text,
        summary=f"The best {len(hits)} of {len(folder.index)} pictures in {options.folder}.",
        facts={
            "Model": Path(options.model).name if os.path.isdir(options.model) else options.model,
            "Judged by the matching head": f"{judged} of {len(folder.index)}",
            "Could not be read": str(len(folder.skipped)),
        },
        order=order,
        found=[_found(model, hit, text) for hit in progress(hits, "Explaining", None)],
        skipped=left_out + list(folder.skipped.values()),
    )
    if options.out is None:
        for old in sorted(page.parent.glob("*.html"))[:-PAGES]:  # their names begin with the time
            old.unlink(missing_ok=True)
    if options.open and not webbrowser.open(page.resolve().as_uri()):
        say("no browser could be started; open the page yourself")
    return {
        "query": options.query,
        "folder": options.folder,
        "pictures": len(folder.index),
        "judged": judged,
        "order": order,
        "hits": [{name: value for name, value in hit.items() if name != "metadata"} for hit in hits],
        "skipped": folder.skipped,
        "page": page,
    }


def order_of(model: Unimodal, *, judged: bool) -> str:
    """By which score results are ordered, and what a match score is worth."""
    scoring = model.model.config.scoring
    if not judged:
        return "Ordered by the cosine of the embeddings."
    rule = (
        f"both scores together: the cosine plus {scoring.scale:g} times the match logit"
        if scoring.combine == "sum"
        else "the match score"
    )
    worth = (
        ""
        if model.encoder.calibration
        else " The match score tells better from worse; uncalibrated, it is no probability."
    )
    return f"Ordered by {rule}.{worth}"


def _found(model: Unimodal, hit: Hit, text: str | None) -> Found:
    path = Path(hit["document"])
    picture = load_image(path)
    found: Found = {"name": str(hit["id"]), "file": path.as_uri(), "picture": picture, "first": hit["first_score"]}
    if hit["rerank_score"] is not None:
        found["match"] = hit["rerank_score"]
    if text is not None and model.encoder.matches:
        why = model.explain(picture, text, steps=STEPS)
        found["heatmap"], found["words"] = why.overlay(), why.words
    return found


def open_folder(model: Unimodal, folder: Path, kept_in: Path | None) -> FolderIndex:
    """The index of a folder; what has changed since the last time, and what is left out, is said on standard error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be read and are not in the index.*")
        found = index_folder(model.encoder, folder, kept_in)
    if found.stale or 0 < found.fresh < len(found.index):
        say(
            f"{folder}: read what is new or has changed ({found.fresh}), forgot what is gone or has changed ({found.stale})"
        )
    elif found.fresh:
        say(f"{folder}: read {len(found.index)} pictures; what was read is kept in {found.index.folder}")
    say_skipped(found.skipped, len(found.index) + len(found.skipped))
    if found.others:
        say(found.others)
    return found


def caption(
    model: Unimodal, options: argparse.Namespace, paths: Sequence[Path]
) -> tuple[dict[str, str], dict[str, str]]:
    """The captions of pictures by name, written to `--out`; and those that cannot be read, which are left out, each with its reason.

    Raises:
        ValueError: none can be read.
    """
    # Candidates are drawn, always the same ones; a vision-language model draws nothing here.
    drawn: dict[str, Any] = {} if model.encoder.writes else {"generator": torch.Generator(model.device).manual_seed(0)}
    captions: dict[str, str] = {}
    skipped: dict[str, str] = {}
    with writing(options.out) as write:
        for rows in progress(batches(len(paths), CAPTIONS), "Captioning", None):
            opened = {}
            for path in paths[rows]:
                try:
                    require_unicode(path)
                    opened[str(path)] = load_image(path)
                except (OSError, ValueError) as error:
                    skipped[str(path)] = str(error)
            texts = model.caption(
                list(opened.values()),
                prompt=options.prompt,
                num_beams=options.num_beams,
                candidates=options.candidates,
                max_new_tokens=options.max_new_tokens,
                show_progress_bar=False,
                **drawn,
            )
            for name, text in zip(opened, texts):
                captions[name] = text
                write(name, text)
        say_skipped(skipped, len(paths))
        if not captions:
            raise ValueError(f"none of the {len(paths)} inputs can be read")
    return captions, skipped


@contextmanager
def writing(path: Path | None) -> Iterator[Callable[[str, str], None]]:
    """What writes a caption to the file, as the readers `JsonLines` and `CsvTable` read it; nothing without a file. The file takes its
    place when the block ends without an exception."""
    if path is None:
        yield lambda name, text: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            table = csv.writer(file)
            table.writerow(("image", "caption"))
            yield lambda name, text: table.writerow((name, text))
        else:
            yield lambda name, text: print(json.dumps({"image": name, "caption": text}, ensure_ascii=False), file=file)


def app(model: Unimodal, options: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    require_gradio()  # rather now than after a folder was read
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was uploaded is deleted
    index = None if options.folder is None else open_folder(model, options.folder, options.index).index
    serve(model, index, port=options.port, open_browser=options.open)


def say_skipped(reasons: dict[str, str], total: int) -> None:
    """The first reasons, and how many pictures are left out."""
    for why in list(reasons.values())[:REASONS]:
        say(f"skipped: {why}")
    if reasons:
        more = f", {REASONS} of them named above" if len(reasons) > REASONS else ""
        say(f"{len(reasons)} of {total} pictures skipped{more}")


def require_folder(folder: Path, query: str) -> None:
    """Refuse what is no folder of pictures before a model is loaded.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or no picture in it; or folder and query have changed places.
    """
    if not folder.exists() and os.path.isdir(query):
        raise ValueError(f"{folder}: no such folder; the folder comes first: unimodal search {query} {str(folder)!r}")
    pictures_in(folder)
