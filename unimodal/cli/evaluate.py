"""`unimodal evaluate` scores a checkpoint's retrieval on a split, and `unimodal compare` asks whether two runs differ by more than chance.

Evaluation writes four files: `results.json`, `ranks.safetensors` (every query's rank with its protocol, for `compare`),
`errors.jsonl` (every failed query with what it found) and `errors.html` (some of them with their pictures). Of COCO's 5K test split
`--judgements` adds the numbers of ECCV Caption and CxC, whose judges saw what COCO's labels miss (`unimodal.metrics.judged`).
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unimodal.data.guess import open_split
from unimodal.data.labelled import label_matrix
from unimodal.data.module import EvaluationBatches
from unimodal.data.pairs import Pairs
from unimodal.hub import load_checkpoint
from unimodal.metrics import compare, load_ranks, relevance_metrics, require_alike, save_ranks
from unimodal.recipes import CHECKPOINT, shipped_checkpoint
from unimodal.report import Hit, Search, write_misses
from unimodal.tasks import Evaluation, EvaluationSettings
from unimodal.tasks.errors import Row, retrieval_errors
from unimodal.tasks.judged import judged_retrieval, require_judgeable

RANKS = "ranks.safetensors"
DIRECTIONS = {"text_to_image": "Text to image", "image_to_text": "Image to text"}


def parser() -> argparse.ArgumentParser:
    """The parser of both verbs."""
    whole = argparse.ArgumentParser(prog="unimodal")
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("evaluate", help="score a checkpoint's retrieval on a split")
    verb.set_defaults(work=evaluate)
    verb.add_argument("--model", help=f"a checkpoint folder or Hub id; by default {CHECKPOINT}")
    verb.add_argument("--device", help="where to run, for example cuda; by default the CPU")
    verb.add_argument(
        "--data", required=True, help="a JSON file in Karpathy's format, a table, tar shards or a folder; or `scenes`"
    )
    verb.add_argument("--images", type=Path, help="folder of the pictures; by default `images` beside the file")
    verb.add_argument("--split", default="test", help="the split to score")
    verb.add_argument("--labels", help="column of the labels, for a table")
    verb.add_argument("--out", type=Path, required=True, help="folder of the files that are written")
    verb.add_argument(
        "--captions_per_image", type=int, help="read the first so many captions of each image; by default all"
    )
    verb.add_argument(
        "--folds", type=int, default=1, help="search so many blocks alone and average: 5 gives COCO 1K of 5K"
    )
    verb.add_argument(
        "--rerank_top_k",
        type=int,
        default=16,
        help="candidates that the matching head judges; 0 for none, and for no finds in errors.jsonl",
    )
    verb.add_argument("--combine", choices=("replace", "sum"), default="sum", help="what its score does to the cosine")
    verb.add_argument("--match_scale", type=float, default=0.02, help="weight of its score under sum")
    verb.add_argument("--text_to_text", action="store_true", help="also search captions by captions")
    verb.add_argument(
        "--every_relevant",
        action="store_true",
        help="also fractional recall, mAP, nDCG and R-precision, by labels where the data have them",
    )
    verb.add_argument(
        "--judgements",
        action="store_true",
        help="also score COCO's 5K test split under the fuller judgements of ECCV Caption and CxC; needs unimodal[eccv]",
    )
    verb.add_argument("--batch_size", type=int, default=32, help="images at a time")
    verb.add_argument("--seed", type=int, default=0, help="of the intervals")

    verb = verbs.add_parser("compare", help="test whether two evaluated runs differ")
    verb.set_defaults(work=compare_runs)
    verb.add_argument("a", type=Path, metavar="A", help="a folder that `evaluate` wrote")
    verb.add_argument("b", type=Path, metavar="B", help="another")
    verb.add_argument("--stage", choices=("first", "reranked"), help="by default the last that both have")
    verb.add_argument("--samples", type=int, default=10_000, help="draws of the interval and of the test")
    verb.add_argument("--seed", type=int, default=0, help="of the draws")
    return whole


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of either verb."""
    return parser().parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Either verb; bad input becomes one line on standard error and status 1."""
    options = parse(arguments)
    try:
        options.work(options)
    except (ImportError, OSError, ValueError, TypeError) as error:
        print(f"unimodal {options.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Score, print and write."""
    pairs = open_split(
        options.data,
        options.split,
        options.images,
        labels=options.labels,
        captions_per_image=options.captions_per_image,
    )
    settings = EvaluationSettings(
        rerank_k=options.rerank_top_k,
        combine=options.combine,
        match_scale=options.match_scale,
        folds=options.folds,
        text_to_text=options.text_to_text,
    )
    if options.judgements:
        require_judgeable(pairs, settings)
    options.model = options.model or shipped_checkpoint()
    model, processor = load_checkpoint(options.model, device=options.device)
    evaluation = Evaluation(model.eval(), processor, pairs, settings)
    read(evaluation, options.batch_size)
    results = evaluation.retrieval()

    stages = results["ranks"]
    intervals = {stage: ranks.intervals(seed=options.seed) for stage, ranks in stages.items()}
    scores = {stage: results[f"retrieval_{stage}"].scores() for stage in stages}
    require_alike([ranks.protocol for ranks in stages.values()], any_search=True)
    _table(
        "; ".join(ranks.protocol.label() for ranks in list(stages.values())[-1:]),
        ("", *stages),
        [
            (name, *(_with_interval(scores[stage][name], intervals[stage].get(name)) for stage in stages))
            for name in scores["first"]
        ],
    )
    more = {"text_to_text": results["text_to_text"]} if options.text_to_text else {}
    if options.every_relevant:
        more |= every_relevant(evaluation)
    for result in more.values():
        _table(result.protocol.label(), ("", "first"), [(name, f"{x:.2f}") for name, x in result.scores().items()])
    for rule, judged in (judged_retrieval(evaluation, results) if options.judgements else {}).items():
        last = list(judged.values())[-1]
        rows = [(name, *(f"{one.scores()[name]:.2f}" for one in judged.values())) for name in last.scores()]
        _table(last.protocol.label(), ("", *judged), rows)
        more |= {f"{rule}_{stage}": one for stage, one in judged.items()}

    options.out.mkdir(parents=True, exist_ok=True)
    save_ranks(options.out / RANKS, stages)
    errors = list(retrieval_errors(pairs, results, torch.cat(evaluation.text_embeddings)))
    counts = write_errors(options.out / "errors.jsonl", errors)
    where = list(stages.values())[-1].protocol.label()
    write_page(options.out / "errors.html", pairs, errors, {"Model": str(options.model), "Protocol": where})
    content = {
        "model": str(options.model),
        **{stage: results[f"retrieval_{stage}"].to_dict() for stage in stages},
        **{name: result.to_dict() for name, result in more.items()},
        "intervals": {
            stage: {name: [x.low, x.high] for name, x in found.items()} for stage, found in intervals.items()
        },
        "errors": counts,
    }
    (options.out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for direction, count in counts.items():
        print(
            f"{direction}: {count['failed']} queries failed, {count['likely_false_negative']} by a likely false negative"
        )
    print(f"{options.out}: results.json, {RANKS}, errors.jsonl, errors.html")


def read(evaluation: Evaluation, batch_size: int) -> None:
    """Show the evaluation the whole of its split."""
    count, device = len(evaluation.pairs), evaluation.model.log_scale.device
    rows = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    batches = EvaluationBatches(evaluation.pairs, evaluation.processor, rows, None)
    console = Console(stderr=True)
    for step in track(range(len(rows)), "Reading", console=console, disable=not console.is_terminal, transient=True):
        evaluation.add({name: value.to(device) for name, value in batches[step].items()})


def every_relevant(evaluation: Evaluation) -> dict[str, Any]:
    """Both directions of the whole split, each as a result of its own; relevant is what shares a label, or else an image."""
    image, text = torch.cat(evaluation.image_embeddings), torch.cat(evaluation.text_embeddings)
    ids = torch.cat(evaluation.image_ids), torch.cat(evaluation.text_image_ids)
    if evaluation.pairs.labels(0):
        labels, _ = label_matrix(evaluation.pairs)
        owner = [i for i in range(len(evaluation.pairs)) for _ in evaluation.pairs.captions(i)]
        ids = labels.to(image.device), labels[owner].to(image.device)
    protocol = evaluation.protocol()
    return {
        "every_relevant_t2i": relevance_metrics(text, image, ids[1], ids[0], direction="t2i", protocol=protocol),
        "every_relevant_i2t": relevance_metrics(image, text, *ids, direction="i2t", protocol=protocol),
    }


def write_errors(path: Path, errors: list[Row]) -> dict[str, dict[str, int]]:
    """One JSON line per failed query; returns how many there are each way."""
    counts = {direction: {"failed": 0, "likely_false_negative": 0} for direction in DIRECTIONS}
    with path.open("w", encoding="utf-8") as file:
        for row in errors:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[row["direction"]]["failed"] += 1
            counts[row["direction"]]["likely_false_negative"] += row["likely_false_negative"]
    return counts


def write_page(path: Path, pairs: Pairs, errors: list[Row], facts: dict[str, str], shown: int = 5) -> None:
    """The failed queries of each direction whose wrong first find scored highest, with their pictures."""
    row_of = {pairs.key(i): i for i in range(len(pairs))}

    def hit(find: Row, score: float) -> Hit:
        what: Any = {"text": find["caption"]} if "caption" in find else {"picture": pairs.image(row_of[find["image"]])}
        return Hit(score=score, right=find["right"], **what)

    def miss(row: Row) -> Search:
        by_cosine = sorted(row["found"], key=lambda find: -find["score"])
        places = f"place {row['rank_first']} first" + (
            "" if row["rank_reranked"] is None else f", {row['rank_reranked']} reranked"
        )
        note = f"the best labelled answer: {places}"
        if row["likely_false_negative"]:
            note += "; what was found first is probably right too, though nobody labelled it"
        text: Any = {"text": row["query"]} if row["direction"] == "text_to_image" else {}
        return Search(
            **text,
            picture=pairs.image(row_of[row["image"]]),
            first=[hit(find, find["score"]) for find in by_cosine],
            reranked=[hit(find, find["match"]) for find in row["found"] if find["match"] is not None],
            note=note,
        )

    groups = {}
    for direction, title in DIRECTIONS.items():
        missed = [row for row in errors if row["direction"] == direction and row["found"]]
        missed.sort(key=lambda row: -(row["found"][0]["match"] or row["found"][0]["score"]))
        groups[title] = [miss(row) for row in missed[:shown]]
    summary = (
        f"The {shown} queries each way that were answered wrongly with the highest score. The picture beside a caption is the "
        "labelled one; numbers are cosines in the first stage and match logits after it."
    )
    write_misses(
        path, title=f"What was missed: {pairs.name} {pairs.split}", summary=summary, facts=facts, misses=groups
    )


def compare_runs(options: argparse.Namespace) -> None:
    """Print B - A of every metric, with interval and p value."""
    runs = [load_ranks(path / RANKS if path.is_dir() else path) for path in (options.a, options.b)]
    shared = [stage for stage in ("first", "reranked") if all(stage in run for run in runs)]
    stage = options.stage or shared[-1]
    if stage not in shared:
        raise ValueError(f"--stage {stage}: not in both runs; both have {', '.join(shared)}")
    a, b = (run[stage] for run in runs)
    tests = compare(a, b, seed=options.seed, samples=options.samples)
    ours, theirs = a.values(), b.values()
    _table(
        f"A: {options.a}, {a.protocol.label()}\nB: {options.b}, {b.protocol.label()}",
        ("", "A", "B", "B - A", "95 % interval", "p"),
        [
            (
                name,
                f"{ours[name][0].mean():.2f}",
                f"{theirs[name][0].mean():.2f}",
                f"{test.difference:+.2f}",
                f"{test.low:+.2f} to {test.high:+.2f}",
                f"{test.p_value:.4f}",
            )
            for name, test in tests.items()
        ],
    )


def _with_interval(value: float, interval: Any) -> str:
    return f"{value:.2f}" + ("" if interval is None else f" ({interval.low:.2f} to {interval.high:.2f})")


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(title)
    table = Table()
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
