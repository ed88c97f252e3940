"""SCAN against a loop over pairs, words and regions in float64, and the limits of its pools."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toysurvey import ToyEncoders, toy_pairs

from unimodal.survey.score import scored_again
from unimodal.survey.specs import read_spec
from unimodal.systems import SCAN, SCANEnsemble
from unimodal.systems.scan import pool_average, pool_logsumexp, stacked_attention

CONFIGS = Path(__file__).parent.parent / "configs/systems"
VARIANTS = [(direction, pool) for direction in ("t2i", "i2t") for pool in ("avg", "lse")]


def slow(regions: Tensor, words: Tensor, direction: str, pool: str, sharp: float, pool_sharp: float) -> float:
    """One pair, unit vectors of real regions [R, D] and real words [L, D], step by step as the authors' code has it."""
    queries, contexts = (words, regions) if direction == "t2i" else (regions, words)
    cosines = []
    for q in range(len(queries)):
        weights = []
        for c in range(len(contexts)):
            row = [float(contexts[c] @ queries[a]) for a in range(len(queries))]
            row = [x if x > 0 else 0.1 * x for x in row]
            weights.append(math.exp(sharp * row[q] / math.sqrt(sum(x * x for x in row))))
        attended = sum(w / sum(weights) * contexts[c] for c, w in enumerate(weights))
        cosines.append(float(queries[q] @ attended / attended.norm()))
    if pool == "avg":
        return sum(cosines) / len(cosines)
    return math.log(sum(math.exp(pool_sharp * r) for r in cosines)) / pool_sharp


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("pool", ["avg", "lse"])
def test_scores_are_those_of_a_loop_over_pairs(direction: str, pool: str) -> None:
    system = SCAN(ToyEncoders(), 16, direction, pool, sharpness=7.0, pool_sharpness=5.0).double().eval()
    pairs = toy_pairs(5)
    images = pairs.images._replace(tokens=pairs.images.tokens.double(), mask=pairs.images.mask.clone())
    images.mask[1, 6:] = False  # a picture of fewer regions
    texts = pairs.texts._replace(tokens=pairs.texts.tokens.double())
    with torch.no_grad():
        state = system.image_state(images), system.text_state(texts)
        matrix = system.score_matrix(*state)
        rows = system.score_pairs(*state)
    torch.testing.assert_close(rows, matrix.diagonal())
    for i in range(5):
        for j in range(5):
            regions, words = state[0][0][i][images.mask[i]], state[1][0][j][texts.mask[j]]
            assert float(matrix[i, j]) == pytest.approx(slow(regions, words, direction, pool, 7.0, 5.0), abs=1e-9)


@pytest.mark.parametrize(("queries", "contexts"), [(3, 5), (4, 2)])
def test_masks_come_before_the_norm_and_the_softmax(queries: int, contexts: int) -> None:
    """Whatever stands in the padding of either side: it is out before anything is summed."""
    q, c = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1) for n in (queries, contexts))
    expected = stacked_attention(
        q @ c.T, torch.ones(queries).bool(), torch.ones(contexts).bool(), c @ c.T, sharpness=7.0
    )
    q, c = (torch.cat([x, 9 * torch.randn(2, 6, dtype=torch.float64)]) for x in (q, c))
    masks = [torch.arange(n + 2) < n for n in (queries, contexts)]
    found = stacked_attention(q @ c.T, *masks, c @ c.T, sharpness=7.0)
    torch.testing.assert_close(found[:queries], expected)


def test_a_single_region_is_all_that_words_can_attend_to() -> None:
    system = SCAN(ToyEncoders(), 16)
    pairs = toy_pairs(4)
    images = pairs.images._replace(tokens=pairs.images.tokens[:, :1], mask=pairs.images.mask[:, :1])
    with torch.no_grad():
        state = system.image_state(images), system.text_state(pairs.texts)
        words = state[1][0]
        expected = [F.cosine_similarity(words[i][m], state[0][0][i, :1]).mean() for i, m in enumerate(pairs.texts.mask)]
        torch.testing.assert_close(system.score_pairs(*state), torch.stack(expected))


def test_a_sharp_pool_is_the_maximum_and_padding_is_no_query() -> None:
    cosines, mask = torch.tensor([[0.1, 0.7, 0.9]]), torch.tensor([[True, True, False]])
    assert float(pool_logsumexp(cosines, mask, 500.0)) == pytest.approx(0.7, abs=1e-2)
    assert float(pool_average(cosines, mask)) == pytest.approx(0.4)


