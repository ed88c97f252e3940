"""What a report holds: plain dictionaries, spelled out for the type checker. An empty list leaves its section out."""

from typing import Literal, NotRequired, TypedDict

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray  # an array is uint8 [H, W, 3]


class Metric(TypedDict):
    """One row of the table of results: either `first` and `reranked` side by side, or one `value`."""

    name: str
    protocol: str  # data set, split, gallery size, captions per image, rule: one line
    first: NotRequired[float]  # by the embedding alone
    reranked: NotRequired[float]  # by the matching head, on what the embedding found
    value: NotRequired[float]
    aims: NotRequired[dict[Literal["first", "reranked", "value"], float]]  # of each number, reached from there on
    unit: NotRequired[Literal["share", "number"]]  # a share is 0-1 and shown as a percentage (the default)


class Stage(TypedDict):
    """One stage of training: what it was for, what moved, what did not, and how its losses fell."""

    name: str
    goal: str  # one sentence
    trained: dict[str, int]  # part of the model -> number of parameters
    frozen: dict[str, int]
    proof: NotRequired[str]  # what was checked at the end, for example "frozen tensors bit-identical"
    steps: int
    seconds: float
    losses: dict[str, list[tuple[int, float]]]  # loss -> (step, value)


class Score(TypedDict):
    """A job's score after each stage, in the order of the stages; None where it was not scored."""

    name: str
    after: list[float | None]
    unit: NotRequired[Literal["share", "number"]]
    lower_is_better: NotRequired[bool]


class Hit(TypedDict):
    """One result of a search: a picture, a text or both."""

    score: float
    right: bool
    picture: NotRequired[Picture]
    text: NotRequired[str]


class Search(TypedDict):
    """The same query before and after reranking, best first. The query is a text, a picture or both."""

    text: NotRequired[str]
    picture: NotRequired[Picture]
    first: list[Hit]
    reranked: list[Hit]
    note: NotRequired[str]  # what to know about this query


class Swap(TypedDict):
    """A picture, its caption, and the caption with one attribute or relation swapped. Scores are (true, false)."""

    picture: Picture
    true: str
    false: str
    embedding: tuple[float, float]
    matching: tuple[float, float]


class Caption(TypedDict):
    """A caption that the model wrote, and whether it is right."""

    picture: Picture
    text: str
    right: NotRequired[bool]  # left out where nothing can judge it
    reference: NotRequired[str]  # a human's or the data set's caption


class Drawing(TypedDict):
    """A picture that the model drew for a text, and the verdict of a checker that reads pixels."""

    text: str
    picture: Picture
    right: NotRequired[bool]
    verdict: NotRequired[str]  # what the checker saw


class Found(TypedDict):
    """One picture that a search of one's own pictures found, and why."""

    name: str
    file: NotRequired[str]  # its address, to open it whole
    picture: Picture
    first: float  # cosine
    match: NotRequired[float]  # match probability, where the matching head judged the pair
    heatmap: NotRequired[Picture]  # red where the picture speaks for the match, blue where against it
    words: NotRequired[list[tuple[str, float]]]  # of the query, each with what the match logit loses without it


class Report(TypedDict):
    """Everything on the page."""

    title: str
    summary: str  # one or two sentences
    facts: dict[str, str]  # about model and data: label -> text
    wall_seconds: float
    peak_memory_mb: float
    metrics: list[Metric]
    stages: list[Stage]
    scores: list[Score]  # learned and forgotten
    searches: list[Search]
    swaps: list[Swap]
    captions: list[Caption]
    drawings: list[Drawing]


class Grid(TypedDict):
    """A table of its own kind: column titles, rows of cells as text (the first names the row), and notes below."""

    title: str
    lead: str
    columns: list[str]
    rows: list[list[str]]
    notes: NotRequired[list[str]]
