"""The sections of a page, one function each: contents in, HTML out, every text escaped."""

import re
from collections.abc import Sequence
from html import escape

from unimodal.report.chart import loss_chart
from unimodal.report.contents import Caption, Drawing, Found, Grid, Hit, Metric, Picture, Score, Search, Stage, Swap
from unimodal.report.pieces import (
    chances,
    count,
    differing,
    duration,
    image,
    mark,
    measure,
    minus,
    number,
    scrolling,
    signed,
    told_apart,
)

WORDS = 24  # characters: a longer line of a table's cell may be broken


def results(metrics: Sequence[Metric]) -> str:
    letters = {protocol: chr(ord("A") + i) for i, protocol in enumerate(dict.fromkeys(m["protocol"] for m in metrics))}
    rows = []
    for metric in metrics:
        unit, first, reranked = metric.get("unit", "share"), metric.get("first"), metric.get("reranked")
        if "value" in metric:
            cells = f'<td colspan="2">{measure(metric["value"], unit)}</td>'
        else:
            cells = f"<td>{measure(first, unit)}</td><td>{measure(reranked, unit)}</td>"
        aims = metric.get("aims", {})
        reached = " ".join(f"{mark(metric[column] >= aim)} {number(aim, unit)}" for column, aim in aims.items())
        name = f'<th scope="row">{escape(metric["name"])}</th>'
        rows.append(f'<tr>{name}{cells}<td class="aim">{reached}</td><td>{letters[metric["protocol"]]}</td></tr>')
    titles = "<th></th><th>First stage<small>embedding</small></th><th>Reranked<small>matching head</small></th>"
    notes = "".join(f"<li><b>{letter}</b> {escape(protocol)}</li>" for protocol, letter in letters.items())
    head = f"<thead><tr>{titles}<th>Aim</th><th>Protocol</th></tr></thead>"
    table = scrolling("Results", f"{head}<tbody>{''.join(rows)}</tbody>", columns=4)
    return f'{table}<ul class="notes">{notes}</ul>'


def stage(place: int, data: Stage) -> str:
    moved, kept = sum(data["trained"].values()), sum(data["frozen"].values())
    share = moved / max(moved + kept, 1)
    proof = f'<p class="proof">{mark(True)} {escape(data["proof"])}</p>' if "proof" in data else ""
    chart = loss_chart(f"Losses of the stage {data['name']}", data["losses"]) if any(data["losses"].values()) else ""
    return (
        f'<article class="stage"><div><h3><span class="place">{place}</span>{escape(data["name"])}</h3>'
        f'<p>{escape(data["goal"])}</p><p class="soft">{data["steps"]:,} steps in {duration(data["seconds"])}</p>'
        f'<div class="share" role="img" aria-label="{share:.0%} of the parameters trained">'
        f'<span style="width:{share:.1%}"></span></div><div class="parts">{parts("Trained", data["trained"])}'
        f"{parts('Frozen', data['frozen'])}</div>{proof}</div>{chart}</article>"
    )


def parts(title: str, groups: dict[str, int]) -> str:
    names = {name: re.sub(r"([._])", r"\1<wbr>", escape(name)) for name in groups}  # where a long name may break
    rows = "".join(f"<li><span>{names[name]}</span> <b>{count(size)}</b></li>" for name, size in groups.items())
    return f"<div><h4>{title} <b>{count(sum(groups.values()))}</b></h4><ul>{rows or '<li>nothing</li>'}</ul></div>"


def forgetting(stages: Sequence[Stage], scores: Sequence[Score]) -> str:
    head = "".join(f"<th>after {escape(data['name'])}</th>" for data in stages)
    rows = []
    for score in scores:
        unit, cells, before = score.get("unit", "share"), [], None
        for value in score["after"]:
            change = 0.0 if value is None or before is None else value - before
            better = (change < 0) == score.get("lower_is_better", False)
            size = number(abs(change), unit).removesuffix("%")  # of a share: percentage points
            kind, sign = "up" if better else "down", "+" if change > 0 else "−"
            delta = f'<small class="{kind}">{sign}{size}</small>' if float(size) else ""
            cells.append(f"<td>{'–' if value is None else number(value, unit)}{delta}</td>")
            before = before if value is None else value
        rows.append(f'<tr><th scope="row">{escape(score["name"])}</th>{"".join(cells)}</tr>')
    content = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return scrolling("Learned and forgotten", content, columns=len(stages), kind="even")


def search(data: Search) -> str:
    before, after = (place_of_right(found) for found in (data["first"], data["reranked"]))
    shown = image(data["picture"], data.get("text", "the query")) if "picture" in data else ""
    title = f"<q>{escape(data['text'])}</q>" if "text" in data else "This picture"
    note = f'<p class="soft">{escape(data["note"])}</p>' if "note" in data else ""
    return (
        f'<article class="search"><header>{shown}<h3>{title}</h3>'
        f'<p class="soft">the right one: {before} → {after}</p>{note}</header>'
        f"<h4>First stage</h4>{hits(data['first'])}<h4>Reranked</h4>{hits(data['reranked'])}</article>"
    )


def place_of_right(found: Sequence[Hit]) -> str:
    return next((f"#{place}" for place, hit in enumerate(found, 1) if hit["right"]), f"not in the first {len(found)}")


