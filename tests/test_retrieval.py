"""Retrieval's rule against plain loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.retrieval import row_similarity, similarity

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
