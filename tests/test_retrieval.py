"""Retrieval's rule against plain loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.retrieval import Combine, ScoringRule, rerank, row_similarity, similarity

# How many vectors the items of either side have; None is one, without a dimension for it.
SETS = [(None, None), (3, None), (None, 2), (3, 2)]


def items(count: int, vectors: int | None) -> Tensor:
    shape = (count, 8) if vectors is None else (count, vectors, 8)
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)


def best(a: Tensor, b: Tensor) -> float:
    return max(float(x @ y) for x in a.reshape(-1, 8) for y in b.reshape(-1, 8))


@pytest.mark.parametrize("gradient", [False, True], ids=["plain", "gradient"])
@pytest.mark.parametrize("vectors", SETS, ids=str)
def test_of_several_vectors_the_best_counts(vectors: tuple[int | None, int | None], gradient: bool) -> None:
    a, b = items(4, vectors[0]).requires_grad_(gradient), items(5, vectors[1])
    loop = torch.tensor([[best(x, y) for y in b] for x in a], dtype=torch.float64)
    found = similarity(a, b)
    assert found.requires_grad == gradient and torch.allclose(found, loop)
    out = torch.empty(4, 5, dtype=torch.float64)
    assert similarity(a.detach(), b, out=out) is out and torch.allclose(out, loop)


@pytest.mark.parametrize("vectors", SETS, ids=str)
def test_rows_are_compared_with_their_own_others(vectors: tuple[int | None, int | None]) -> None:
    rows, others = items(4, vectors[0]), torch.stack([items(3, vectors[1]) for _ in range(4)])
    loop = torch.tensor([[best(x, y) for y in some] for x, some in zip(rows, others)], dtype=torch.float64)
    assert torch.allclose(row_similarity(rows, others), loop)


@pytest.mark.parametrize("vectors", SETS, ids=str)
def test_only_the_best_vectors_learn(vectors: tuple[int | None, int | None]) -> None:
    a, b = items(4, vectors[0]).requires_grad_(), items(1, vectors[1]).requires_grad_()
    similarity(a, b).sum().backward()
    assert a.grad is not None and (a.grad.reshape(4, -1, 8).abs().sum(-1) > 0).sum(1).eq(1).all()


def test_similarity_is_float32_under_autocast() -> None:
    a, b = items(4, 3).float(), items(4, None).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (a[:, 0] @ b.T).dtype == torch.bfloat16  # autocast is on, and would have rounded
        inside = similarity(a, b), row_similarity(a, b[:, None])
    assert torch.equal(inside[0], similarity(a, b)) and torch.equal(inside[1], row_similarity(a, b[:, None]))
    half = a.bfloat16(), b.bfloat16()
    assert torch.equal(similarity(*half), similarity(half[0].float(), half[1].float()))


# The second stage.


def nearest(queries: torch.Tensor, gallery: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
    top = similarity(queries, gallery).topk(k)
    return [list(zip(rows, scores)) for rows, scores in zip(top.indices.tolist(), top.values.tolist())]


@pytest.mark.parametrize("combine", ["replace", "sum"])
def test_two_stages_equal_a_plain_loop(combine: Combine) -> None:
    queries, gallery, logits = items(4, None).float(), items(20, None).float(), torch.randn(4, 20)
    found = rerank(
        nearest(queries, gallery, 9),
        lambda pairs: torch.stack([logits[pair] for pair in pairs]),
        ScoringRule(k=6, combine=combine, scale=0.5),
        top_k=9,
    )
    for q, hits in enumerate(found):
        first = {row: float(queries[q] @ gallery[row]) for row in range(20)}
        by_first = sorted(first, key=lambda row: -first[row])
        key = {row: float(logits[q, row]) * (0.5 if combine == "sum" else 1) for row in by_first[:6]}
        if combine == "sum":
            key = {row: first[row] + key[row] for row in key}
        assert [hit.row for hit in hits] == sorted(key, key=lambda row: -key[row]) + by_first[6:9]
        assert [hit.first_score for hit in hits] == pytest.approx([first[hit.row] for hit in hits], abs=1e-6)
        for hit in hits[:6]:
            assert hit.rerank_score == pytest.approx(float(logits[q, hit.row].sigmoid()))
            assert hit.score == pytest.approx(key[hit.row] if combine == "sum" else hit.rerank_score, abs=1e-6)
        assert all(hit.rerank_score is None and hit.score == hit.first_score for hit in hits[6:])


def test_order_holds_where_probabilities_saturate() -> None:
    logits = {0: 40.0, 1: 60.0, 2: 50.0}
    found = rerank(
        [[(0, 0.3), (1, 0.2), (2, 0.1)]],
        lambda pairs: torch.tensor([logits[row] for _, row in pairs]),
        ScoringRule(k=3),
        top_k=3,
    )
    assert [hit.row for hit in found[0]] == [1, 2, 0]
