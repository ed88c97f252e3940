"""`unimodal search tune` and `unimodal search calibrate`: what a search costs and finds on one's own data, and what its scores mean."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from math import log10
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unimodal.cli.options import RULE, Parser, number, whole
from unimodal.cli.output import add_json, add_overwrite, print_json, require_free_file, require_free_folder
from unimodal.data.guess import open_split
from unimodal.files import write_json, write_text
from unimodal.hub import keep_calibration
from unimodal.hub.folder import CALIBRATION
from unimodal.inference import Unimodal
from unimodal.retrieval import rule_for
from unimodal.search.calibrate import Calibration, held_out_check
from unimodal.search.calibrate import calibrate as fit
from unimodal.search.tune import Pairing, Setting, cheapest, cost_curve, held_out_pairs

PRECISIONS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # whose thresholds are printed
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 320, 56, 44, 16, 150
CURVE, CHART = "cost_curve.json", "cost_curve.svg"
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a", "#0a7ea4", "#a40e26", "#6e7781")


def add_parsers(verbs: Any, model: argparse.ArgumentParser) -> None:
    """The two verbs, whose names are of two words."""
    data = Parser(add_help=False)
    data.add_argument(
        "--data", required=True, help="pairs: Karpathy's JSON, a table, tar shards, a folder; or `scenes`"
    )
    data.add_argument("--images", type=Path, help="the folder of its pictures; by default `images` beside it")
    data.add_argument("--split", default="val", help="which split; one that nothing was trained on")
    data.add_argument("--queries", type=whole(1), default=1000, help="at most so many queries of either kind")

    verb = verbs.add_parser("search tune", parents=[model, data], help="measure the cost curve on your own data")
    verb.add_argument("--recall", type=number(), required=True, help="the R@1 to reach, text to image, between 0 and 1")
    verb.add_argument("--combine", choices=("replace", "sum"), help=f"how the match score counts; {RULE}")
    verb.add_argument("--match_scale", type=number(), help=f"weight of the match logit under sum; {RULE}")
    verb.add_argument("--out", type=Path, help="a folder for cost_curve.json and cost_curve.svg")
    add_overwrite(verb)
    add_json(verb)

    verb = verbs.add_parser("search calibrate", parents=[model, data], help="let match scores mean probabilities")
    verb.add_argument("--depth", type=whole(1), help=f"candidates per query, as many as searches rerank; {RULE}")
    verb.add_argument("--out", type=Path, help="the .json file; by default calibration.json in the model's folder")
    add_overwrite(verb)
    add_json(verb)


def tune(load: Callable[[], Unimodal], options: argparse.Namespace) -> None:
    """Measure, print and write; the model is loaded once the output is known to be free."""
    if options.out is not None:
        inputs = (options.data, options.images, options.model)
        require_free_folder(options.out, (CURVE, CHART), overwrite=options.overwrite, inputs=inputs)
    pairs = open_split(options.data, options.split, options.images)
    pairing = Pairing(load().encoder, pairs, queries=options.queries)
    settings = cost_curve(
        pairing,
        combine=options.combine,
        match_scale=options.match_scale,
    )
    asked = f"{len(pairing.rows['text'])} captions and {len(pairing.rows['image'])} pictures asked; rule: hit"
    rule = rule_for(pairing.encoder.model.config, combine=options.combine, scale=options.match_scale)
    how = "replace" if rule.combine == "replace" else f"sum, match x {rule.scale:g}"
    title = f"{pairs.name} {pairs.split} [{pairs.fingerprint()}]; {len(pairs)} images, {len(pairing.texts)} captions; {asked}; {how}"
    best = cheapest(settings, options.recall)
    report = {
        "dataset": pairs.name,
        "split": pairs.split,
        "fingerprint": pairs.fingerprint(),
        "images": len(pairs),
        "queries": options.queries,
        "combine": rule.combine,
        "match_scale": rule.scale,
        "recall": options.recall,
        "cheapest": best and asdict(best),
        "settings": [asdict(one) for one in settings],
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / CURVE, report)
        write_text(options.out / CHART, chart(title, settings))
    if options.json:
        return print_json(report)
    print_curve(title, settings, best, options.recall)
    if options.out is not None:
        print(options.out)


def print_curve(title: str, settings: list[Setting], best: Setting | None, recall: float) -> None:
    """Every setting in a table, the cheapest that reaches the recall in bold and in a sentence."""
    table = Table(title=title, title_justify="left")
    columns = ("precision", "width", "k", "R@1 text to image", "R@1 image to text", "ms/query", "memory", "disk")
    for name in columns:
        table.add_column(name, justify="right")
    for one in settings:
        numbers = [f"{100 * one.text_to_image:.1f}", f"{100 * one.image_to_text:.1f}", f"{one.milliseconds:.1f}"]
        row = [one.precision, str(one.width), str(one.k), *numbers, f"{one.memory:.0f}", f"{one.disk:.0f}"]
        table.add_row(*row, style="bold" if one is best else None)
    Console(width=120).print(table)
    print("memory and disk are bytes per picture: what the first pass looks through, and what candidates are scored by")
    if best is None:
        top = max(one.text_to_image for one in settings)
        print(f"no setting reaches R@1 {100 * recall:g}; the best has {100 * top:.1f}")
    else:
        print(
            f"cheapest with R@1 of at least {100 * recall:g}: k {best.k}, width {best.width}, {best.precision}: "
            f"R@1 {100 * best.text_to_image:.1f} in {best.milliseconds:.1f} ms"
        )


def calibrate(load: Callable[[], Unimodal], options: argparse.Namespace, folder: Path) -> None:
    """Fit, write and print; the model is loaded once the output is known to be free."""
    if options.out is None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder here to keep the calibration in; give --out FILE")
    path = options.out or folder / CALIBRATION
    overwrite = options.overwrite or (options.out is None and is_calibration(path))
    require_free_file(path, (".json",), overwrite=overwrite, inputs=[options.data])
    pairs = open_split(options.data, options.split, options.images)
    model = load()
    pairing = Pairing(model.encoder, pairs, queries=options.queries)
    logits, labels, image_id = held_out_pairs(pairing, options.depth)
    found = fit(logits, labels, model=model.encoder.fingerprint())
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.resolve() == (folder / CALIBRATION).resolve():
        keep_calibration(folder, found)
    else:
        found.save(path)
    try:
        check = held_out_check(logits, labels, image_id, PRECISIONS)
        passed, error, unchecked = check.passed, check.error, ""
    except ValueError as fault:
        passed, error, unchecked = {}, None, str(fault)
    if options.json:
        unseen = {str(precision): {"pairs": n, "right": right} for precision, (n, right) in passed.items()}
        return print_json({"calibration": path, **asdict(found), "unseen": {"error": error, "passed": unseen}})
    print(
        f"{path}: probability = sigmoid({found.scale:.4f} logit {found.offset:+.4f}), from {found.pairs} pairs, {found.positives} of them "
        f"true; calibration error {found.error_before:.4f} before, {found.error_after:.4f} after"
    )
    if error is None:
        print(f"not checked on images that the fit did not see, since one half cannot be fitted alone: {unchecked}")
    else:
        print(f"on images that the fit did not see (one half, then the other): calibration error {error:.4f}")
    print_thresholds(found, passed)


def print_thresholds(found: Calibration, passed: dict[float, tuple[int, int]]) -> None:
    """The threshold of each precision, and how it did on images that the fit did not see."""
    for precision in PRECISIONS:
        try:
            line = f"probability at least {found.threshold_for(precision):.4f}"
        except ValueError:
            line = f"not reached, {found.curve[-1][1]:.3f} at most"
        pairs, right = passed.get(precision, (0, 0))
        measured = f"; unseen, {right} of {pairs} pairs right, {right / pairs:.3f}" if pairs else ""
        print(f"  precision {precision:g}: {line}{measured}")


def is_calibration(path: Path) -> bool:
    """Whether a file holds an earlier calibration."""
    try:
        Calibration.load(path)
    except (OSError, ValueError):
        return False
    return True


def chart(title: str, settings: list[Setting]) -> str:
    """Text to image R@1 over milliseconds (logarithmic), one line per precision and width, one point per k."""
    times, recalls = [one.milliseconds for one in settings], [one.text_to_image for one in settings]
    low, high = log10(min(times)) - 0.05, log10(max(times)) + 0.05
    floor, top = max(0.0, min(recalls) - 0.02), min(1.0, max(recalls) + 0.02)

    def x(milliseconds: float) -> float:
        return LEFT + (log10(milliseconds) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(recall: float) -> float:
        return HEIGHT - BOTTOM - (recall - floor) / (top - floor) * (HEIGHT - BOTTOM - TOP)

    parts = [f"<title>{escape(title)}</title>", '<rect width="100%" height="100%" fill="white"/>']
    for i in range(5):
        recall, milliseconds = floor + i * (top - floor) / 4, 10 ** (low + i * (high - low) / 4)
        parts.append(
            f'<path d="M{LEFT} {y(recall):.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>'
            f'<text x="{LEFT - 6}" y="{y(recall) + 4:.1f}" text-anchor="end">{100 * recall:.1f}</text>'
            f'<text x="{x(milliseconds):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{milliseconds:.3g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">ms per query (log)</text>'
    )
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">R@1 text to image</text>'
    )
    lines: dict[tuple[str, int], list[Setting]] = {}
    for one in settings:
        lines.setdefault((one.precision, one.width), []).append(one)
    for i, ((precision, width), line) in enumerate(lines.items()):
        colour, points = COLOURS[i % len(COLOURS)], [(x(one.milliseconds), y(one.text_to_image)) for one in line]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"><title>k {one.k}</title></circle>'
            for (a, b), one in zip(points, line)
        ]
        parts.append(
            f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 16 + 18 * i}" fill="{colour}">{precision}, width {width}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>\n"
    )
