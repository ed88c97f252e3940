"""Metrics that count every relevant item equal torchmetrics and a plain loop in float64; ties, sizes and labels obey their rules."""

import math

import pytest
import torch
from torchmetrics.retrieval import RetrievalMAP, RetrievalNormalizedDCG, RetrievalRecall

from unimodal.metrics import Protocol, relevance_metrics, text_to_text
from unimodal.metrics.relevance import values_per_query

KS = (1, 5, 10)


def protocol(images: int, captions: int) -> Protocol:
    return Protocol(dataset="toy", split="test", fingerprint="0" * 16, images=images, captions=captions)


def plain(scores: list[float], relevant: list[bool], ks: tuple[int, ...]) -> dict[str, float]:
    """One query, as the definitions read."""
    order = sorted(range(len(scores)), key=lambda g: (-scores[g], relevant[g]))
    hits = [relevant[g] for g in order]
    total = sum(hits)
    precisions = [(place, sum(hits[:place]) / place) for place, hit in enumerate(hits, 1) if hit]
    out = {
        "map": sum(p for _, p in precisions) / total,
        "r_precision": sum(hits[:total]) / total,
    }
    for k in ks:
        ideal = sum(1 / math.log2(1 + place) for place in range(1, min(k, total) + 1))
        out[f"recall_{k}"] = sum(hits[:k]) / total
        out[f"map_{k}"] = sum(p for place, p in precisions if place <= k) / min(k, total)
        out[f"ndcg_{k}"] = sum(1 / math.log2(1 + place) for place, _ in precisions if place <= k) / ideal
    return out


def test_values_equal_a_plain_loop_with_many_ties() -> None:
    scores = torch.randint(-2, 3, (40, 13)).double()
    relevant = torch.rand(40, 13) < 0.4
    relevant[:, 0] = True
    ks = (1, 5, 10, 100)
    values = values_per_query(scores, relevant, ks)
    rows = [plain(s, r, ks) for s, r in zip(scores.tolist(), relevant.tolist())]
    for name, value in values.items():
        assert value.dtype == torch.float64
        assert value.tolist() == pytest.approx([row[name] for row in rows], abs=1e-12), name


@pytest.mark.parametrize("chunk", [7, 1000])
def test_values_equal_torchmetrics(chunk: int) -> None:
    image, text = torch.randn(40, 8), torch.randn(200, 8)
    text_image = torch.arange(40).repeat_interleave(5)
    ours = relevance_metrics(
        image, text, torch.arange(40), text_image, direction="i2t", protocol=protocol(40, 200), chunk=chunk
    ).scores()
    scores, relevant = image @ text.T, torch.arange(40)[:, None] == text_image
    query = torch.arange(40)[:, None].expand_as(scores).flatten()

    positive = (scores - scores.min() + 1).flatten()  # torchmetrics' MAP leaves out what scores 0 or less

    def oracle(metric) -> float:
        return 100 * metric(positive, relevant.flatten(), indexes=query).item()

    assert ours["i2t_map"] == pytest.approx(oracle(RetrievalMAP()), abs=1e-4)
    for k in KS:
        assert ours[f"i2t_recall_{k}"] == pytest.approx(oracle(RetrievalRecall(top_k=k)), abs=1e-4)
        assert ours[f"i2t_ndcg_{k}"] == pytest.approx(oracle(RetrievalNormalizedDCG(top_k=k)), abs=1e-4)


def test_map_at_k_divides_by_what_k_places_allow_and_torchmetrics_by_what_was_found() -> None:
    scores, relevant = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[True, False, True, True]])
    assert values_per_query(scores, relevant, (2,))["map_2"].item() == 0.5
    theirs = RetrievalMAP(top_k=2)(scores[0], relevant[0], indexes=torch.zeros(4, dtype=torch.long))
    assert theirs.item() == 1


