"""The page of a survey: the two tables, and what noise and few examples do, of all results that lie in a folder.

Every cell was measured in that run; published numbers stand in a table of their own, with their setting.
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from unimodal.report import Grid, write_tables

Result = dict[str, Any]
DASH = "–"
MEASURES = {"first": "first-stage R@1", "reranked": "reranked R@1", "map": "mAP"}
NARROW = 9  # letters of what is not broken on a terminal: numbers


PAGE = "index.html"


def read_results(out: Path) -> dict[str, dict[str, Result]]:
    """All results of a survey: setting (empty for the plain one) -> system -> what was measured."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(out.glob("**/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "setting" in result:  # a file of this name may be something else's
            found.setdefault(result["setting"], {})[result["name"]] = result
    return found


def write_page(out: Path, facts: dict[str, str]) -> Path:
    """Write `index.html` into the folder of the results.

    Args:
        out: the folder.
        facts: what stands above the tables, label -> text.
    """
    results = read_results(out)
    plain = list(results.get("", {}).values())
    tables = [
        taxonomy(plain),
        accuracy(plain),
        categories(plain),
        captions(results),
        *settings(results),
        published(plain),
    ]
    every = [result for group in results.values() for result in group.values()]
    systems = {result["title"] for result in every}
    budgets = sorted({result["settings"]["budget"] for result in every})
    return write_tables(
        out / PAGE,
        title="The survey, measured",
        summary=(
            f"{len(systems)} systems of vision-language retrieval on one data set, with one budget, one pair of frozen encoders "
            "and one protocol. Every number was measured in this run; published ones stand in a table of their own."
        ),
        facts=facts | {"Budget of each": " or ".join(budgets)},
        tables=tables,
    )


def taxonomy(results: Sequence[Result]) -> Grid:
    """What a system is and what it costs."""
    rows = []
    for r in results:
        time = r["milliseconds"]
        deletion = r["deletion"]
        rows.append(
            [
                _name(r),
                r["interaction"],
                _count(r["parameters"] + r["shared"]),
                _count(r["parameters"]),
                _count(r["trained"]),
                f"{r['training_seconds']:.0f} s\n{sum(stage['steps'] for stage in r['stages'].values())} steps",
                f"{time['first']:.1f}",
                DASH if time["reranked"] is None else f"{time['reranked']:.1f}",
                f"{r['index_bytes']:,}",
                DASH
                if deletion is None
                else f"{deletion['gap']:.2f}\n{deletion['faster']:.0%} of {deletion['pairs']:.0f} pairs",
            ]
        )
    return {
        "title": "What each is, and what it costs",
        "lead": (
            "Parameters are those that images and a query are read by, the shared towers included; its own are those beside the shared "
            "towers, with what is fitted in closed form and with its copy of a tower that it adapts. A system that scores another's first "
            "candidates counts itself alone. Times are of one text query against the whole gallery, from its token ids on, on the machine "
            "of this run. Bytes are what is kept of one image in memory. Deletion: how much faster the score falls when the most relevant "
            "image tokens are removed first than at random, in standard deviations of the score."
        ),
        "columns": [
            "System",
            "Interaction",
            "Parameters",
            "Its own",
            "Trained\nat most, in a stage",
            "Training",
            "ms per query\nfirst stage",
            "ms per query\nreranked",
            "Bytes per image",
            "Deletion test",
        ],
        "rows": rows,
        "notes": [
            *(f"{r['title']}: {r['inferred']}" for r in results if r["inferred"]),
            *(f"{r['title']}: {name} {value:.0%}" for r in results for name, value in r.get("findings", {}).items()),
        ],
    }


def accuracy(results: Sequence[Result]) -> Grid:
    """Recalls both ways, first and reranked, in the order of text-to-image R@1."""
    protocols: dict[str, str] = {}
    lines = []
    for r in results:
        if "accuracy" not in r:
            continue
        for stage, found in r["accuracy"].items():
            label = f"{r['protocol'][stage]}; {r['regime']}"
            letter = protocols.setdefault(label, chr(ord("A") + len(protocols)))
            first = stage == "first"
            cells = [f"{_name(r)}\n{'first stage' if first else 'reranked'}"]
            for way in ("t2i", "i2t"):
                cells += _direction(found[way])
            both = found["both"]
            cells += [DASH if both is None else _with_interval(both, key) for key in ("mr", "rsum")]
            cells.append(letter)
            lines.append((found["t2i"]["r1"], cells))
    lines.sort(key=lambda line: -line[0])
    names = ["R@1", "R@5", "R@10", "MedR", "mR"]
    return {
        "title": "How well each finds",
        "lead": (
            "Recall in percent: the share of queries whose best right answer is among the first k; below each number its 95 % interval "
            "over images. MedR is the median rank, mR the mean of a direction's three recalls, mR of six that of both, rSum their sum. "
            "Sorted by text-to-image R@1."
        ),
        "columns": [
            "System",
            *(f"T→I {name}" for name in names),
            *(f"I→T {name}" for name in names),
            "mR of six",
            "rSum",
            "Protocol",
        ],
        "rows": [cells for _, cells in lines],
        "notes": [f"{letter}: {label}" for label, letter in protocols.items()],
    }


