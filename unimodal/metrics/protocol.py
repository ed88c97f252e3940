"""What a number means, carried beside the number.

"R@1" is not one metric: gallery size, captions per image, hit rate or recall, and the depth of reranking each move it
by more than the gap between two papers (COCO 1K against 5K: 15 to 25 points). So every result holds a `Protocol`, and
one table never mixes two.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from unimodal import arguments
from unimodal.config import Combine

# How the gallery was searched, as opposed to what was asked of which data: the only fields that a table may let differ.
SEARCH_FIELDS = ("stage", "k", "combine", "match_scale")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conditions under which a result was measured.

    Args:
        dataset, split: their names, as people say them.
        fingerprint: hash of the split's keys and captions; two splits of one name are not one split.
        images, captions: sizes, each the gallery of one direction and the queries of the other.
        captions_per_image: None where images have different numbers of captions.
        folds: 1, or the number of blocks of that size whose results were averaged.
        stage: "first" (embeddings or one pass over all pairs), "reranked", or None where nothing is searched.
        k, combine: depth of reranking, and whether the pair score replaces the first score or is added to it.
        match_scale: what the pair score was multiplied by before it was added; None where nobody said, or it replaces.
        rule: how one answer is judged. "hit" in retrieval; caption metrics write their tokenizer here.
        decoding: how captions were written, "greedy" or "3 beams" for example; None where nothing is written, or nobody said.

    Raises:
        ValueError: for sizes that contradict each other, or a depth without reranking (and the reverse).
    """

    dataset: str
    split: str
    fingerprint: str
    images: int
    captions: int
    captions_per_image: int | None = None
    folds: int = 1
    stage: Literal["first", "reranked"] | None = "first"
    k: int | None = None
    combine: Combine | None = None
    match_scale: float | None = None
    rule: str = "hit"
    decoding: str | None = None

    def __post_init__(self) -> None:
        for name in ("dataset", "split", "fingerprint", "rule"):
            arguments.text(getattr(self, name), name, empty=True)
        for name in ("images", "captions"):
            arguments.integer(getattr(self, name), name, least=-arguments.WIDEST)
        arguments.integer(self.folds, "folds")
        for name in ("captions_per_image", "k"):
            arguments.optional(arguments.integer, getattr(self, name), name, least=-arguments.WIDEST)
        arguments.optional(arguments.number, self.match_scale, "match_scale")
        arguments.optional(arguments.text, self.decoding, "decoding", empty=True)
        if self.images < 1 or self.captions < 1:
            raise ValueError(
                f"got {self.images} images and {self.captions} captions; a protocol needs at least one of each"
            )
        each = self.captions_per_image
        if each is not None and self.images * each != self.captions:
            raise ValueError(
                f"got {self.images} images x {each} captions per image, which is not {self.captions} captions; "
                "correct the counts, or pass captions_per_image=None if images have different numbers"
            )
        arguments.optional(arguments.choice, self.stage, "stage", ("first", "reranked"))
        arguments.optional(arguments.choice, self.combine, "combine", get_args(Combine))
        if self.stage == "reranked" and (self.k is None or self.k < 1 or self.combine is None):
            raise ValueError(
                f"got k={self.k}, combine={self.combine!r}; "
                "a reranked result needs k >= 1 and combine 'replace' or 'sum'"
            )
        if self.stage != "reranked" and (self.k, self.combine) != (None, None):
            raise ValueError(
                f"got k={self.k}, combine={self.combine!r} at stage {self.stage!r}; only stage 'reranked' has them"
            )
        if self.match_scale is not None and self.combine != "sum":
            raise ValueError(
                f"got match_scale={self.match_scale} with combine={self.combine!r}; only 'sum' has a scale"
            )

    def reranked(self, k: int, combine: Combine, match_scale: float | None = None) -> "Protocol":
        """The same question, asked of the first stage's top k again."""
        arguments.choice(combine, "combine", get_args(Combine))
        scale = match_scale if combine == "sum" else None
        return replace(self, stage="reranked", k=k, combine=combine, match_scale=scale)

    def label(self) -> str:
        """One line to print beside a number."""
        each = "" if self.captions_per_image is None else f" ({self.captions_per_image} per image)"
        parts = [
            f"{self.dataset} {self.split} [{self.fingerprint}]",
            f"{self.images} images, {self.captions} captions{each}",
            f"rule: {self.rule}",
        ]
        if self.folds > 1:
            parts.append(f"mean of {self.folds} folds")
        if self.stage == "first":
            parts.append("first stage")
        elif self.stage == "reranked":
            scale = "" if self.match_scale is None else f", match x {self.match_scale:g}"
            parts.append(f"reranked top {self.k} ({self.combine}{scale})")
        if self.decoding is not None:
            parts.append(self.decoding)
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Numbers under a protocol. Subclasses add one float field per number, or override `scores`."""

    protocol: Protocol

    def scores(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "protocol"}

    def to_dict(self) -> dict[str, Any]:
        return {"protocol": asdict(self.protocol), **self.scores()}


def check_protocol(protocol: Any, name: str = "protocol") -> None:
    """Raises:
    TypeError: it is no Protocol.
    """
    if not isinstance(protocol, Protocol):
        advice = "Protocol(dataset=..., split=..., fingerprint=..., images=..., captions=...) makes one"
        raise TypeError(arguments.refused(name, "a Protocol", protocol, advice))


def require_alike(protocols: Sequence[Protocol], *, any_search: bool = False) -> None:
    """Refuses results that do not compare.

    Args:
        any_search: let stage, k, combine and match_scale differ: the same question to the same data, searched in different ways.

    Raises:
        ValueError: naming each field that differs, with the values met.
    """
    any_search = arguments.flag(any_search, "any_search")
    protocols = arguments.listed(protocols, "protocols", "Protocols")
    for i, protocol in enumerate(protocols):
        check_protocol(protocol, f"protocols[{i}]")
    different = []
    for field in fields(Protocol):
        values = list(dict.fromkeys(getattr(p, field.name) for p in protocols))
        if len(values) > 1 and not (any_search and field.name in SEARCH_FIELDS):
            different.append(f"{field.name}: " + " / ".join(map(repr, values)))
    if different:
        raise ValueError(
            f"results under unlike protocols do not compare: {'; '.join(different)}. Print them in separate tables; "
            "where how the gallery was searched is the question, pass any_search=True"
        )


def results_table(rows: Sequence[tuple[str, Result]], *, any_search: bool = False, digits: int = 2) -> str:
    """A Markdown table of named results, headed by the protocol that they share.

    Args:
        rows: (name, result) pairs, one row each, in this order.
        any_search: let stage, k, combine and match_scale differ, and print them as columns.
        digits: decimals.

    Raises:
        ValueError: without rows, for unlike protocols, or for results that hold different numbers.
    """
    rows = arguments.listed(rows, "rows", "(name, result) pairs")
    any_search = arguments.flag(any_search, "any_search")
    digits = arguments.integer(digits, "digits", least=0, most=20)
    for i, row in enumerate(rows):
        pair = isinstance(row, list | tuple) and len(row) == 2
        if not pair or not isinstance(row[0], str) or not isinstance(row[1], Result):
            raise TypeError(arguments.refused(f"rows[{i}]", "a pair (name, result)", row))
    if not rows:
        raise ValueError("got no results; a table needs at least one (name, result) pair")
    shared = rows[0][1].protocol
    columns = list(rows[0][1].scores())
    require_alike([result.protocol for _, result in rows], any_search=any_search)
    for name, result in rows:
        if list(result.scores()) != columns:
            raise ValueError(
                f"got {list(result.scores())} for {name!r}; expected the columns of the first row, {columns}"
            )

    search = SEARCH_FIELDS if any_search else ()
    if any_search:  # how each row was searched stands in the row
        shared = replace(shared, stage=None, k=None, combine=None, match_scale=None)
    lines = [
        f"Protocol: {shared.label()}",
        "",
        _row(["", *search, *columns]),
        _row(["---"] * (1 + len(search)) + ["---:"] * len(columns)),
    ]
    for name, result in rows:
        how = ["-" if (value := getattr(result.protocol, field)) is None else str(value) for field in search]
        lines.append(_row([name, *how, *(f"{value:.{digits}f}" for value in result.scores().values())]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
