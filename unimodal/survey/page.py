"""The page of a survey: the two tables, and what noise and few examples do, of all results that lie in a folder.

Every cell was measured in that run; published numbers stand in columns of their own, with their setting.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimodal.report import Grid, write_tables

Result = dict[str, Any]
DASH = "–"


def read_results(out: Path) -> dict[str, dict[str, Result]]:
    """All results of a survey: setting (empty for the plain one) -> system -> what was measured."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(out.glob("**/result.json")):
        result = json.loads(path.read_text())
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
    tables = [taxonomy(plain), accuracy(plain), categories(plain), captions(plain), *settings(results)]
    systems = {result["title"] for group in results.values() for result in group.values()}
    return write_tables(
        out / "index.html",
        title="The survey, measured",
        summary=(
            f"{len(systems)} systems of vision-language retrieval on one data set, with one budget, one pair of frozen encoders "
            "and one protocol. Every number was measured in this run; published ones stand in their own columns."
        ),
        facts=facts,
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
            "Parameters are those on top of the shared frozen encoders. Times are of one text query against the whole gallery, from the "
            "encoder's tokens on, on the machine of this run. Bytes are what is kept of one image in memory. Deletion: how much faster the "
            "score falls when the most relevant image tokens are removed first than at random, in standard deviations of the score."
        ),
        "columns": [
            "System",
            "Interaction",
            "Parameters",
            "Trained\nat most, in a stage",
            "Training",
            "ms per query\nfirst stage",
            "ms per query\nreranked",
            "Bytes per image",
            "Deletion test",
        ],
        "rows": rows,
    }


def accuracy(results: Sequence[Result]) -> Grid:
    """Recalls both ways, first and reranked, in the order of the last rSum or text-to-image recall."""
    protocols: dict[str, str] = {}
    lines = []
    for r in results:
        if "accuracy" not in r:
            continue
        for stage, found in r["accuracy"].items():
            label = r["protocol"][stage]
            letter = protocols.setdefault(label, chr(ord("A") + len(protocols)))
            published = "\n".join(
                f"{_three(row['t2i'])} | {_three(row['i2t'])}: {row['setting']} ({row['source']})"
                for row in r["published"]
            )
            first = stage == "first"
            cells = [f"{_name(r)}\n{'first stage' if first else 'reranked'}"]
            for way in ("t2i", "i2t"):
                cells += _direction(found[way])
            both = [found[way] for way in ("t2i", "i2t") if found[way]]
            whole = len(both) == 2
            cells.append(f"{sum(x['mr'] for x in both) / 2:.1f}" if whole else DASH)
            cells.append(f"{sum(3 * x['mr'] for x in both):.1f}" if whole else DASH)
            cells += [letter, (published or DASH) if first else DASH]
            lines.append((found["t2i"]["r1"], cells))
    lines.sort(key=lambda line: -line[0])
    names = ["R@1\n95 % interval", "R@5", "R@10", "MedR", "mR"]
    return {
        "title": "How well each finds",
        "lead": (
            "Recall in percent: the share of queries whose best right answer is among the first k. mR is the mean of a direction's three, "
            "mR of six that of both, rSum their sum. Sorted by text-to-image R@1."
        ),
        "columns": [
            "System",
            *(f"T→I {name}" for name in names),
            *(f"I→T {name}" for name in names),
            "mR of six",
            "rSum",
            "Protocol",
            "Published: T→I | I→T R@1/5/10\nother data, encoders and budget",
        ],
        "rows": [cells for _, cells in lines],
        "notes": [f"{letter}: {label}" for label, letter in protocols.items()],
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
        "columns": ["System", "T→I mAP", "I→T mAP", "Categories"],
        "rows": [
            [_name(r), f"{r['map']['t2i']:.1f}", f"{r['map']['i2t']:.1f}", str(r["map"]["categories"])] for r in found
        ],
        "notes": sorted({r["map"]["protocol"] for r in found}),
    }


def captions(results: Sequence[Result]) -> Grid:
    """How much the systems that write captions invent."""
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
                _name(r),
                *(f"{r['captions'][key]:.1f}" for key in ("objects", "captions")),
                f"{r['captions']['named']:.2f}",
            ]
            for r in results
            if "captions" in r
        ],
    }


def settings(results: dict[str, dict[str, Result]]) -> list[Grid]:
    """What special training data do to each system: noise and few examples."""
    plain, tables = results.get("", {}), []
    for title, start, lead in (
        (
            "Noise",
            "noise",
            "Text-to-image R@1 when a share of the training captions is corrupted; in brackets, against the clean run.",
        ),
        (
            "Few examples",
            "shots",
            "Text-to-image R@1 when only so many images of each category, or captions of each image, are learned from.",
        ),
    ):
        names = [name for name in results if name.startswith(start)]
        systems = list(dict.fromkeys(system for name in names for system in results[name]))
        rows = []
        for system in systems:
            clean = _r1(plain.get(system))
            row = [next(results[name][system]["title"] for name in names if system in results[name]), _points(clean)]
            for name in names:
                value = _r1(results[name].get(system))
                change = "" if value is None or clean is None else f"\n({value - clean:+.1f})"
                row.append(_points(value) + change)
            rows.append(row)
        tables.append(Grid(title=title, lead=lead, columns=["System", "All, clean", *names], rows=rows))
    return tables


def _r1(result: Result | None) -> float | None:
    if result is None or "accuracy" not in result:
        return None
    stages = list(result["accuracy"].values())
    return stages[-1]["t2i"]["r1"]


def _points(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"


def _name(result: Result) -> str:
    return result["title"] + (f"\n{result['inferred']}" if result["inferred"] else "")


def _direction(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return [DASH] * 5
    r1 = f"{found['r1']:.1f}\n{found['r1_low']:.1f} to {found['r1_high']:.1f}"
    return [r1, f"{found['r5']:.1f}", f"{found['r10']:.1f}", f"{found['medr']:g}", f"{found['mr']:.1f}"]


def _three(values: list[float | None] | None) -> str:
    return DASH if values is None else " / ".join(DASH if value is None else f"{value:g}" for value in values)


def _count(size: int) -> str:
    return f"{size / 1e6:.2f} M" if size >= 1_000_000 else f"{size / 1e3:.0f} k" if size >= 1000 else str(size)