def hits(found: Sequence[Hit]) -> str:
    rows = []
    scores = told_apart([hit["score"] for hit in found])
    for place, (hit, score) in enumerate(zip(found, scores), 1):
        text = hit.get("text", "")
        shown = image(hit["picture"], text) if "picture" in hit else f"<span>{escape(text)}</span>"
        kind, tick = ("right", f" {mark(True)}") if hit["right"] else ("other", "")
        rows.append(f'<li class="{kind}">{shown}<small>{place}. {minus(score)}{tick}</small></li>')
    kind = "pictures" if found and "picture" in found[0] else "texts"
    return f'<ol class="hits {kind}">{"".join(rows)}</ol>'


def swap(data: Swap) -> str:
    def cells(scores: tuple[float, float]) -> list[str]:
        kinds = ["chosen" if score == max(scores) else "other" for score in scores]
        return [f'<td class="{kind}">{signed(score)}</td>' for kind, score in zip(kinds, scores)]

    texts = differing(data["true"], data["false"])
    columns = [data["embedding"], data["matching"]]
    rows = "".join(
        f'<tr><th scope="row"><small>{kind}</small>{text}</th>{"".join(row)}</tr>'
        for kind, text, row in zip(("true", "false"), texts, zip(*map(cells, columns)))
    )
    verdicts = "".join(f"<td>{mark(true > false)}</td>" for true, false in columns)
    return (
        f'<article class="swap">{image(data["picture"], data["true"])}<table>'
        f"<thead><tr><th></th><th>Embedding</th><th>Matching</th></tr></thead><tbody>{rows}"
        f'<tr><th scope="row"><small>prefers the true one</small></th>{verdicts}</tr></tbody></table></article>'
    )


def caption(data: Caption) -> str:
    verdict = f"{mark(data['right'])} " if "right" in data else ""
    reference = f"reference: {data['reference']}" if "reference" in data else ""
    return figure(data["picture"], data["text"], f"{verdict}{escape(data['text'])}<small>{escape(reference)}</small>")


def drawing(data: Drawing) -> str:
    judged = f"{mark(data['right'])} " if "right" in data else ""
    verdict = f"<small>{judged}{escape(data.get('verdict', ''))}</small>"
    kind = "plain" if data.get("right", True) else "faulty"
    return figure(data["picture"], data["text"], f"{escape(data['text'])}{verdict}", kind)


def figure(picture: Picture, description: str, words: str, kind: str = "plain") -> str:
    return f'<figure class="{kind}">{image(picture, description)}<figcaption>{words}</figcaption></figure>'


def found_all(found: Sequence[Found], query: str) -> list[str]:
    """What was found, best first; scores that differ look different."""
    cosines = told_apart([one["first"] for one in found])
    matches = chances([one.get("match") for one in found])
    return [found_one(place, *one, query) for place, one in enumerate(zip(found, map(minus, cosines), matches), 1)]


def found_one(place: int, data: Found, cosine: str, chance: str, query: str) -> str:
    name, shown = escape(data["name"]), image(data["picture"], data["name"])
    if "heatmap" in data:
        shown += image(data["heatmap"], f"where {data['name']} speaks for or against {query}")
    if "file" in data:
        name = f'<a href="{escape(data["file"])}">{name}</a>'
    match = f" <span>match <b>{escape(chance)}</b></span>" if "match" in data else ""
    return (
        f'<article class="found"><header><span class="place">{place}</span><h3>{name}</h3></header>'
        f'<div class="pair">{shown}</div><p>{weighted(data.get("words", []))}</p>'
        f'<p class="soft"><span>cosine <b>{cosine}</b></span>{match}</p></article>'
    )


def weighted(words: Sequence[tuple[str, float]]) -> str:
    """Words on a ground that says how much each speaks for the match or against it, and by how much in its title."""
    most = max((abs(weight) for _, weight in words), default=0) or 1
    return " ".join(
        f'<span class="word {"pro" if weight > 0 else "con"}" style="--weight:{abs(weight) / most:.0%}" title="{signed(weight)}">'
        f"{escape(word)}</span>"
        for word, weight in words
    )


def listed(lines: Sequence[str]) -> str:
    return f'<ul class="lines">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def table(data: Grid) -> str:
    """Column titles, rows of text and notes; a line break in a cell sets what follows it smaller."""

    def cell(text: str) -> str:
        first, *rest = text.split("\n")
        return escape(first) + "".join(f"<small>{escape(line)}</small>" for line in rest)

    def data_cell(text: str) -> str:
        kind = ' class="words"' if max(map(len, text.split("\n"))) > WORDS else ""
        return f"<td{kind}>{cell(text)}</td>"

    head = "".join(f"<th>{cell(title)}</th>" for title in data["columns"])
    rows = "".join(
        f'<tr><th scope="row">{cell(row[0])}</th>{"".join(map(data_cell, row[1:]))}</tr>' for row in data["rows"]
    )
    content = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.get("notes", []))
    below = f'<ul class="notes">{notes}</ul>' if notes else ""
    return scrolling(escape(data["title"]), content, columns=len(data["columns"]) - 1, kind="sheet") + below
