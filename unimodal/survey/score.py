"""Ranking by a system's own rule: embeddings, every pair, or a shortlist of either scored again. In pieces, so that the result does not
depend on their size; texts of a length together, so that little padding is read.

Legend: I images, C captions, Q queries, k candidates, P pairs, E embedding width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unimodal.metrics import Candidates, first_stage, ranks_from_scores, second_stage
from unimodal.onednn import inference
from unimodal.retrieval import combined
from unimodal.systems import Images, Scoring, System, Texts
from unimodal.systems.base import State

PAIRS = 256  # scored at a time: of thousands, the processor spends half of its time on fresh pages for the intermediate tensors
ITEMS = 256  # read at a time


@dataclass(frozen=True)
class Ranking:
    """Ranks of each query's best answer, both ways: first, and reranked where the rule says so; None for a direction that the system
    does not serve.

    Attributes:
        t2i, i2t: [C] and [I] of the first stage.
        t2i_reranked, i2t_reranked: the same after reranking.
    """

    t2i: Tensor
    i2t: Tensor | None
    t2i_reranked: Tensor | None = None
    i2t_reranked: Tensor | None = None


@inference()
def embeddings(system: System, images: Images, texts: Texts) -> tuple[Tensor, Tensor]:
    """Image embeddings [I, E] or [I, N, E] and text embeddings [C, E]."""
    system.eval()
    return (
        torch.cat([system.embed_images(images.select(rows)) for rows in _pieces(len(images.tokens), ITEMS)]),
        torch.cat([system.embed_texts(texts.select(rows)) for rows in _pieces(len(texts.ids), ITEMS)]),
    )


class Piece(NamedTuple):
    """The state of some of the texts: those in these rows [M]."""

    rows: Tensor
    state: State


@inference()
def states(system: System, images: Images, texts: Texts) -> tuple[State, list[Piece]]:
    """What pair scores need of all images and texts, each read once; texts of about one length in a piece, without the padding that none of
    them needs."""
    system.eval()
    image = [system.image_state(images.select(rows)) for rows in _pieces(len(images.tokens), ITEMS)]
    lengths = ((torch.arange(texts.mask.shape[1]) + 1) * texts.mask).amax(1)
    pieces = []
    for rows in lengths.argsort(stable=True).split(ITEMS):
        some = Texts(*(x[rows, : lengths[rows].max()] for x in texts))
        pieces.append(Piece(rows, system.text_state(some)))
    return tuple(map(torch.cat, zip(*image))), pieces


@inference()
def pair_scores(
    system: System,
    images: State,
    texts: Sequence[Piece],
    image_index: Tensor,
    text_index: Tensor,
    *,
    size: int = PAIRS,
) -> Tensor:
    """Scores [P] of the pairs (image_index[p], text_index[p]), `size` at a time."""
    scores = torch.empty(len(image_index))
    count = sum(len(rows) for rows, _ in texts)
    for rows, state in texts:
        place = torch.full((count,), -1)  # of each text in the piece
        place[rows] = torch.arange(len(rows))
        for pairs in (place[text_index] >= 0).nonzero()[:, 0].split(size):
            i, t = image_index[pairs], place[text_index[pairs]]
            scores[pairs] = system.score_pairs(tuple(x[i] for x in images), tuple(x[t] for x in state)).float()
    return scores


def scored_again(system: System, scoring: Scoring) -> int:
    """How many of the first candidates are scored again as pairs.

    Raises:
        ValueError: all pairs are to be scored by a system that scores none.
    """
    if scoring.first == "embed":
        return scoring.k if system.scores_pairs else 0
    if not system.scores_pairs:
        raise ValueError(
            f"scoring.first is 'pair', but {type(system).__name__} scores no pairs; set it to 'embed', or implement score_pairs"
        )
    return 0


def rank(
    system: System,
    scoring: Scoring,
    images: Images,
    texts: Texts,
    image_id: Tensor,
    text_image_id: Tensor,
    *,
    shortlist: tuple[Tensor, Tensor] | None = None,
    size: int = PAIRS,
) -> Ranking:
    """Rank all images for every text and all texts for every image.

    Args:
        system: what ranks.
        scoring: by which rule.
        images, texts: of the split.
        image_id: [I], distinct.
        text_image_id: [C] the image that each caption belongs to.
        shortlist: embeddings of the images and the texts of the system that `scoring.shortlist` names.
        size: pairs scored at a time.
    """
    both, k = scoring.directions == "both", scored_again(system, scoring)
    state = states(system, images, texts) if scoring.first == "pair" or k else None
    if scoring.first == "pair":
        assert state is not None
        scores = all_pairs(system, *state, size=size)  # [I, C]
        relevant = image_id[:, None] == text_image_id[None]
        return Ranking(ranks_from_scores(scores.T, relevant.T), ranks_from_scores(scores, relevant) if both else None)
    if scoring.shortlist is not None and shortlist is None:
        raise ValueError(
            f"scoring.shortlist is {scoring.shortlist!r}: pass the embeddings of that system as the shortlist"
        )
    image, text = shortlist or embeddings(system, images, texts)
    first = first_stage(image, text, text_image_id, image_id=image_id, k=k)
    again: list[Tensor | None] = [None, None]
    if state is not None:
        for way in range(1 + both):
            again[way] = _again(system, state, first[way], scoring, image_queries=way == 1, size=size)
    return Ranking(first[0].rank, first[1].rank if both else None, again[0], again[1])


@inference()
def all_pairs(system: System, images: State, texts: Sequence[Piece], *, size: int = PAIRS) -> Tensor:
    """Scores [I, C] of every image with every text, in blocks of `size` pairs."""
    tall = max(1, int(size**0.5))
    scores = torch.empty(len(images[0]), sum(len(rows) for rows, _ in texts))
    for i in _pieces(len(images[0]), tall):
        block = tuple(x[i] for x in images)
        for rows, state in texts:
            for t in _pieces(len(rows), max(1, size // tall)):
                scores[i[:, None], rows[t]] = system.score_matrix(block, tuple(x[t] for x in state)).float()
    return scores


def _again(
    system: System,
    state: tuple[State, list[Piece]],
    first: Candidates,
    scoring: Scoring,
    *,
    image_queries: bool,
    size: int,
) -> Tensor:
    """Ranks [Q] after the candidates of each query were scored as pairs."""
    queries = torch.arange(len(first.index))[:, None].expand_as(first.index)
    image, text = (queries, first.index) if image_queries else (first.index, queries)
    scores = pair_scores(system, *state, image.flatten(), text.flatten(), size=size).view_as(first.scores)
    return second_stage(first, combined(scoring, first.scores, scores))


def _pieces(count: int, size: int) -> Iterable[Tensor]:
    return torch.arange(count).split(size)