@pytest.mark.parametrize(("direction", "pool"), VARIANTS)
def test_the_order_of_regions_means_nothing(direction: Any, pool: Any) -> None:
    system = SCAN(ToyEncoders(), 16, direction, pool).eval()
    pairs = toy_pairs(4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        other = system.score(pairs.images._replace(tokens=pairs.images.tokens[:, order]), pairs.texts)
        torch.testing.assert_close(other, system.score(pairs.images, pairs.texts))


def test_words_are_the_mean_of_both_directions_of_each_text_alone() -> None:
    torch.manual_seed(0)
    system, pairs = SCAN(ToyEncoders(), 16).eval(), toy_pairs(6)
    with torch.no_grad():
        found, mask, _ = system.text_state(pairs.texts)
        for row, length in enumerate(pairs.texts.mask.sum(1).tolist()):
            forward, backward = system.words(pairs.texts.tokens[row : row + 1, :length])[0][0].chunk(2, dim=-1)
            torch.testing.assert_close(found[row, :length], F.normalize((forward + backward) / 2, dim=-1))
            assert mask[row].sum() == length and not found[row, length:].any()
        regions = system.image_state(pairs.images)[0]
        torch.testing.assert_close(regions.norm(dim=-1), torch.ones(6, 9))


def test_regions_start_as_the_authors_do() -> None:
    """Xavier-uniform weights, sqrt(6 / (in + out)) at most, and a zero bias."""
    torch.manual_seed(0)
    layer, bound = SCAN(ToyEncoders(), 16).regions, math.sqrt(6 / (24 + 16))
    assert not layer.bias.any()
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(("direction", "pool"), VARIANTS)
def test_another_caption_of_the_same_image_counts_as_wrong(direction: Any, pool: Any) -> None:
    """As in the authors' code: the hardest of a row and of a column, all but the diagonal, summed over the batch."""
    torch.manual_seed(0)
    system, pairs = SCAN(ToyEncoders(), 16, direction, pool).eval(), toy_pairs(3, captions=2)
    assert len(pairs.image_id.unique()) == 3
    with torch.no_grad():
        found = float(system.losses(pairs, "triplet", 0.0)["triplet"])
        scores = system.score_matrix(system.image_state(pairs.images), system.text_state(pairs.texts)).tolist()
    expected, spared = 0.0, 0.0
    for i in range(6):
        for line in (scores[i], [row[i] for row in scores]):
            hinges = [max(0.0, 0.2 + line[j] - scores[i][i]) for j in range(6)]
            expected += max(hinges[j] for j in range(6) if j != i)
            spared += max(hinges[j] for j in range(6) if pairs.image_id[j] != pairs.image_id[i])
    assert found == pytest.approx(expected, rel=1e-5)
    assert spared < expected - 1e-3


@pytest.mark.parametrize(("direction", "pool"), VARIANTS)
def test_settings_are_those_of_the_paper(direction: str, pool: str) -> None:
    spec = read_spec(CONFIGS / f"scan_{direction}_{pool}.yaml")
    system: Any = spec.system(ToyEncoders())
    sharpness = {"t2i": 9, "i2t": 4}[direction]
    assert (system.direction, system.pool, system.sharpness, system.margin) == (direction, pool, sharpness, 0.2)
    assert pool == "avg" or system.pool_sharpness == {"t2i": 6, "i2t": 5}[direction]  # on Flickr30K
    stage = spec.stages["triplet"]
    assert (stage.clip, stage.weight_decay) == (2.0, 0.0)
    assert spec.scoring.first == "pair" and scored_again(system, spec.scoring) == 0


def test_the_ensemble_is_the_one_of_the_papers_headline() -> None:
    both: Any = read_spec(CONFIGS / "scan_ensemble.yaml").system(ToyEncoders())
    assert (both.t2i.direction, both.t2i.pool, both.t2i.sharpness) == ("t2i", "avg", 9)
    assert (both.i2t.direction, both.i2t.pool, both.i2t.sharpness, both.i2t.pool_sharpness) == ("i2t", "lse", 4, 5)


@pytest.mark.parametrize(("t2i", "i2t"), [("avg", "lse"), ("lse", "avg")])
def test_an_ensemble_is_the_mean_of_its_matrices(t2i: Any, i2t: Any) -> None:
    both = SCANEnsemble(ToyEncoders(), 16, t2i, i2t, pool_sharpness=20.0).eval()
    assert [(part.direction, part.pool, part.pool_sharpness) for part in (both.t2i, both.i2t)] == [
        ("t2i", t2i, 6.0),
        ("i2t", i2t, 20.0),
    ]
    pairs = toy_pairs(4)
    with torch.no_grad():
        images, texts = both.image_state(pairs.images), both.text_state(pairs.texts)
        parts = [
            part.score_matrix(part.image_state(pairs.images), part.text_state(pairs.texts))
            for part in (both.t2i, both.i2t)
        ]
        torch.testing.assert_close(both.score_matrix(images, texts), (parts[0] + parts[1]) / 2)
        torch.testing.assert_close(both.score_pairs(images, texts), ((parts[0] + parts[1]) / 2).diagonal())
    losses = both.losses(pairs, "triplet", 0.0)
    assert losses.keys() == {"t2i", "i2t"}
    losses["t2i"].backward()  # each learns alone
    assert both.t2i.regions.weight.grad is not None and both.i2t.regions.weight.grad is None
