"""Retrieval metrics: ranks equal those of a plain loop and torchmetrics' hit rate; ties, float32, reranking and small
galleries obey their stated rules; what cannot be ranked is refused by name.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate

from unimodal.metrics import (
    Candidates,
    Protocol,
    candidates_from_scores,
    first_stage,
    mean_of_folds,
    ranks_from_scores,
    retrieval_metrics,
    second_stage,
    summarise,
)

IMAGES, EACH, DIM = 23, 3, 8


def protocol(images: int = IMAGES, captions: int = IMAGES * EACH) -> Protocol:
    return Protocol(dataset="toy", split="test", fingerprint="0" * 16, images=images, captions=captions)


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers, so that products are exact and ties are many; ids neither sorted nor contiguous."""
    image = torch.randint(-2, 3, (IMAGES, DIM)).float()
    image_id = torch.randperm(1000)[:IMAGES] * 7 - 500
    order = torch.randperm(IMAGES * EACH)
    text = (image.repeat_interleave(EACH, 0) + torch.randint(-2, 3, (IMAGES * EACH, DIM)))[order]
    return image, text, image_id, image_id.repeat_interleave(EACH)[order]


def plain_rank(scores: list[float], relevant: list[bool]) -> int:
    best = max(s for s, r in zip(scores, relevant) if r)
    return 1 + sum(1 for s, r in zip(scores, relevant) if not r and s >= best)


def plain_ranks(scores: torch.Tensor, relevant: torch.Tensor) -> list[int]:
    return [plain_rank(s, r) for s, r in zip(scores.tolist(), relevant.tolist())]


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_ranks_equal_a_plain_loop_in_chunks_of_any_size(data, chunk) -> None:
    image, text, image_id, text_image_id = data
    t2i, i2t = first_stage(image, text, text_image_id, image_id=image_id, chunk=chunk)
    scores, relevant = text @ image.T, text_image_id[:, None] == image_id
    assert t2i.rank.tolist() == plain_ranks(scores, relevant)
    assert i2t.rank.tolist() == plain_ranks(scores.T, relevant.T)


def test_per_query_embeddings_score_by_their_best_vector(data) -> None:
    _, text, image_id, text_image_id = data
    image = torch.randint(-2, 3, (IMAGES, 4, DIM)).float()
    t2i, i2t = first_stage(image, text, text_image_id, image_id=image_id, chunk=5)
    scores = torch.einsum("ind,cd->cin", image, text).amax(dim=2)
    relevant = text_image_id[:, None] == image_id
    assert t2i.rank.tolist() == plain_ranks(scores, relevant)
    assert i2t.rank.tolist() == plain_ranks(scores.T, relevant.T)


def test_row_numbers_stand_in_for_image_ids() -> None:
    result = retrieval_metrics(
        torch.eye(4), torch.eye(4)[[3, 1, 0, 2]], torch.tensor([3, 1, 0, 2]), protocol=protocol(4, 4)
    )
    assert result.rsum == 600 and result.mr_six == 100


def test_recalls_equal_torchmetrics_hit_rate() -> None:
    image, text = torch.randn(40, DIM), torch.randn(200, DIM)
    text_image_id = torch.arange(40).repeat_interleave(5)
    scores = retrieval_metrics(image, text, text_image_id, protocol=protocol(40, 200)).scores()
    similarity, relevant = text @ image.T, text_image_id[:, None] == torch.arange(40)
    for direction, s, r in (("t2i", similarity, relevant), ("i2t", similarity.T, relevant.T)):
        query = torch.arange(len(s))[:, None].expand_as(s)
        for k in (1, 5, 10):
            oracle = RetrievalHitRate(top_k=k)(s.flatten(), r.flatten(), indexes=query.flatten())
            assert scores[f"{direction}_r{k}"] == pytest.approx(100 * oracle.item(), abs=1e-4)


