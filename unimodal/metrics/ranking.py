"""Where each query's answer stands: ranks, candidates, and two-stage search.

A query gets one number, the 1-based rank of its *best* relevant item: a caption has one relevant image, an image has
several relevant captions and any of them will do.

Ties count against the model: a non-relevant item that scores as high as the relevant one is placed before it.
Low-precision scores tie often, and a strict ">" turns those ties into recall. So embeddings are compared in float32,
even inside an autocast region.

Legend: I images, C captions, Q queries, G gallery items, R relevant items of a query, N bridge queries, E embedding dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimodal import arguments
from unimodal.retrieval import similarity


@dataclass(frozen=True)
class Candidates:
    """One direction of a search: where the best relevant item stands, and the top k to rerank.

    Attributes:
        rank: [Q] 1-based pessimistic rank of the best relevant item in the whole gallery.
        index: [Q, k] gallery rows, best first; all of them where the gallery is smaller than the k asked for.
        scores: [Q, k] first-stage scores of those rows.
        relevant: [Q, k] which of them are right answers.
    """

    rank: Tensor
    index: Tensor
    scores: Tensor
    relevant: Tensor


def ranks_from_scores(scores: Tensor, relevant: Tensor) -> Tensor:
    """Pessimistic rank of the best relevant item of each query.

    Args:
        scores: [Q, G], higher is better.
        relevant: [Q, G] bool, at least one True in each row.

    Returns:
        [Q] long: 1 + the number of non-relevant items that score at least as high as the best relevant one.

    Raises:
        TypeError: for scores that are no numbers, or relevance that is not bool.
        ValueError: for empty or unlike shapes, NaN scores, a query without a relevant item.
    """
    scores = _scores(scores, "scores")
    relevant = _flags(relevant, "relevant").to(scores.device)
    if scores.ndim != 2 or scores.numel() == 0 or scores.shape != relevant.shape:
        raise ValueError(
            f"got scores {list(scores.shape)} and relevant {list(relevant.shape)}; "
            "expected the same [queries, gallery] for both, at least one of each"
        )
    _refuse_nan(scores)
    if not (answered := relevant.any(dim=1)).all():
        raise ValueError(
            f"query {first_row(~answered)} has no relevant item ({(~answered).sum()} of {len(scores)} queries have none); "
            "drop such queries, or add their items to the gallery"
        )
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)  # [Q, 1]
    return 1 + ((scores >= best) & ~relevant).sum(dim=1)


def candidates_from_scores(scores: Tensor, relevant: Tensor, k: int) -> Candidates:
    """As `ranks_from_scores`, with the top k kept for `second_stage`: for systems that score pairs without embeddings."""
    k = arguments.integer(k, "k", least=0)
    scores = _scores(scores, "scores")
    relevant = _flags(relevant, "relevant").to(scores.device)
    rank = ranks_from_scores(scores, relevant)
    values, index = _top(scores, min(k, scores.shape[1]))
    return Candidates(rank=rank, index=index, scores=values, relevant=relevant.gather(1, index))


@torch.no_grad()
def first_stage(
    image: Tensor,
    text: Tensor,
    text_image_id: Tensor,
    *,
    image_id: Tensor | None = None,
    k: int = 0,
    chunk: int = 1024,
) -> tuple[Candidates, Candidates]:
    """Searches both ways on embeddings, `chunk` queries at a time: memory grows with the gallery, never with Q x G.

    Args:
        image: [I, E], or [I, N, E] with one vector per bridge query, scored by the best of them (BLIP-2,
            arXiv:2301.12597).
        text: [C, E]. Normalise both sides for cosine scores; the product is taken as it comes.
        text_image_id: [C] id of the image that each caption belongs to.
        image_id: [I] id of each image, distinct integers in any order; row numbers if None.
        k: how many candidates per query to keep for `second_stage`; 0 keeps ranks only.
        chunk: queries per block of scores.

    Returns:
        (text to image, image to text).

    Raises:
        TypeError: for embeddings or ids that are no numbers.
        ValueError: for empty or unlike shapes, non-finite embeddings or such as overflow when multiplied, repeated image
            ids, a caption without image or an image without caption.
    """
    k, chunk = arguments.integer(k, "k", least=0), arguments.integer(chunk, "chunk")
    image, text = check_embeddings(image, text)
    image_id = torch.arange(len(image)) if image_id is None else arguments.integers(image_id, "image_id")
    image_id, text_image_id = (
        image_id.to(image.device),
        arguments.integers(text_image_id, "text_image_id").to(image.device),
    )
    _check_ids(image_id, text_image_id, len(image), len(text))
    with torch.autocast(image.device.type, enabled=False):
        return (
            _search(text, image, text_image_id, image_id, k, chunk),
            _search(image, text, image_id, text_image_id, k, chunk),
        )


def second_stage(candidates: Candidates, scores: Tensor) -> Tensor:
    """Ranks after a second stage has scored each query's candidates again (`unimodal.retrieval.combined`).

    All other items stay below the top k in their first order. Published code gives them one constant
    instead, and its R@K holds only up to K = k; here every rank exists, so R@K holds for every K.

    Ties count against the model in the second stage, and at the border of the first: an item that needs luck among
    equals to enter the top k is held to be outside.

    Args:
        candidates: one direction of `first_stage`, with k >= 1.
        scores: [Q, k] what orders the pairs (query, candidates.index), higher is better.

    Returns:
        [Q] long, ranks of the best relevant item.

    Raises:
        ValueError: for an unlike shape, NaN scores, or no candidates.
    """
    if not isinstance(candidates, Candidates):
        raise TypeError(
            arguments.refused("candidates", "Candidates of one direction", candidates, "first_stage gives two")
        )
    scores = _scores(scores, "scores").to(candidates.scores.device).float()
    if scores.shape != candidates.scores.shape or scores.numel() == 0:
        raise ValueError(
            f"got scores {list(scores.shape)} for candidates {list(candidates.scores.shape)}; expected one "
            "score per candidate and at least one candidate (first_stage(..., k=...) keeps them)"
        )
    _refuse_nan(scores)
    rank = candidates.rank.clone()
    found = candidates.rank <= scores.shape[1]  # the others have no relevant item to lift
    if found.any():
        rank[found] = ranks_from_scores(scores[found], candidates.relevant[found])
    return rank


@torch.no_grad()
def text_to_text(text: Tensor, text_image_id: Tensor, *, k: int = 0, chunk: int = 1024) -> Candidates:
    """Searches captions by captions: relevant are the other captions of the same image, and the query is no answer to itself.

    Args:
        text: [C, E].
        text_image_id: [C] id of the image that each caption belongs to.
        k: how many candidates per query to keep; 0 keeps ranks only.
        chunk: queries per block of scores.

    Raises:
        ValueError: for empty or unlike shapes, non-finite embeddings or such as overflow when multiplied, or a caption that
            is the only one of its image.
    """
    k, chunk = arguments.integer(k, "k", least=0), arguments.integer(chunk, "chunk")
    text, _ = check_embeddings(text, text, "text")
    text_image_id = arguments.integers(text_image_id, "text_image_id", len(text)).to(text.device)
    _, image, count = text_image_id.unique(return_inverse=True, return_counts=True)
    if (alone := count[image] < 2).any():
        raise ValueError(
            f"caption {first_row(alone)} is the only one of its image ({alone.sum()} of {len(text)} captions are), so it has no "
            "other caption to find; leave text-to-text out, or drop such images"
        )
    with torch.autocast(text.device.type, enabled=False):
        return _search(text, text, text_image_id, text_image_id, min(k, len(text) - 1), chunk, without_self=True)


def _search(
    query: Tensor,
    gallery: Tensor,
    query_id: Tensor,
    gallery_id: Tensor,
    k: int,
    chunk: int,
    *,
    without_self: bool = False,
) -> Candidates:
    k = min(k, len(gallery))
    positives, real = _positives(query_id, gallery_id, without_self)  # [Q, R]
    parts: list[tuple[Tensor, ...]] = []
    block = query.new_empty(min(chunk, len(query)), len(gallery))  # one for all: fresh memory costs as much as top-k
    for rows in torch.arange(len(query), device=query.device).split(chunk):
        scores = similarity(query[rows], gallery, out=block[: len(rows)])  # [chunk, G]
        if without_self:
            scores[torch.arange(len(rows)), rows] = -torch.inf
        own = scores.gather(1, positives[rows]).masked_fill(~real[rows], -torch.inf)  # [chunk, R]
        best = own.amax(dim=1, keepdim=True)
        values, index = _top(scores, k)
        relevant = query_id[rows, None] == gallery_id[index]
        # Whatever reaches a best answer that beats the last candidate is a candidate itself; only the other queries need
        # the whole gallery. int32 sums of booleans are several times faster than int64 ones.
        rank = 1 + ((values >= best) & ~relevant).sum(dim=1)
        deep = (best <= values[:, -1:]).squeeze(1) if k else torch.ones_like(rank, dtype=torch.bool)
        if deep.any():
            reach = (scores[deep] >= best[deep]).sum(dim=1, dtype=torch.int32)
            rank[deep] = 1 + reach - (own[deep] >= best[deep]).sum(dim=1)
        parts.append((rank, index, values, relevant))
    return Candidates(*map(torch.cat, zip(*parts)))


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row of scores [Q, G] and their places, best first, equal ones in the order of their places."""
    more = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    index = more.indices[:, :k].sort(dim=1).values
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    if 0 < k < more.values.shape[1] and (tied := more.values[:, k - 1] == more.values[:, k]).any():
        # Which of the equal ones at the border are among the k is topk's own choice.
        whole = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = whole.values[:, :k], whole.indices[:, :k]
    return values, index


