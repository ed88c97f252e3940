"""CCA against its closed form: known correlations, whitened projections, invariance to linear maps, and retrieval."""

import math
from pathlib import Path

import pytest
import torch
from toysurvey import ToyEncoders, part, toy_pairs

from unimodal.metrics import Protocol, retrieval_metrics
from unimodal.survey.specs import read_spec
from unimodal.systems import CCA, CanonicalCorrelation


def paired(n: int, noise: float = 0.5, p: int = 6, q: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features y = x R + noise with an orthogonal R: every canonical correlation is 1 / sqrt(1 + noise^2)."""
    x = torch.randn(n, p, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(p, q, dtype=torch.float64))
    return x, x @ rotation + noise * torch.randn(n, q, dtype=torch.float64)


def covariance(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(0)
    return x.T @ x / (len(x) - 1)


def test_correlations_match_the_closed_form() -> None:
    cca = CCA.fit(*paired(40_000, noise=0.75), dim=6, regularisation=0)
    assert torch.allclose(cca.correlations, torch.full((6,), 0.8, dtype=torch.float64), atol=0.02)


SPREAD = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)  # of the noise on each direction


def orthogonal() -> tuple[torch.Tensor, torch.Tensor]:
    """x of exactly unit covariance, y = x + noise of exactly the spread above, the noise uncorrelated with x."""
    parts = torch.randn(40, 10, dtype=torch.float64)
    parts = math.sqrt(39) * torch.linalg.qr(parts - parts.mean(0))[0]
    return parts[:, :5], parts[:, :5] + SPREAD * parts[:, 5:]


def test_distinct_correlations_match_the_closed_form_exactly() -> None:
    x, y = orthogonal()
    cca = CCA.fit(x @ torch.randn(5, 5).double(), y @ torch.randn(5, 5).double() + 7, dim=5, regularisation=0)
    assert torch.allclose(cca.correlations, (1 + SPREAD.square()).rsqrt(), atol=1e-10)


def test_the_ridge_shrinks_correlations_as_the_closed_form_says() -> None:
    """With r on the diagonals, relative to their means 1 and v, direction k correlates by 1 / sqrt((1 + r) (1 + s_k^2 + r v))."""
    ridge, variance = 0.3, 1 + SPREAD.square()
    x, y = orthogonal()
    cca = CCA.fit(x, y, dim=5, regularisation=ridge)
    assert torch.allclose(cca.correlations, ((1 + ridge) * (variance + ridge * variance.mean())).rsqrt(), atol=1e-10)
    for features, projection in ((x, cca.image_map), (y, cca.text_map)):
        ridged = covariance(features) + ridge * covariance(features).diagonal().mean() * torch.eye(5)
        assert torch.allclose(projection.T @ ridged @ projection, torch.eye(5, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("power", [0.0, 4.0])
def test_directions_weigh_by_a_power_of_their_correlation(power: float) -> None:
    x, y = paired(60)
    cca = CCA.fit(x, y, dim=3, power=power)
    for found, row, mean, columns in (
        (cca.embed_image(x[:1]), x[0], cca.image_mean, cca.image_map),
        (cca.embed_text(y[:1]), y[0], cca.text_mean, cca.text_map),
    ):
        projected = [
            sum(float((row[i] - mean[i]) * columns[i, d]) for i in range(6)) * float(cca.correlations[d]) ** power
            for d in range(3)
        ]
        assert found[0].tolist() == pytest.approx([value / math.hypot(*projected) for value in projected], abs=1e-6)


def test_the_system_is_the_fit_on_mean_tokens_an_image_repeated_for_each_caption() -> None:
    pairs, system = toy_pairs(40, captions=2), CanonicalCorrelation(ToyEncoders(), power=4.0, regularisation=0.1)
    assert system.dim == 20  # no more directions than the narrower encoder has
    system.prepare(part(pairs, rows) for rows in torch.arange(80).split(32))
    images = pairs.images.tokens.mean(1)  # all of them are real
    texts = torch.stack([row[m].mean(0) for row, m in zip(pairs.texts.tokens, pairs.texts.mask)])
    expected = CCA.fit(images, texts, dim=20, power=4.0, regularisation=0.1)
    torch.testing.assert_close(system.correlations, expected.correlations)
    assert torch.equal(images[0], images[1])
    found = system.embed_images(pairs.images) @ system.embed_texts(pairs.texts).T
    torch.testing.assert_close(found, expected.embed_image(images) @ expected.embed_text(texts).T, atol=1e-4, rtol=1e-4)


def test_what_is_ours_says_so() -> None:
    assert "inferred design" in read_spec(Path(__file__).parent.parent / "configs/systems/cca.yaml").inferred
    assert "inferred design" in (CanonicalCorrelation.__doc__ or "")


def test_correlations_are_those_of_the_generalised_eigenvalue_problem() -> None:
    x, y = paired(300, p=5, q=5)
    cca = CCA.fit(x, y, dim=5, regularisation=0)
    xc, yc = x - x.mean(0), y - y.mean(0)
    cross = xc.T @ yc / (len(x) - 1)
    squared = torch.linalg.eigvals(
        torch.linalg.solve(covariance(x), cross) @ torch.linalg.solve(covariance(y), cross.T)
    ).real
    assert torch.allclose(cca.correlations, squared.sort(descending=True).values.sqrt(), atol=1e-10)


def test_projections_are_white_and_correlate_only_pairwise() -> None:
    x, y = paired(300)
    cca = CCA.fit(x, y, dim=4, regularisation=0)
    a, b = (x - cca.image_mean) @ cca.image_map, (y - cca.text_mean) @ cca.text_map
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(covariance(a), eye, atol=1e-10)
    assert torch.allclose(covariance(b), eye, atol=1e-10)
    assert torch.allclose(a.T @ b / (len(a) - 1), torch.diag(cca.correlations), atol=1e-10)


def test_invertible_maps_of_either_side_change_nothing() -> None:
    x, y = paired(300)
    left, right = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    plain = CCA.fit(x, y, dim=6, regularisation=0)
    mapped = CCA.fit(x @ left, y @ right, dim=6, regularisation=0)
    assert torch.allclose(plain.correlations, mapped.correlations, atol=1e-9)
    cosine = plain.embed_image(x) @ plain.embed_text(y).T
    assert torch.allclose(cosine, mapped.embed_image(x @ left) @ mapped.embed_text(y @ right).T, atol=1e-5)


def test_regularisation_does_not_depend_on_the_scale_of_the_features() -> None:
    x, y = paired(50)
    assert torch.allclose(CCA.fit(x, y, dim=6).correlations, CCA.fit(1000 * x, y, dim=6).correlations)


def test_embeddings_retrieve_unseen_pairs() -> None:
    x, y = paired(600, noise=0.1, p=8, q=8)
    cca = CCA.fit(x[:500], y[:500], dim=8)
    image, text = cca.embed_image(x[500:]), cca.embed_text(y[500:])
    assert image.dtype == torch.float32
    assert torch.allclose(image.norm(dim=1), torch.ones(100))
    protocol = Protocol(
        dataset="drawn",
        split="test",
        fingerprint="0" * 16,
        images=100,
        captions=100,
        captions_per_image=1,
        stage="first",
        k=None,
        rule="hit",
    )
    metrics = retrieval_metrics(image, text, torch.arange(100), protocol=protocol)
    assert metrics.text_to_image.r1 > 90 and metrics.image_to_text.r1 > 90


@pytest.mark.parametrize(
    ("image", "text", "dim", "message"),
    [
        (torch.randn(5, 4), torch.randn(6, 4), 2, r"got image features \[5, 4\], text features \[6, 4\]"),
        (torch.randn(5), torch.randn(5, 4), 2, r"expected \[n, p\]"),
        (torch.randn(9, 4), torch.randn(9, 3), 4, "between 1 and the narrower feature width 3, got 4"),
        (torch.full((9, 4), torch.nan), torch.randn(9, 4), 2, "NaN or infinite"),
        (
            torch.ones(9, 4),
            torch.randn(9, 4),
            2,
            "image features span fewer than their 4 dimensions; raise regularisation",
        ),
    ],
)
def test_bad_features_are_refused(image: torch.Tensor, text: torch.Tensor, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CCA.fit(image, text, dim=dim)


def test_features_of_another_width_are_refused() -> None:
    cca = CCA.fit(*paired(50), dim=2)
    with pytest.raises(ValueError, match=r"expected text features \[n, 6\] as in the fit, got \[3, 5\]"):
        cca.embed_text(torch.randn(3, 5))


def test_maps_keep_their_precision_whatever_a_model_is_converted_to() -> None:
    system = CanonicalCorrelation(ToyEncoders())
    system.prepare(iter([toy_pairs(64)]))
    fitted = {name: value.clone() for name, value in system.state_dict().items()}
    for convert in ("bfloat16", "float", "double"):
        getattr(system, convert)()
        assert all(torch.equal(value, fitted[name]) for name, value in system.state_dict().items())
