"""The page: which sections there are, in which order, and the one file that holds them all."""

from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path

from unimodal.files import write_text
from unimodal.report import sections
from unimodal.report.contents import Found, Grid, Picture, Report, Search
from unimodal.report.pieces import duration, grid, image

# title: (what a reader should know before it, how it is written); an empty text leaves the section out
SECTIONS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "Results": (
        "The embedding finds, the matching head reranks what it found. A number means what its protocol says.",
        lambda report: sections.results(report["metrics"]) if report["metrics"] else "",
    ),
    "Stages": (
        "What each stage trained, what it left as it was, and how its losses fell.",
        lambda report: "".join(sections.stage(place, data) for place, data in enumerate(report["stages"], 1)),
    ),
    "Learned and forgotten": (
        "Every job, scored again after each stage. The small number is the change since the stage before.",
        lambda report: sections.forgetting(report["stages"], report["scores"]) if report["scores"] else "",
    ),
    "Search": (
        "The same query by the embedding alone and after the matching head looked at what it found.",
        lambda report: "".join(map(sections.search, report["searches"])),
    ),
    "Swapped attributes": (
        "One picture, two captions that differ in a word or in their order. Which one does each head prefer?",
        lambda report: grid("wide", map(sections.swap, report["swaps"])),
    ),
    "Captions": (
        "What the captioning head wrote under pictures that it never saw.",
        lambda report: grid("narrow", map(sections.caption, report["captions"])),
    ),
    "Drawings": (
        "What the generation head drew for the first texts, none left out, and what a program that reads the pixels finds wrong.",
        lambda report: grid("narrow", map(sections.drawing, report["drawings"])),
    ),
}

# The browser itself holds the page to its word: no request leaves it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page of a run.

    Args:
        path: the HTML file; folders that lead to it are made.
        report: see `unimodal.report.Report`.

    Returns:
        The path, as a `Path`.

    Raises:
        ValueError: keys of the report are missing or unknown.
        TypeError: a picture is neither a PIL image nor a uint8 array [H, W, 3].
    """
    expected, given = Report.__required_keys__, frozenset(report)
    if given != expected:
        raise ValueError(
            f"a report lacks {sorted(expected - given)} and has the unknown {sorted(given - expected)}; "
            f"it has exactly the keys {sorted(expected)} (an empty list leaves a section out)"
        )
    facts = {
        **report["facts"],
        "Wall time": duration(report["wall_seconds"]),
        "Peak memory": f"{report['peak_memory_mb']:,.0f} MiB",
    }
    parts = {title: (lead, write(report)) for title, (lead, write) in SECTIONS.items()}
    return _write(path, report["title"], report["summary"], facts, parts)


def write_misses(
    path: str | Path, *, title: str, summary: str, facts: dict[str, str], misses: dict[str, list[Search]]
) -> Path:
    """Write the page of queries that an evaluation missed, in groups.

    Args:
        path: the HTML file; folders that lead to it are made.
        title, summary, facts: what stands above them; a fact is label -> text.
        misses: heading of a group -> its queries with what was found before and after reranking.

    Returns:
        The path, as a `Path`.

    Raises:
        TypeError: a picture is neither a PIL image nor a uint8 array [H, W, 3].
    """
    lead = (
        "What the embedding found, and its order after the matching head looked at it; the labelled answer has a mark."
    )
    parts = {group: (lead, "".join(map(sections.search, found))) for group, found in misses.items()}
    return _write(path, title, summary, facts, parts)


def write_search(
    path: str | Path,
    query: str | Picture,
    *,
    summary: str,
    facts: dict[str, str],
    order: str,
    found: list[Found],
    skipped: list[str],
) -> Path:
    """Write the page of one search of a folder of pictures.

    Args:
        path: the HTML file; folders that lead to it are made.
        query: the text, or the picture, that was asked.
        summary, facts: what stands above the results; a fact is label -> text.
        order: by what the results are ordered, as a sentence.
        found: what was found, best first.
        skipped: what could not be read, each with its reason.

    Returns:
        The path, as a `Path`.

    Raises:
        TypeError: a picture is neither a PIL image nor a uint8 array [H, W, 3].
    """
    text = query if isinstance(query, str) else "the query"
    asked = "" if isinstance(query, str) else f'<div class="asked">{image(query, "the picture that was asked")}</div>'
    why = (
        " The second picture is what the matching head saw; in it and in the words, red speaks for the match and blue against it."
        if any("heatmap" in one for one in found)
        else ""
    )
    parts = {
        "Found": (escape(order) + why, asked + grid("wide", sections.found_all(found, text))),
        "Skipped": ("Pictures that cannot be read are left out.", sections.listed(skipped)),
    }
    return _write(path, query if isinstance(query, str) else "Pictures like this one", summary, facts, parts)


def write_tables(path: str | Path, *, title: str, summary: str, facts: dict[str, str], tables: list[Grid]) -> Path:
    """Write a page of tables, each a section; one without rows is left out.

    Args:
        path: the HTML file; folders that lead to it are made.
        title, summary, facts: what stands above them; a fact is label -> text.
        tables: in their order.

    Returns:
        The path, as a `Path`.
    """
    parts = {data["title"]: (escape(data["lead"]), sections.table(data) if data["rows"] else "") for data in tables}
    return _write(path, title, summary, facts, parts)


def _write(
    path: str | Path, title: str, summary: str, facts: dict[str, str], parts: dict[str, tuple[str, str]]
) -> Path:
    """Title, facts and sections (heading -> lead, content) in one file; a section without content is left out."""
    present = {heading: part for heading, part in parts.items() if part[1]}
    links = "".join(f'<a href="#{anchor(heading)}">{escape(heading)}</a>' for heading in present)
    nav = f'<nav aria-label="Sections">{links}</nav>' if len(present) > 1 else ""
    body = "".join(
        f'<section id="{anchor(heading)}"><h2>{escape(heading)}</h2><p class="lead">{lead}</p>{content}</section>'
        for heading, (lead, content) in present.items()
    )
    entries = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, text in facts.items())
    style = resources.files("unimodal.report").joinpath("style.css").read_text(encoding="utf-8")
    title = escape(title)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{title}</h1>
<p class="summary">{escape(summary)}</p>
<dl class="facts">{entries}</dl>
</header>
{nav}
<main id="content">
{body}
</main>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
