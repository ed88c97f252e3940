"""Every query that failed, with what it found instead, and which of these finds are probably right although nobody labelled them.

A find is marked `likely_right` by the text embedding alone, which saw no picture, and without a threshold to choose: some
caption of the found image is at least as near to the query as the nearest other caption of the right image is. Where an image
is the query, a found caption counts if it is as near to one of the image's captions as these are to one another, on average.
It is a hint of where to look, not a judgement: on captions that differ in one word, as the embedded scenes' do, it says too much.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from unimodal.data.pairs import Pairs
from unimodal.retrieval import similarity

Row = dict[str, Any]


def retrieval_errors(
    pairs: Pairs, results: dict[str, Any], text_embedding: Tensor | None, *, shown: int = 5
) -> Iterator[Row]:
    """One row per failed query, captions first: the last stage did not put a right item first.

    Args:
        pairs: the split.
        results: what `Evaluation.retrieval` returned, with candidates.
        text_embedding: [C, E] unit vectors of all captions of the split, in order; None where the model has none, and then nothing is
            marked.
        shown: finds per query, best of the last stage first.

    Returns:
        Rows with `direction`, `query`, `image` (the key of the query's image), `rank_first`, `rank_reranked` (None without
        reranking), `found` and `likely_false_negative`: whether the first find is marked. Each of `found` has `image`,
        `caption` (where captions were searched), `score` (cosine), `match` (logit, or None), `right` and `likely_right`
        (None where the image has one caption only, so that there is nothing to compare with).
    """
    captions = [(i, caption) for i in range(len(pairs)) for caption in pairs.captions(i)]
    owner = torch.tensor([i for i, _ in captions])
    of_image = [(owner == i).nonzero().squeeze(1) for i in range(len(pairs))]
    text = None if text_embedding is None else text_embedding.cpu()
    found = results["candidates"]
    last = "reranked" if "reranked" in results["ranks"] else "first"
    for name, direction in (("t2i", "text_to_image"), ("i2t", "image_to_text")):
        candidates = found[name]
        first = getattr(results["ranks"]["first"], direction).tolist()
        final = getattr(results["ranks"][last], direction).tolist()
        match = found.get(f"{name}_match")
        for query, rank in enumerate(final):
            if rank == 1:
                continue
            image = captions[query][0] if name == "t2i" else query
            own = of_image[image]
            near = _nearness(text, own, query if name == "t2i" else None)
            scores = found.get(f"{name}_final", candidates.scores)[query]
            rows = []
            for place in scores.argsort(descending=True, stable=True)[:shown].tolist():
                item, right = int(candidates.index[query, place]), bool(candidates.relevant[query, place])
                row: Row = {"image": pairs.key(item if name == "t2i" else captions[item][0])}
                if name == "i2t":
                    row["caption"] = captions[item][1]
                row["score"] = float(candidates.scores[query, place])
                row["match"] = None if match is None else float(match[query, place])
                like = near(of_image[item] if name == "t2i" else torch.tensor([item]))
                row["right"] = right
                row["likely_right"] = None if like is None else right or like
                rows.append(row)
            yield {
                "direction": direction,
                "query": captions[query][1] if name == "t2i" else pairs.key(query),
                "image": pairs.key(image),
                "rank_first": first[query],
                "rank_reranked": rank if last == "reranked" else None,
                "found": rows,
                "likely_false_negative": bool(rows and not rows[0]["right"] and rows[0]["likely_right"]),
            }


def _nearness(text: Tensor | None, own: Tensor, query: int | None) -> Callable[[Tensor], bool | None]:
    """Whether one of some captions is as near to the query, a caption or an image, as the captions of its image are to one another; None
    where there is nothing to compare with."""
    if text is None or len(own) < 2:
        return lambda rows: None
    siblings = _nearest_sibling(text[own])
    asked, needed = (text[own], siblings.mean()) if query is None else (text[[query]], siblings[own == query])
    return lambda rows: bool(similarity(asked, text[rows]).max() >= needed)


def _nearest_sibling(text: Tensor) -> Tensor:
    """[n, E] captions of one image -> [n] cosine of each with the nearest of the others; -inf where it is alone."""
    return similarity(text, text).fill_diagonal_(-torch.inf).amax(dim=1)