def _positives(query_id: Tensor, gallery_id: Tensor, without_self: bool) -> tuple[Tensor, Tensor]:
    """Gallery rows of each query's relevant items [Q, R], and which entries are real: queries have different numbers."""
    gallery_id, order = gallery_id.sort(stable=True)
    first, last = (torch.searchsorted(gallery_id, query_id, right=right) for right in (False, True))
    places = first[:, None] + torch.arange(int((last - first).max()), device=query_id.device)
    real = places < last[:, None]
    rows = order[places.clamp(max=len(order) - 1)]
    if without_self:
        real &= rows != torch.arange(len(query_id), device=query_id.device)[:, None]
    return rows, real


def check_embeddings(
    image: Any, text: Any, image_name: str = "image", text_name: str = "text"
) -> tuple[Tensor, Tensor]:
    """Both sides as float32 tensors on the device of the first; refuses what cannot be ranked. The names are what messages call them."""
    image, text = (_floats(x, f"{name} embeddings") for name, x in ((image_name, image), (text_name, text)))
    shapes = f"{image_name}s {list(image.shape)} and {text_name}s {list(text.shape)}"
    if image.ndim not in (2, 3) or text.ndim not in (2, 3) or image.shape[-1] != text.shape[-1]:
        raise ValueError(f"got {shapes}; expected [I, E] or [I, N, E] and [C, E] with one E")
    if image.numel() == 0 or text.numel() == 0:
        raise ValueError(f"got {shapes}; nothing to rank. Was the split empty?")
    for name, x in ((image_name, image), (text_name, text)):
        if not (finite := x.flatten(1).isfinite().all(dim=1)).all():
            raise ValueError(
                f"{name} embedding {first_row(~finite)} has NaN or infinite values ({(~finite).sum()} of {len(x)} rows "
                "do), so ranks would mean nothing. Look at the model's output for that item"
            )
    longest = [x.float().norm(dim=-1).max() for x in (image, text)]
    if not (longest[0] * longest[1]).isfinite():  # it bounds every score, so no block needs a look of its own
        raise ValueError(
            f"embeddings of length {longest[0]:.3g} and {longest[1]:.3g} overflow when multiplied; normalise both sides"
        )
    return image.float(), text.float().to(image.device)