def printed(grid: Grid, leave_out: Sequence[str]) -> Table:
    """A table for a terminal, without columns of these names and without intervals; below it the notes."""
    notes = "\n".join(grid.get("notes", ()))
    table = Table(title=grid["title"], box=SIMPLE, padding=(0, 0, 0, 1), caption=notes, caption_justify="left")
    places = [place for place, name in enumerate(grid["columns"]) if name not in leave_out]
    rows = [[row[0], *(row[place].partition("\n")[0] for place in places[1:])] for row in grid["rows"]]
    for place, name in enumerate(grid["columns"][place] for place in places):
        number = all(len(row[place]) <= NARROW for row in rows)
        table.add_column(
            name.replace(" ", "\n"), no_wrap=number, overflow="fold", justify="right" if number else "left"
        )
    for row in rows:
        table.add_row(*row)
    return table


def published(results: Sequence[Result]) -> Grid:
    """What the literature says, in a table of its own."""
    return {
        "title": "Published, not measured here",
        "lead": "R@1 / 5 / 10 in percent, on other data, with other encoders, budgets and protocols; not to be compared with the above.",
        "columns": ["System", "Published\nT→I R@1 / 5 / 10", "Published\nI→T R@1 / 5 / 10", "Setting", "Source"],
        "rows": [
            [r["title"], _three(row["t2i"]), _three(row["i2t"]), row["setting"], row["source"]]
            for r in results
            for row in r["published"]
        ],
    }


def categories(results: Sequence[Result]) -> Grid:
    """Systems that are judged by category."""
    found = [r for r in results if "map" in r]
    return {
        "title": "Search by category",
        "lead": (
            "Mean average precision over the whole gallery, where every item that shares a category with the query is right. Not to be "
            "compared with recalls of the one right item."
        ),
        "columns": ["System", "T→I mAP", "I→T mAP", "Mean", "Categories"],
        "rows": [
            [
                _name(r),
                *(
                    f"{value:.1f}"
                    for value in (r["map"]["t2i"], r["map"]["i2t"], (r["map"]["t2i"] + r["map"]["i2t"]) / 2)
                ),
                str(r["map"]["categories"]),
            ]
            for r in found
        ],
        "notes": sorted({r["map"]["protocol"] for r in found}),
    }


def captions(results: dict[str, dict[str, Result]]) -> Grid:
    """How much the systems that write captions invent, under every setting."""
    return {
        "title": "Invented objects",
        "lead": (
            "Captions of the ranked pictures, the likeliest word at a time. Objects: the share of named objects that the picture does not "
            "show; captions: the share of captions that name one. Scenes are known exactly; of photographs only a list of nouns is judged, "
            "against all human captions."
        ),
        "columns": ["System", "Objects, %", "Captions, %", "Objects named in a caption"],
        "rows": [
            [
                _name(r) + (f"\n{setting}" if setting else ""),
                f"{r['captions']['objects']:.1f}" if r["captions"]["named"] else DASH,  # no object, no share of objects
                f"{r['captions']['captions']:.1f}",
                f"{r['captions']['named']:.2f}",
            ]
            for setting, group in results.items()
            for r in group.values()
            if "captions" in r
        ],
    }


def settings(results: dict[str, dict[str, Result]]) -> list[Grid]:
    """What wrong captions and few examples do to each system: each such run beside the one that differs from it in nothing else."""
    noisy: dict[str, list[str]] = {}
    few: dict[str, list[str]] = {}
    for name in results:
        noise, shots = _parts(name)
        if noise:
            noisy.setdefault(shots, []).append(name)
        elif shots:
            few.setdefault("", []).append(name)
    tables = [
        _beside(
            results,
            base,
            names,
            title=f"Noise, {base}" if base else "Noise",
            lead="How far each falls when a share of the training captions is wrong: the caption of any other image (random), of another "
            "image that shows the same kind of object (category), or the own one with an attribute swapped (swap).",
            clean="clean",
            but=("setting",),
        )
        for base, names in noisy.items()
    ]
    for base, names in few.items():
        lead = (
            "How far each falls when only so many images of each category, or captions of each image, are learned from."
        )
        but = ("setting", "train")
        tables.append(_beside(results, base, names, title="Few examples", lead=lead, clean="all examples", but=but))
    return tables


