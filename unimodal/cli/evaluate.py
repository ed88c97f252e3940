"""`unimodal evaluate` scores a checkpoint's retrieval on a split, and `unimodal compare` asks whether two runs differ by more than chance.

Evaluation writes four files: `results.json`, `ranks.safetensors` (every query's rank with its protocol, for `compare`),
`errors.jsonl` (every failed query with what it found) and `errors.html` (some of them with their pictures). Of COCO's 5K test split
`--judgements` adds the numbers of ECCV Caption and CxC, whose judges saw what COCO's labels miss (`unimodal.metrics.judged`).
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unimodal.backbones import move_pixels
from unimodal.cli.options import RULE, Parser, add_model, number, whole
from unimodal.cli.output import add_json, add_overwrite, print_json, require_free_folder
from unimodal.data.guess import open_split
from unimodal.data.labelled import label_matrix
from unimodal.data.module import EvaluationBatches
from unimodal.data.pairs import Pairs
from unimodal.files import replacing_contents, write_json, write_text
from unimodal.hub import load_checkpoint
from unimodal.metrics import compare, load_ranks, relevance_metrics, require_alike, save_ranks
from unimodal.recipes import shipped_checkpoint
from unimodal.report import Hit, Search, write_misses
from unimodal.tasks import Evaluation, EvaluationSettings
from unimodal.tasks.errors import Row, retrieval_errors
from unimodal.tasks.judged import judged_retrieval, require_judgeable

RESULTS, RANKS, ERRORS, MISSES = FILES = ("results.json", "ranks.safetensors", "errors.jsonl", "errors.html")
DIRECTIONS = {"text_to_image": "Text to image", "image_to_text": "Image to text"}


def parser() -> argparse.ArgumentParser:
    """The parser of both verbs."""
    both = Parser(prog="unimodal")
    verbs = both.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("evaluate", help="score a checkpoint's retrieval on a split")
    verb.set_defaults(work=evaluate)
    add_model(verb)
    verb.add_argument(
        "--data", required=True, help="a JSON file in Karpathy's format, a table, tar shards or a folder; or `scenes`"
    )
    verb.add_argument("--images", type=Path, help="folder of the pictures; by default `images` beside the file")
    verb.add_argument("--split", default="test", help="the split to score")
    verb.add_argument("--labels", help="column of the labels, for a table")
    verb.add_argument("--out", type=Path, required=True, help="folder of the files that are written")
    verb.add_argument(
        "--captions_per_image", type=whole(1), help="read the first so many captions of each image; by default all"
    )
    verb.add_argument(
        "--folds", type=whole(1), default=1, help="search so many blocks alone and average: 5 gives COCO 1K of 5K"
    )
    verb.add_argument(
        "--rerank_top_k",
        type=whole(0),
        help=f"candidates that the matching head judges, {RULE}; 0 for none",
    )
    verb.add_argument("--combine", choices=("replace", "sum"), help=f"what its score does to the cosine, {RULE}")
    verb.add_argument("--match_scale", type=number(), help=f"weight of its score under sum, {RULE}")
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
    verb.add_argument("--batch_size", type=whole(1), default=32, help="images at a time")
    verb.add_argument("--seed", type=whole(0), default=0, help="of the intervals")
    add_overwrite(verb)
    add_json(verb)

    verb = verbs.add_parser("compare", help="test whether two evaluated runs differ")
    verb.set_defaults(work=compare_runs)
    verb.add_argument("a", type=Path, metavar="A", help="a folder that `evaluate` wrote")
    verb.add_argument("b", type=Path, metavar="B", help="another")
    verb.add_argument("--stage", choices=("first", "reranked"), help="by default the last that both have")
    verb.add_argument("--samples", type=whole(1), default=10_000, help="draws of the interval and of the test")
    verb.add_argument("--seed", type=whole(0), default=0, help="of the draws")
    add_json(verb)
    return both


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of either verb."""
    return parser().parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Either verb."""
    options = parse(arguments)
    options.work(options)
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Score, write and print."""
    inputs = (options.data, options.images, options.model)
    require_free_folder(options.out, FILES, overwrite=options.overwrite, inputs=inputs, is_ours=is_evaluation)
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
    if (options.text_to_text or options.every_relevant or options.judgements) and not evaluation.embeds:
        raise ValueError(
            "--text_to_text, --every_relevant and --judgements compare embeddings, and this model has none; leave them out"
        )
    read(evaluation, options.batch_size)
    results = evaluation.retrieval()
    stages = results["ranks"]
    intervals = {stage: ranks.intervals(seed=options.seed) for stage, ranks in stages.items()}
    require_alike([ranks.protocol for ranks in stages.values()], any_search=True)
    more = {"text_to_text": results["text_to_text"]} if options.text_to_text else {}
    if options.every_relevant:
        more |= every_relevant(evaluation)
    judged = judged_retrieval(evaluation, results) if options.judgements else {}

    content = {
        "model": str(options.model),
        **{stage: results[f"retrieval_{stage}"].to_dict() for stage in stages},
        **{name: result.to_dict() for name, result in more.items()},
        **{f"{rule}_{stage}": one.to_dict() for rule, both in judged.items() for stage, one in both.items()},
        "intervals": {
            stage: {name: [x.low, x.high] for name, x in found.items()} for stage, found in intervals.items()
        },
    }
    texts = torch.cat(evaluation.text_embeddings) if evaluation.embeds else None
    errors = list(retrieval_errors(pairs, results, texts))
    content["errors"] = count_errors(errors)
    with replacing_contents(options.out, FILES.__contains__) as fresh:
        save_ranks(fresh / RANKS, stages)
        write_errors(fresh / ERRORS, errors)
        where = list(stages.values())[-1].protocol.label()
        write_page(fresh / MISSES, pairs, errors, {"Model": str(options.model), "Protocol": where})
        write_json(fresh / RESULTS, content)
    if options.json:
        return print_json({**content, "out": options.out})
    print_results(results, intervals, more, judged)
    for direction, count in content["errors"].items():
        print(
            f"{direction}: {count['failed']} queries failed, {count['likely_false_negative']} by a likely false negative"
        )
    print(f"{options.out}: {', '.join(FILES)}")


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds what an earlier evaluation wrote."""
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"model", "first", "intervals", "errors"} <= content.keys()


def print_results(
    results: dict[str, Any],
    intervals: dict[str, dict[str, Any]],
    more: dict[str, Any],
    judged: dict[str, dict[str, Any]],
) -> None:
    """The stages side by side with their intervals, then every other result in a table of its own."""
    scores = {stage: results[f"retrieval_{stage}"].scores() for stage in results["ranks"]}
    _table(
        list(results["ranks"].values())[-1].protocol.label(),
        ("", *scores),
        [
            (name, *(_with_interval(scores[stage][name], intervals[stage].get(name)) for stage in scores))
            for name in scores["first"]
        ],
    )
    for result in more.values():
        _table(result.protocol.label(), ("", "first"), [(name, f"{x:.2f}") for name, x in result.scores().items()])
    for both in judged.values():
        last = list(both.values())[-1]
        rows = [(name, *(f"{one.scores()[name]:.2f}" for one in both.values())) for name in last.scores()]
        _table(last.protocol.label(), ("", *both), rows)


def read(evaluation: Evaluation, batch_size: int) -> None:
    """Show the evaluation the whole of its split."""
    count, device = len(evaluation.pairs), evaluation.model.log_scale.device
    rows = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    batches = EvaluationBatches(evaluation.pairs, evaluation.processor, rows, None)
    console = Console(stderr=True)
    for step in track(range(len(rows)), "Reading", console=console, disable=not console.is_terminal, transient=True):
        batch: Any = {name: move_pixels(value, device) for name, value in batches[step].items()}
        evaluation.add(batch)


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


def count_errors(errors: list[Row]) -> dict[str, dict[str, int]]:
    """How many queries failed each way."""
    counts = {direction: {"failed": 0, "likely_false_negative": 0} for direction in DIRECTIONS}
    for row in errors:
        counts[row["direction"]]["failed"] += 1
        counts[row["direction"]]["likely_false_negative"] += row["likely_false_negative"]
    return counts


def write_errors(path: Path, errors: list[Row]) -> None:
    """One JSON line per failed query."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in errors))


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
    rows = {
        name: {
            "a": float(ours[name][0].mean()),
            "b": float(theirs[name][0].mean()),
            **{key: getattr(test, key) for key in ("difference", "low", "high", "confidence", "p_value")},
        }
        for name, test in tests.items()
    }
    if options.json:
        protocols = {"protocol_a": a.protocol.label(), "protocol_b": b.protocol.label()}
        return print_json({"a": options.a, "b": options.b, "stage": stage, **protocols, "metrics": rows})
    _table(
        f"A: {options.a}, {a.protocol.label()}\nB: {options.b}, {b.protocol.label()}",
        ("", "A", "B", "B - A", "95 % interval", "p"),
        [
            (
                name,
                f"{row['a']:.2f}",
                f"{row['b']:.2f}",
                f"{row['difference']:+.2f}",
                f"{row['low']:+.2f} to {row['high']:+.2f}",
                f"{row['p_value']:.4f}",
            )
            for name, row in rows.items()
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