def test_summary_numbers_by_hand() -> None:
    ranks = torch.tensor([1, 2, 6, 11])  # R@1 25, R@5 50, R@10 75
    result = summarise(ranks, torch.tensor([1, 20]), protocol(2, 4))
    assert result.scores() == pytest.approx(
        dict(t2i_r1=25, t2i_r5=50, t2i_r10=75, t2i_medr=4, t2i_meanr=5, t2i_mr=50)
        | dict(i2t_r1=50, i2t_r5=50, i2t_r10=50, i2t_medr=10.5, i2t_meanr=10.5, i2t_mr=50)
        | dict(mr_six=50, rsum=300)
    )
    saved = result.to_dict()
    assert saved["rsum"] == pytest.approx(300) and saved["protocol"]["dataset"] == "toy"


def test_a_model_that_says_the_same_of_everything_is_last() -> None:
    t2i, i2t = first_stage(torch.ones(6, 2), torch.ones(12, 2), torch.arange(6).repeat_interleave(2))
    assert t2i.rank.tolist() == [6] * 12  # behind the 5 other images
    assert i2t.rank.tolist() == [11] * 6  # behind the 10 captions of others, not behind its own second one


def test_ties_among_relevant_items_cost_nothing() -> None:
    scores, relevant = torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert ranks_from_scores(scores, relevant).tolist() == [1]


def test_embeddings_are_compared_in_float32_inside_autocast() -> None:
    image, text = torch.randn(64, 32), torch.randn(64, 32)
    plain = first_stage(image, text, torch.arange(64), k=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = first_stage(image, text, torch.arange(64), k=64)
    for a, b in zip(plain, inside):
        assert b.scores.dtype == torch.float32 and torch.equal(a.scores, b.scores) and torch.equal(a.rank, b.rank)


def test_memory_holds_one_chunk_of_scores_not_all_pairs() -> None:
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend([out.numel()] if isinstance(out, torch.Tensor) else [])
            return out

    with Watch():
        first_stage(torch.randn(300, 4, 2), torch.randn(600, 2), torch.arange(300).repeat_interleave(2), chunk=10)
    assert max(shapes) <= 10 * 600


def test_candidates_are_the_best_rows_and_a_small_gallery_is_kept_whole(data) -> None:
    image, text, image_id, text_image_id = data
    t2i, i2t = first_stage(image, text, text_image_id, image_id=image_id, k=30, chunk=7)
    assert t2i.index.shape == (IMAGES * EACH, IMAGES) and i2t.index.shape == (IMAGES, 30)
    assert torch.equal(i2t.scores, (image @ text.T).sort(dim=1, descending=True).values[:, :30])
    assert torch.equal((image @ text.T).gather(1, i2t.index), i2t.scores)
    assert torch.equal(i2t.relevant, text_image_id[i2t.index] == image_id[:, None])


def plain_rerank(first: list[float], relevant: list[bool], index: list[int], pair: list[float], add: bool) -> int:
    """A whole new score for the gallery: candidates above everything else, the rest as they were."""
    if plain_rank(first, relevant) > len(index):
        return plain_rank(first, relevant)
    final = list(first)
    for j, s in zip(index, pair):
        final[j] = 1e6 + s + (first[j] if add else 0)
    return plain_rank(final, relevant)


@pytest.mark.parametrize("combine", ["replace", "sum"])
@pytest.mark.parametrize("k", [1, 5, 16, 100])
def test_rerank_equals_a_plain_loop(data, combine, k) -> None:
    image, text, image_id, text_image_id = data
    scores, relevant = image @ text.T, image_id[:, None] == text_image_id
    candidates = candidates_from_scores(scores, relevant, k)
    pair = torch.randint(-3, 4, candidates.scores.shape).float()
    rows = zip(scores.tolist(), relevant.tolist(), candidates.index.tolist(), pair.tolist())
    scores = pair + candidates.scores if combine == "sum" else pair
    assert second_stage(candidates, scores).tolist() == [plain_rerank(*row, add=combine == "sum") for row in rows]


def test_rerank_by_the_first_scores_changes_nothing_and_by_the_truth_lifts_what_was_found() -> None:
    image, text = torch.randn(30, 4), torch.randn(30, 4)
    t2i, _ = first_stage(image, text, torch.arange(30), k=8)
    assert torch.equal(second_stage(t2i, t2i.scores), t2i.rank)
    found = t2i.rank <= 8
    assert found.any() and not found.all()
    perfect = second_stage(t2i, t2i.relevant.float())
    assert (perfect[found] == 1).all()
    assert torch.equal(perfect[~found], t2i.rank[~found])  # so R@K means something for K > k as well


def test_an_answer_that_ties_at_the_border_is_outside() -> None:
    first = torch.tensor([[0.0, 0.0, 0.0]])
    for answer in range(3):
        candidates = candidates_from_scores(first, torch.arange(3)[None] == answer, 2)
        assert second_stage(candidates, candidates.relevant.float()).tolist() == [3]


def test_mean_of_folds_averages_and_says_so() -> None:
    folds = [
        summarise(torch.tensor([1, 1]), torch.tensor([1, 1]), protocol(2, 2)),
        summarise(torch.tensor([2, 20]), torch.tensor([1, 2]), protocol(2, 2)),
    ]
    mean = mean_of_folds(folds)
    assert (mean.text_to_image.r1, mean.text_to_image.r5, mean.image_to_text.r1) == (50, 75, 75)
    assert mean.protocol.folds == 2 and "mean of 2 folds" in mean.protocol.label()
    with pytest.raises(ValueError, match="got 1 folds; a mean of folds needs at least two"):
        mean_of_folds(folds[:1])


def test_folds_with_fingerprints_of_their_own() -> None:
    a, b, c = (
        summarise(torch.tensor([1, 1]), torch.tensor([1, 1]), replace(protocol(2, 2), fingerprint=name))
        for name in "abc"
    )
    mean = mean_of_folds([a, b]).protocol.fingerprint
    assert len(mean) == 16 and mean not in "ab"
    assert len({mean, mean_of_folds([b, a]).protocol.fingerprint, mean_of_folds([a, c]).protocol.fingerprint}) == 3
    assert mean_of_folds([a, a]).protocol.fingerprint == "a"
    with pytest.raises(ValueError, match=r"\['a', 'b', 'a'\]; a fold that is counted twice is no mean of folds"):
        mean_of_folds([a, b, a])


NAN = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])


