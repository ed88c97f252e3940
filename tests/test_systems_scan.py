"""SCAN against a loop over pairs, words and regions in float64, and the limits of its pools."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toysurvey import ToyEncoders, toy_pairs

from unimodal.systems import SCAN, SCANEnsemble
from unimodal.systems.scan import pool_average, pool_logsumexp


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


def test_the_order_of_regions_means_nothing() -> None:
    system = SCAN(ToyEncoders(), 16, "i2t", "lse").eval()
    pairs = toy_pairs(4)
    order = torch.randperm(9)
    with torch.no_grad():
        other = system.score(pairs.images._replace(tokens=pairs.images.tokens[:, order]), pairs.texts)
        torch.testing.assert_close(other, system.score(pairs.images, pairs.texts))


def test_an_ensemble_is_the_mean_of_its_matrices() -> None:
    both = SCANEnsemble(ToyEncoders(), 16).eval()
    pairs = toy_pairs(4)
    with torch.no_grad():
        images, texts = both.image_state(pairs.images), both.text_state(pairs.texts)
        parts = [
            part.score_matrix(part.image_state(pairs.images), part.text_state(pairs.texts))
            for part in (both.t2i, both.i2t)
        ]
        torch.testing.assert_close(both.score_matrix(images, texts), (parts[0] + parts[1]) / 2)
    assert both.losses(pairs, "triplet", 0.0).keys() == {"t2i", "i2t"}