def _beside(
    results: dict[str, dict[str, Result]],
    base: str,
    names: Sequence[str],
    *,
    title: str,
    lead: str,
    clean: str,
    but: Sequence[str],
) -> Grid:
    """A row for each system and direction: the run under `base`, then those under `names`, each with the change; `but` are the settings in
    which they may differ."""
    names = sorted(names, key=lambda name: (name.split()[-1], float(name.split()[1])))
    first = results.get(base, {})
    rows, notes = [], []
    for name in names:
        if name.startswith("noise"):
            share = next(iter(results[name].values()))["corrupted"]
            notes.append(f"{name}: {share:.1%} of the captions are no longer what they were.")
    for system in dict.fromkeys(system for name in names for system in results[name]):
        runs = [first.get(system), *(results[name].get(system) for name in names)]
        alike = [run is not None and runs[0] is not None and not _differ(runs[0], run, but) for run in runs]
        for name, run, same in zip([base, *names], runs, alike):
            if run is not None and runs[0] is not None and not same:
                what = ", ".join(_differ(runs[0], run, but))
                notes.append(f"{run['title']}, {name}: measured under other settings ({what}), so no change is given.")
        shown = next(run for run in runs[1:] if run is not None)
        measures = ["map"] if "map" in shown else shown["accuracy"]
        for measure, (way, arrow) in product(measures, (("t2i", "T→I"), ("i2t", "I→T"))):
            scores = [None if run is None else _score(run, measure, way) for run in runs]
            if not any(scores):
                continue
            cells = [
                _change(score, scores[0] if same and place else None)
                for place, (score, same) in enumerate(zip(scores, alike))
            ]
            rows.append([f"{_name(shown)}\n{arrow} {MEASURES[measure]}", *cells])
    return {
        "title": title,
        "lead": f"{lead} R@1 in percent with its 95 % interval; in brackets the change against {clean}, in points.",
        "columns": ["System", base or clean, *names],
        "rows": rows,
        "notes": notes,
    }


def _parts(setting: str) -> tuple[str, str]:
    """A setting's noise and its few examples, either of which may be empty."""
    noise, found, shots = setting.partition("shots ")
    return noise.strip(), found + shots


def _differ(one: Result, other: Result, but: Sequence[str]) -> list[str]:
    mine, theirs = one["settings"], other["settings"]
    return sorted(key for key in mine.keys() | theirs.keys() if key not in but and mine.get(key) != theirs.get(key))


def _score(result: Result, measure: str, way: str) -> tuple[float, float | None, float | None] | None:
    """R@1 of a stage with its interval, or mean average precision; None where it was not measured."""
    if measure == "map":
        return (result["map"][way], None, None) if "map" in result else None
    found = result["accuracy"].get(measure, {}).get(way)
    return None if found is None else (found["r1"], found["r1_low"], found["r1_high"])


def _change(
    score: tuple[float, float | None, float | None] | None, clean: tuple[float, float | None, float | None] | None
) -> str:
    if score is None:
        return DASH
    value, low, high = score
    change = "" if clean is None else f" ({value - clean[0]:+.1f})".replace("-", "−")
    return f"{value:.1f}{change}" + ("" if low is None else f"\n{low:.1f} to {high:.1f}")


def _name(result: Result) -> str:
    said = result["inferred"]
    mark = "inferred design" if said.lower().startswith("inferred design") else "inferred in part"
    return result["title"] + (f"\n{mark}" if said else "")


def _direction(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return [DASH] * 5
    middle, low, high = (f"{round(found[key], 1):g}" for key in ("medr", "medr_low", "medr_high"))
    median = f"{middle}\n{low} to {high}"
    return [*(_with_interval(found, key) for key in ("r1", "r5", "r10")), median, _with_interval(found, "mr")]


def _with_interval(found: dict[str, float], key: str) -> str:
    return f"{found[key]:.1f}\n{found[f'{key}_low']:.1f} to {found[f'{key}_high']:.1f}"


def _three(values: list[float | None] | None) -> str:
    return DASH if values is None else " / ".join(DASH if value is None else f"{value:g}" for value in values)


def _count(size: int) -> str:
    return f"{size / 1e6:.2f} M" if size >= 1_000_000 else f"{size / 1e3:.0f} k" if size >= 1000 else str(size)