@pytest.mark.parametrize(
    ("image", "text", "ids", "says"),
    [
        (torch.ones(0, 2), torch.ones(2, 2), [0, 0], r"images \[0, 2\] and texts \[2, 2\]; nothing to rank"),
        (torch.ones(2, 2), torch.ones(0, 2), [], "nothing to rank. Was the split empty"),
        (torch.ones(2, 3), torch.ones(2, 2), [0, 1], "with one E"),
        (torch.ones(2), torch.ones(2, 2), [0, 1], r"expected \[I, E\] or \[I, N, E\]"),
        (torch.ones(2, 2), torch.ones(2, 2), [0, 1, 1], "expected one id per embedding"),
        (torch.ones(2, 2), torch.ones(3, 2), [0, 1, 9], "caption 2 belongs to image id 9, which is not in the gallery"),
        (torch.ones(2, 2), torch.ones(2, 2), [1, 1], "image id 0 has no caption"),
        (NAN, torch.ones(2, 2), [0, 1], r"image embedding 1 has NaN or infinite values \(1 of 2 rows"),
        (torch.ones(2, 2), NAN, [0, 1], "text embedding 1 has NaN"),
        (torch.full((2, 2), 1e30), torch.full((2, 2), 1e30), [0, 1], "overflow when multiplied; normalise both sides"),
    ],
)
def test_embeddings_that_cannot_be_ranked_are_refused(image, text, ids, says) -> None:
    with pytest.raises(ValueError, match=says):
        first_stage(image, text, torch.tensor(ids, dtype=torch.long))


def test_an_image_passed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="2 images with 1 distinct ids; pass each image once"):
        first_stage(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([4, 4]), image_id=torch.tensor([4, 4]))


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    eye = torch.eye(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"scores of query 1 contain NaN \(1 of 2 queries do\)"):
        ranks_from_scores(NAN, eye)
    with pytest.raises(ValueError, match=r"query 0 has no relevant item \(1 of 2 queries have none\)"):
        ranks_from_scores(torch.ones(2, 2), torch.tensor([[False, False], [True, False]]))
    for scores, relevant in ((torch.ones(0, 2), eye[:0]), (torch.ones(2, 3), eye)):
        with pytest.raises(ValueError, match=r"expected the same \[queries, gallery\]"):
            ranks_from_scores(scores, relevant)


