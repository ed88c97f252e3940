"""Hard negatives of a whole split, found by the embedding and filtered by a judge, the matching head where there is one.

For each caption the nearest wrong images, for each image the nearest wrong captions. What the embedding finds near is
often right, only not marked so. The rule of Qwen3-VL-Embedding (arXiv 2601.04720, 2026): a query is kept only if a
positive of it scores above a threshold, and a candidate is a hard negative only if it scores below the mean of the
positives plus a margin.

Legend: I images, C captions, P pairs, b queries compared at a time.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from unimodal.data.items import Item
from unimodal.data.pairs import Pairs
from unimodal.retrieval import similarity
from unimodal.search.encoder import Encoder, batches, progress

Judge = Literal["match", "cosine"]


def mine_negatives(
    encoder: Encoder,
    pairs: Pairs,
    *,
    num_negatives: int = 7,
    top_k: int = 50,
    positive_threshold: float = 0.0,
    margin: float = 0.0,
    judge: Judge = "match",
    batch_size: int = 64,
    show_progress: bool | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows for `unimodal.data.negatives.write_negatives`; equal inputs give equal rows.

    Embeddings and the tokens that the matching head reads are held in memory for the whole split.

    Args:
        encoder: the model and its processor.
        pairs: the split.
        num_negatives: hard negatives kept per query, nearest by embedding first.
        top_k: nearest wrong candidates that are judged.
        positive_threshold: t+; a query is kept if its best positive scores above it.
        margin: delta-; a candidate is kept if it scores below the mean of the positives plus this.
        judge: whose scores these are: the matching head's logit (0 is as likely as not), or the cosine.
        batch_size: items read at a time.
        show_progress: a bar on standard error; None shows it on a terminal.

    Raises:
        ValueError: for settings that leave nothing to mine, or the judge `match` without a matching head.
    """
    if not 1 <= num_negatives <= top_k:
        raise ValueError(f"expected 1 <= num_negatives <= top_k, got num_negatives {num_negatives} and top_k {top_k}")
    if judge not in ("match", "cosine"):
        raise ValueError(f"judge: expected 'match' or 'cosine', got {judge!r}")
    if judge == "match":
        encoder.model.head("matching")
    captions = [(i, c) for i in range(len(pairs)) for c in range(len(pairs.captions(i)))]
    image_id = torch.tensor([pairs.image_id(i) for i in range(len(pairs))])
    caption_id = torch.tensor([pairs.image_id(i) for i, _ in captions])
    if len(image_id.unique()) < 2:
        raise ValueError(f"{pairs.name} {pairs.split} shows one image only; hard negatives need at least two")

    def read(count: int, item: Any, what: str) -> tuple[Tensor, list[Tensor]]:
        vectors, tokens = [], []
        for rows in progress(batches(count, batch_size), f"Reading {what}", show_progress):
            encoded = encoder.read([item(row) for row in range(rows.start, min(rows.stop, count))])
            vectors.append(encoded.embedding.cpu())
            tokens += [part.cpu() for part in encoded.tokens] if judge == "match" else []
        return torch.cat(vectors), tokens

    images, image_tokens = read(len(pairs), lambda i: Item(image=pairs.image(i)), "images")
    texts, text_tokens = read(
        len(captions), lambda t: Item(text=pairs.captions(captions[t][0])[captions[t][1]]), "texts"
    )

    def scores(image_rows: Tensor, text_rows: Tensor, cosine: Tensor) -> list[float]:
        """The judge's scores of pairs of rows, [P]."""
        if judge == "cosine":
            return cosine.tolist()
        found = [(image_tokens[i], text_tokens[t]) for i, t in zip(image_rows.tolist(), text_rows.tolist())]
        return encoder.match(found, batch_size=1024).tolist()

    def direction(of_images: bool) -> list[dict[str, Any]]:
        ids, other_ids = (image_id, caption_id) if of_images else (caption_id, image_id)
        out = []
        steps = batches(len(ids), 256)
        for rows in progress(steps, f"Mining {'texts' if of_images else 'images'}", show_progress):
            queries, gallery = (images, texts) if of_images else (texts, images)
            cosine = similarity(queries[rows], gallery)  # [b, C] or [b, I]
            same = ids[rows, None] == other_ids[None]
            near = cosine.masked_fill(same, float("-inf")).topk(min(top_k, len(other_ids)), dim=1).indices
            # Candidates of each query, then its positives, in one list of pairs.
            place, other = [], []
            for row, (candidates, positive) in enumerate(zip(near, same)):
                wrong = candidates[~positive[candidates]]
                both = torch.cat([wrong, positive.nonzero()[:, 0]])
                other.append(both)
                place.append(torch.full_like(both, row))
            query, item = torch.cat(place), torch.cat(other)
            image_rows, text_rows = (query + rows.start, item) if of_images else (item, query + rows.start)
            judged = iter(scores(image_rows, text_rows, cosine[query, item]))
            for row, (positive, both) in enumerate(zip(same, other)):
                scored = [(int(j), round(next(judged), 6)) for j in both]
                right = [(j, score) for j, score in scored if positive[j]]
                limit = sum(score for _, score in right) / len(right) + margin
                wrong_scored = [(j, score) for j, score in scored if not positive[j] and score < limit][:num_negatives]
                if max(score for _, score in right) > positive_threshold and wrong_scored:
                    out.append(_row(rows.start + row, right, wrong_scored, captions, of_images))
        return out

    by_image, by_caption = direction(True), direction(False)
    settings = {
        "num_negatives": num_negatives,
        "top_k": top_k,
        "positive_threshold": positive_threshold,
        "margin": margin,
        "judge": judge,
    }
    header = {
        "model": encoder.fingerprint(),
        "data": {"name": pairs.name, "split": pairs.split, "fingerprint": pairs.fingerprint()},
        "settings": settings,
        "kept": {
            "images": f"{len(by_image)} of {len(pairs)}",
            "captions": f"{len(by_caption)} of {len(captions)}",
        },
    }
    return header, by_image + by_caption


def _row(
    query: int,
    right: list[tuple[int, float]],
    wrong: list[tuple[int, float]],
    captions: list[tuple[int, int]],
    of_image: bool,
) -> dict[str, Any]:
    """One line of the file; `right` has the query's own partners among those that share its image id."""
    if of_image:
        positives = [score for t, score in right if captions[t][0] == query]
        return {"image": query, "positives": positives, "texts": [[*captions[t], score] for t, score in wrong]}
    own = next(score for i, score in right if i == captions[query][0])
    return {"caption": list(captions[query]), "positive": own, "images": [[i, score] for i, score in wrong]}
