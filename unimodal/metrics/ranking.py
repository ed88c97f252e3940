"""Where each query's answer stands: ranks, candidates, and two-stage search.

A query gets one number, the 1-based rank of its *best* relevant item: a caption has one relevant image, an image has
several relevant captions and any of them will do.

Ties count against the model: a non-relevant item that scores as high as the relevant one is placed before it.
Low-precision scores tie often, and a strict ">" turns those ties into recall. So embeddings are compared in float32,
even inside an autocast region.

Legend: I images, C captions, Q queries, G gallery items, N bridge queries, E embedding dim.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .protocol import Combine


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
        ValueError: for empty or unlike shapes, NaN scores, a query without a relevant item.
    """
    if scores.ndim != 2 or scores.numel() == 0 or scores.shape != relevant.shape:
        raise ValueError(
            f"got scores {list(scores.shape)} and relevant {list(relevant.shape)}; "
            "expected the same [queries, gallery] for both, at least one of each"
        )
    _refuse_nan(scores)
    if not (answered := relevant.any(dim=1)).all():
        raise ValueError(
            f"query {_first(~answered)} has no relevant item ({(~answered).sum()} of {len(scores)} queries have none); "
            "drop such queries, or add their items to the gallery"
        )
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)  # [Q, 1]
    return 1 + ((scores >= best) & ~relevant).sum(dim=1)


def candidates_from_scores(scores: Tensor, relevant: Tensor, k: int) -> Candidates:
    """As `ranks_from_scores`, with the top k kept for `rerank`: for systems that score pairs without embeddings."""
    rank = ranks_from_scores(scores, relevant)
    top = scores.topk(min(k, scores.shape[1]), dim=1)
    return Candidates(rank=rank, index=top.indices, scores=top.values, relevant=relevant.gather(1, top.indices))


@torch.no_grad()
def first_stage(
    image: Tensor,
    text: Tensor,
    text_image_id: Tensor,
    *,
    image_id: Tensor | None = None,
    k: int = 0,
    chunk: int = 256,
) -> tuple[Candidates, Candidates]:
    """Searches both ways on embeddings, `chunk` queries at a time: memory grows with the gallery, never with Q x G.

    Args:
        image: [I, E], or [I, N, E] with one vector per bridge query, scored by the best of them (BLIP-2,
            arXiv:2301.12597).
        text: [C, E]. Normalise both sides for cosine scores; the product is taken as it comes.
        text_image_id: [C] id of the image that each caption belongs to.
        image_id: [I] id of each image, distinct integers in any order; row numbers if None.
        k: how many candidates per query to keep for `rerank`; 0 keeps ranks only.
        chunk: queries per block of scores.

    Returns:
        (text to image, image to text).

    Raises:
        ValueError: for empty or unlike shapes, non-finite embeddings, repeated image ids, a caption without image or an
            image without caption.
    """
    image_id = torch.arange(len(image)) if image_id is None else image_id
    image_id, text_image_id = image_id.to(image.device), text_image_id.to(image.device)
    _check_embeddings(image, text)
    _check_ids(image_id, text_image_id, len(image), len(text))
    image, text = image.float(), text.float()
    with torch.autocast(image.device.type, enabled=False):
        return (
            _search(text, image, text_image_id, image_id, k, chunk),
            _search(image, text, image_id, text_image_id, k, chunk),
        )


def rerank(candidates: Candidates, pair_scores: Tensor, combine: Combine) -> Tensor:
    """Ranks after a second stage has scored each query's candidates again.

    Within the top k, pair scores replace the first scores ("replace": ALBEF, arXiv:2107.07651) or are added to them
    ("sum": BLIP-2). All other items stay below the top k in their first order. Published code gives them one constant
    instead, and its R@K holds only up to K = k; here every rank exists, so R@K holds for every K.

    Ties count against the model in the second stage, and at the border of the first: an item that needs luck among
    equals to enter the top k is held to be outside.

    Args:
        candidates: one direction of `first_stage`, with k >= 1.
        pair_scores: [Q, k] scores of the pairs (query, candidates.index), higher is better.
        combine: "replace" or "sum".

    Returns:
        [Q] long, ranks of the best relevant item.

    Raises:
        ValueError: for an unlike shape, NaN scores, no candidates, or an unknown `combine`.
    """
    if combine not in ("replace", "sum"):
        raise ValueError(f"got combine={combine!r}; expected 'replace' or 'sum'")
    if pair_scores.shape != candidates.scores.shape or pair_scores.numel() == 0:
        raise ValueError(
            f"got pair scores {list(pair_scores.shape)} for candidates {list(candidates.scores.shape)}; expected one "
            "score per candidate and at least one candidate (first_stage(..., k=...) keeps them)"
        )
    _refuse_nan(pair_scores)
    scores = pair_scores.float() + candidates.scores if combine == "sum" else pair_scores.float()
    rank = candidates.rank.clone()
    found = candidates.rank <= scores.shape[1]  # the others have no relevant item to lift
    if found.any():
        rank[found] = ranks_from_scores(scores[found], candidates.relevant[found])
    return rank


def _search(query: Tensor, gallery: Tensor, query_id: Tensor, gallery_id: Tensor, k: int, chunk: int) -> Candidates:
    blocks = [
        candidates_from_scores(_similarity(q, gallery), q_id[:, None] == gallery_id, k)  # [chunk, G]
        for q, q_id in zip(query.split(chunk), query_id.split(chunk))
    ]
    fields = ("rank", "index", "scores", "relevant")
    return Candidates(*(torch.cat([getattr(block, field) for block in blocks]) for field in fields))


def _similarity(query: Tensor, gallery: Tensor) -> Tensor:
    """[Q, E] or [Q, N, E] against [G, E] or [G, N, E] -> [Q, G]: the best over N, without [Q, G, N] in memory."""
    return reduce(torch.maximum, (q @ g.T for q in _vectors(query) for g in _vectors(gallery)))


def _vectors(x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if x.ndim == 2 else x.unbind(dim=1)


def _check_embeddings(image: Tensor, text: Tensor) -> None:
    shapes = f"images {list(image.shape)} and texts {list(text.shape)}"
    if image.ndim not in (2, 3) or text.ndim != 2 or image.shape[-1] != text.shape[-1]:
        raise ValueError(f"got {shapes}; expected [I, E] or [I, N, E] and [C, E] with one E")
    if image.numel() == 0 or text.numel() == 0:
        raise ValueError(f"got {shapes}; nothing to rank. Was the split empty?")
    for name, x in (("image", image), ("text", text)):
        if not (finite := x.flatten(1).isfinite().all(dim=1)).all():
            raise ValueError(
                f"{name} embedding {_first(~finite)} has NaN or infinite values ({(~finite).sum()} of {len(x)} rows "
                "do), so ranks would mean nothing. Look at the model's output for that item"
            )


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
            f"caption {_first(~known)} belongs to image id {text_image_id[~known][0]}, which is not in the gallery "
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
            f"scores of query {_first(nan)} contain NaN ({nan.sum()} of {len(scores)} queries do), so ranks would mean "
            "nothing. Look at the model's output for that query"
        )


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])