def test_pair_scores_that_cannot_rerank_are_refused() -> None:
    candidates = candidates_from_scores(torch.ones(2, 2), torch.eye(2, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match="contain NaN"):
        second_stage(candidates, NAN)
    with pytest.raises(ValueError, match=r"scores \[2, 1\] for candidates \[2, 2\]"):
        second_stage(candidates, torch.ones(2, 1))
    empty = Candidates(candidates.rank, *(x[:, :0] for x in (candidates.index, candidates.scores, candidates.relevant)))
    with pytest.raises(ValueError, match="at least one candidate"):
        second_stage(empty, torch.ones(2, 0))


def test_a_protocol_that_describes_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="got ranks of 2 images and 2 captions; the protocol says 23 images and 69"):
        retrieval_metrics(torch.eye(2), torch.eye(2), torch.arange(2), protocol=protocol())
    words = Protocol(dataset="toy", split="test", fingerprint="0", images=2, captions=2, stage=None, rule="words")
    with pytest.raises(ValueError, match="retrieval is measured under rule 'hit'"):
        summarise(torch.ones(2).long(), [1, 1], words)


def test_equal_scores_are_candidates_in_the_order_of_their_places() -> None:
    scores = torch.tensor([[0.5, 1.0, 0.5, 0.5, 1.0, 0.5] * 40, [0.0] * 240])
    relevant = torch.zeros(2, 240, dtype=torch.bool)
    relevant[:, 0] = True
    found = candidates_from_scores(scores, relevant, 82)
    ones = [i for i in range(240) if i % 3 == 1]
    assert found.index[0].tolist() == [*ones, 0, 2]
    assert found.index[1].tolist() == list(range(82))
    image = torch.eye(2).repeat_interleave(100, 0)
    t2i, _ = first_stage(image, torch.eye(2)[[0, 1]].repeat(100, 1), torch.arange(200), k=3)
    assert t2i.index[0].tolist() == [0, 1, 2]
    assert t2i.index[1].tolist() == [100, 101, 102]


@pytest.mark.parametrize(
    "form", [np.asarray, torch.as_tensor, lambda x: torch.as_tensor(x).tolist()], ids=["numpy", "torch", "lists"]
)
def test_metrics_take_what_encode_returns(form) -> None:
    image, text = np.eye(3, 4, dtype=np.float32), np.eye(3, 4, dtype=np.float32).repeat(2, 0)
    known = Protocol(dataset="toy", split="test", fingerprint="0", images=3, captions=6)
    owner = np.repeat([4, 7, 9], 2)
    result = retrieval_metrics(form(image), form(text), form(owner), image_id=form(np.array([4, 7, 9])), protocol=known)
    assert result.text_to_image.r1 == result.image_to_text.r1 == 100


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image": "ab"}, TypeError, "image embeddings: expected numbers, got 'ab'"),
        ({"text": None}, TypeError, "text embeddings: expected numbers, got None"),
        ({"text_image_id": [0.5, 1.0]}, TypeError, "text_image_id: expected whole numbers"),
        ({"text_image_id": ["a", "b"]}, TypeError, "text_image_id: expected whole numbers"),
        ({"protocol": {}}, TypeError, "protocol: expected a Protocol, got dict"),
        ({"chunk": 0}, ValueError, "chunk: expected at least 1, got 0"),
        ({"chunk": 2.0}, TypeError, "chunk: expected a whole number"),
    ],
)
def test_metrics_name_the_argument_that_is_wrong(change, kind, message) -> None:
    known = Protocol(dataset="toy", split="test", fingerprint="0", images=2, captions=2)
    given = {"image": torch.eye(2), "text": torch.eye(2), "text_image_id": torch.arange(2), "protocol": known, **change}
    with pytest.raises(kind, match=message):
        retrieval_metrics(**given)
