"""A search of one state of an index, in two stages.

Legend: Q queries.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor

from unimodal.data.items import Item
from unimodal.retrieval import ScoringRule, depth, rerank
from unimodal.search.catalogue import Id
from unimodal.search.encoder import Encoder, batches, progress
from unimodal.search.filters import Selection, parse
from unimodal.search.state import State


class Hit(TypedDict):
    """One result: see `unimodal.search.Index.search`."""

    id: Id
    document: Any
    metadata: dict[str, Any]
    rank: int
    score: float
    first_score: float
    rerank_score: float | None


def search(
    encoder: Encoder,
    state: State,
    items: Sequence[Item],
    known: Sequence[bool],
    *,
    rule: ScoringRule,
    top_k: int,
    filter: str | None,
    batch_size: int,
    prompt: str | None,
    show_progress_bar: bool | None,
) -> list[list[Hit]]:
    """Hits of each of Q queries, best first; arguments as in `unimodal.search.Index.search`, checked. `known` says of each query
    whether the model knows words of it, `rule` how candidates are scored again."""
    wanted = max(top_k, depth(rule, len(state.catalogue)))
    selection = None if filter is None else Selection(parse(filter, state.catalogue.fields), state.keys)
    partner = {"image": "text", "text": "image"}.get(state.manifest["kind"])
    kinds = [(item.kind, is_known) for item, is_known in zip(items, known)]
    groups = [[row for row in range(len(items)) if kinds[row] == kind] for kind in dict.fromkeys(kinds)]
    steps = [group[rows] for group in groups for rows in batches(len(group), batch_size)]
    hits: list[list[Hit]] = [[] for _ in items]
    for rows in progress(steps, "Searching", show_progress_bar):
        read = encoder.read([items[row] for row in rows], prompt)

        def match(pairs: list[tuple[int, int]], tokens: list[Tensor] = read.tokens) -> Tensor:
            cached = {row: state.parts.tokens(row) for row in {row for _, row in pairs}}
            both = [(tokens[query], cached[row]) for query, row in pairs]
            return encoder.match(both if partner == "image" else [(d, q) for q, d in both], batch_size)

        can_match = encoder.matches and kinds[rows[0]] == (partner, True)
        found = rerank(
            state.stage.candidates(read.embedding.cpu(), wanted, selection),
            match if can_match else None,
            rule,
            top_k=top_k,
            probability=encoder.probability,
        )
        documents = state.catalogue.documents([one.row for some in found for one in some])
        for query, some in zip(rows, found):
            hits[query] = [
                {
                    **documents[one.row]._asdict(),  # type: ignore[typeddict-item]
                    "rank": rank,
                    "score": one.score,
                    "first_score": one.first_score,
                    "rerank_score": one.rerank_score,
                }
                for rank, one in enumerate(some, start=1)
            ]
    return hits