def test_labels_make_relevant_what_shares_one() -> None:
    image, text = torch.randn(12, 4), torch.randn(12, 4)
    image_label, text_label = (torch.rand(2, 12, 6) < 0.3).long()
    image_label[:, 0] = text_label[:, 0] = 1
    found = relevance_metrics(text, image, text_label, image_label, direction="t2i", protocol=protocol(12, 12))
    relevant = (text_label[:, None] & image_label).any(dim=2)
    rows = [plain(s, r, KS) for s, r in zip((text @ image.T).tolist(), relevant.tolist())]
    for name, value in found.values.items():
        assert value == pytest.approx(100 * sum(row[name] for row in rows) / 12), name
    assert found.protocol.rule == "every item that shares a label"
    by_id = relevance_metrics(
        text, image, torch.arange(12), torch.arange(12), direction="t2i", protocol=protocol(12, 12)
    )
    assert by_id.protocol.rule == "every item of the same id"


def test_text_to_text_is_not_its_own_answer() -> None:
    text = torch.randint(-2, 3, (30, 5)).float()
    image = torch.arange(10).repeat_interleave(3)[torch.randperm(30)]
    scores = text @ text.T
    scores.fill_diagonal_(-torch.inf)
    relevant = (image[:, None] == image) & ~torch.eye(30, dtype=torch.bool)
    for k, chunk in ((0, 4), (8, 4), (30, 1000)):
        found = text_to_text(text, image, k=k, chunk=chunk)
        best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
        assert torch.equal(found.rank, 1 + ((scores >= best) & ~relevant).sum(dim=1))
        assert found.index.shape[1] == min(k, 29) and not (found.index == torch.arange(30)[:, None]).any()
    rows = [plain(s, r, KS) for s, r in zip(scores.tolist(), relevant.tolist())]
    ours = relevance_metrics(text, text, image, image, direction="t2t", protocol=protocol(10, 30), chunk=7)
    for name, value in ours.values.items():
        assert value == pytest.approx(100 * sum(row[name] for row in rows) / 30), name


def test_memory_holds_one_chunk_of_scores() -> None:
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, torch.Tensor) else [])
            return out

    ids = torch.arange(300).repeat_interleave(2)
    with Watch():
        relevance_metrics(
            torch.randn(300, 2), torch.randn(600, 2), torch.arange(300), ids, direction="i2t",
            protocol=protocol(300, 600), chunk=10,
        )  # fmt: skip
    assert max(sizes) <= 10 * 600


def test_what_cannot_be_judged_is_refused() -> None:
    eye, ids = torch.eye(3), torch.arange(3)
    known = {"direction": "t2i", "protocol": protocol(3, 3)}
    with pytest.raises(ValueError, match="query 2 has no relevant item"):
        relevance_metrics(eye, eye, torch.tensor([0, 1, 7]), ids, **known)
    with pytest.raises(ValueError, match=r"got labels \[3, 2\] and \[3\]"):
        relevance_metrics(eye, eye, torch.ones(3, 2), ids, **known)
    with pytest.raises(ValueError, match="labels are 0 or 1"):
        relevance_metrics(eye, eye, 2 * eye, eye, **known)
    with pytest.raises(ValueError, match=r"ks\[0\]: expected at least 1, got 0"):
        relevance_metrics(eye, eye, ids, ids, ks=(0,), **known)
    with pytest.raises(ValueError, match="3 gallery items for t2i; the protocol says 4 images"):
        relevance_metrics(eye, eye, ids, ids, direction="t2i", protocol=protocol(4, 3))
    with pytest.raises(ValueError, match="query embedding 0 has NaN"):
        relevance_metrics(eye * torch.nan, eye, ids, ids, **known)
    with pytest.raises(ValueError, match="caption 2 is the only one of its image"):
        text_to_text(eye, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"text_image_id: expected 3 whole numbers \[3\], got Tensor \[2\]"):
        text_to_text(eye, ids[:2])