def _floats(value: Any, name: str) -> Tensor:
    """Numbers with a fraction, or whole ones in float32, as a tensor."""
    found = arguments.tensor(value, name, "numbers")
    if found.dtype == torch.bool:
        raise TypeError(arguments.refused(name, "numbers", value))
    return found if found.is_floating_point() else found.float()


def _scores(value: Any, name: str) -> Tensor:
    found = _floats(value, name)
    if found.ndim != 2:
        raise ValueError(arguments.refused(name, "scores [queries, gallery]", value))
    return found


def _flags(value: Any, name: str) -> Tensor:
    found = arguments.tensor(value, name, "True and False [queries, gallery]")
    if found.dtype != torch.bool:
        raise TypeError(arguments.refused(name, "True and False [queries, gallery]", value))
    return found


def _check_ids(image_id: Tensor, text_image_id: Tensor, images: int, texts: int) -> None:
    if image_id.shape != (images,) or text_image_id.shape != (texts,):
        raise ValueError(
            f"got image ids {list(image_id.shape)} and text image ids {list(text_image_id.shape)} for {images} images "
            f"and {texts} texts; expected one id per embedding"
        )
    if (distinct := len(image_id.unique())) != images:
        raise ValueError(f"got {images} images with {distinct} distinct ids; pass each image once")
    if not (known := torch.isin(text_image_id, image_id)).all():
        raise ValueError(
            f"caption {first_row(~known)} belongs to image id {text_image_id[~known][0]}, which is not in the gallery "
            f"({(~known).sum()} captions have no image); pass that image, or drop the caption"
        )
    if not (captioned := torch.isin(image_id, text_image_id)).all():
        raise ValueError(
            f"image id {image_id[~captioned][0]} has no caption ({(~captioned).sum()} images have none), so it has no "
            "image-to-text rank; drop it from the images"
        )


def _refuse_nan(scores: Tensor) -> None:
    if (nan := scores.isnan().any(dim=1)).any():
        raise ValueError(
            f"scores of query {first_row(nan)} contain NaN ({nan.sum()} of {len(scores)} queries do), so ranks would mean "
            "nothing. Look at the model's output for that query"
        )


def first_row(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])
