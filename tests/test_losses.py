"""Proves each loss on one process: against plain loops in float64 (to 1e-10), values worked out by hand, gradcheck, and
the errors a user meets. What happens across ranks is proved in test_distributed.py."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from unimodal.losses import (
    Wrong,
    caption_loss,
    conditioning_loss,
    distillation_loss,
    flow_matching_loss,
    info_nce,
    listwise_loss,
    lsq,
    masked_info_nce,
    matching_loss,
    matryoshka,
    one_bit,
    quantised,
    sample_hard_negatives,
    self_critical_loss,
    sigmoid_loss,
    triplet_loss,
)

IDS = torch.tensor([7, 3, 7, 5])  # rows 0 and 2 show the same image


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def close(a: Tensor | float, b: Tensor | float, tolerance: float = 1e-10) -> bool:
    return abs(float(a) - float(b)) <= tolerance


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


def loop_scores(image: Tensor, text: Tensor) -> list[list[float]]:
    """Best inner product of any query of image i with text j, one number at a time."""
    queries = image if image.dim() == 3 else image[:, None]
    return [
        [max(sum(float(a) * float(b) for a, b in zip(query, t)) for query in image_queries) for t in text]
        for image_queries in queries
    ]


def loop_info_nce(image, text, image_id, text_image_id, scale: float, smoothing: float) -> float:
    scores = loop_scores(image, text)
    total = 0.0
    for rows, columns, score in (
        (image_id, text_image_id, lambda i, j: scale * scores[i][j]),
        (text_image_id, image_id, lambda i, j: scale * scores[j][i]),
    ):
        direction = 0.0
        for i in range(len(rows)):
            log_sum = math.log(sum(math.exp(score(i, j)) for j in range(len(columns))))
            positives = sum(int(rows[i] == columns[j]) for j in range(len(columns)))
            for j in range(len(columns)):
                target = (1 - smoothing) * float(rows[i] == columns[j]) / positives + smoothing / len(columns)
                direction -= target * (score(i, j) - log_sum)
        total += direction / len(rows)
    return total / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)], ids=["vector", "per-query"])
def test_info_nce_equals_the_double_loop(shape, smoothing):
    image, text = unit(*shape), unit(4, 6)
    value = info_nce(image, text, IDS, scale=9.0, label_smoothing=smoothing)
    assert value.dtype == torch.float64
    assert close(value, loop_info_nce(image, text, IDS, IDS, 9.0, smoothing))


def test_info_nce_takes_more_texts_than_images():
    image, text = unit(3, 6), unit(5, 6)
    image_id, text_image_id = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 2, 3, 3])
    value = info_nce(image, text, image_id, text_image_id, scale=4.0, label_smoothing=0.2)
    assert close(value, loop_info_nce(image, text, image_id, text_image_id, 4.0, 0.2))


def test_info_nce_golden_two_by_two():
    """Orthogonal pairs at scale 2: each row is softmax(2, 0), so the loss is log(1 + e^-2)."""
    eye = torch.eye(2, dtype=torch.float64)
    assert close(info_nce(eye, eye, torch.tensor([0, 1]), scale=2.0), math.log(1 + math.exp(-2)))
    # One image twice: both columns are right for every row, the target is (1/2, 1/2), the loss log(1 + e^-2) + 1.
    assert close(info_nce(eye, eye, torch.tensor([4, 4]), scale=2.0), math.log(1 + math.exp(-2)) + 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_unique_ids_info_nce_is_the_loss_of_clip(smoothing):
    image, text = unit(5, 8), unit(5, 8)
    logits, diagonal = 14.0 * image @ text.T, torch.arange(5)
    expected = F.cross_entropy(logits, diagonal, label_smoothing=smoothing)
    expected = (expected + F.cross_entropy(logits.T, diagonal, label_smoothing=smoothing)) / 2
    assert close(info_nce(image, text, torch.tensor([9, 4, 6, 1, 0]), scale=14.0, label_smoothing=smoothing), expected)


def test_one_query_per_image_is_the_vector_form():
    image, text = unit(4, 6), unit(4, 6)
    assert info_nce(image[:, None], text, IDS, scale=5.0) == info_nce(image, text, IDS, scale=5.0)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5)], ids=["vector", "per-query"])
def test_info_nce_gradient(shape):
    inputs = (unit(*shape), unit(4, 5), torch.tensor(3.0, dtype=torch.float64))
    assert gradcheck(
        lambda image, text, scale: info_nce(image, text, IDS, scale=scale, label_smoothing=0.1),
        [x.requires_grad_() for x in inputs],
    )


def test_contrastive_losses_are_float32_under_autocast():
    image, text = unit(4, 3, 64, dtype=torch.float32), unit(4, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = info_nce(image, text, IDS, scale=100.0), sigmoid_loss(image, text, IDS, scale=100.0, bias=-10.0)
    assert torch.equal(losses[0], info_nce(image, text, IDS, scale=100.0))
    assert torch.equal(losses[1], sigmoid_loss(image, text, IDS, scale=100.0, bias=-10.0))


@pytest.mark.parametrize("loss", [partial(info_nce, scale=1.0), partial(sigmoid_loss, scale=1.0, bias=0.0)])
def test_contrastive_errors_name_both_shapes(loss):
    with pytest.raises(ValueError, match=r"image embeddings \(4, 6\) and text embeddings \(4, 5\).*same E"):
        loss(unit(4, 6), unit(4, 5), IDS)
    with pytest.raises(ValueError, match=r"image embeddings \(4, 6\) and text embeddings \(4, 2, 6\)"):
        loss(unit(4, 6), unit(4, 2, 6), IDS)
    with pytest.raises(ValueError, match=r"image_id of shape \(3,\) for embeddings \(4, 6\).*one id per row"):
        loss(unit(4, 6), unit(4, 6), IDS[:3])
    with pytest.raises(
        ValueError, match=r"text_image_id \(default: image_id\) of shape \(4,\) for embeddings \(5, 6\)"
    ):
        loss(unit(4, 6), unit(5, 6), IDS)


def test_info_nce_refuses_rows_without_a_partner():
    with pytest.raises(ValueError, match="The image at row 1 of the batch has no text with its image id"):
        info_nce(unit(3, 6), unit(2, 6), torch.tensor([1, 2, 3]), torch.tensor([1, 3]), scale=1.0)
    with pytest.raises(ValueError, match="The text at row 2 of the batch has no image with its image id"):
        info_nce(unit(2, 6), unit(3, 6), torch.tensor([1, 3]), torch.tensor([1, 3, 2]), scale=1.0)


# --- Sigmoid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)], ids=["vector", "per-query"])
def test_sigmoid_equals_the_double_loop(shape):
    image, text = unit(*shape), unit(5, 6)
    text_image_id = torch.tensor([7, 3, 5, 5, 8])  # two texts for row 3, one text of no image here
    scores, expected = loop_scores(image, text), 0.0
    for i in range(4):
        for j in range(5):
            sign = 1.0 if IDS[i] == text_image_id[j] else -1.0
            expected += math.log(1 + math.exp(-sign * (10 * scores[i][j] - 2.71)))
    assert close(sigmoid_loss(image, text, IDS, text_image_id, scale=10.0, bias=-2.71), expected / 4)


def test_sigmoid_golden_values():
    one, eye = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    # A single pair of cosine 1: -log sigmoid(scale + bias).
    assert close(sigmoid_loss(one, one, torch.tensor([0]), scale=3.0, bias=-1.0), math.log(1 + math.exp(-2)))
    # Orthogonal pairs: per row a positive at 3 - 1 and a negative at -1. Divided by 2 rows, not by 4 pairs.
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert close(sigmoid_loss(eye, eye, torch.tensor([0, 1]), scale=3.0, bias=-1.0), expected)


def test_sigmoid_starts_near_ten_whatever_the_batch():
    """At scale 10 and bias -10 random pairs cost about 10 per positive and next to nothing per negative."""
    for batch in (16, 128):
        image, text = unit(batch, 256), unit(batch, 256)
        assert 9.5 < sigmoid_loss(image, text, torch.arange(batch), scale=10.0, bias=-10.0) < 10.5


def test_sigmoid_gradient():
    inputs = (unit(4, 5), unit(4, 5), torch.tensor(3.0).double(), torch.tensor(-2.0).double())
    assert gradcheck(
        lambda image, text, scale, bias: sigmoid_loss(image, text, IDS, scale=scale, bias=bias),
        [x.requires_grad_() for x in inputs],
    )


# --- Items that are wrong for one row ---------------------------------------------------------------------------------

GIVEN = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1]]).bool()


def loop_own(row: Tensor, wrong: Wrong, i: int) -> list[float]:
    """Similarities of row i with its own wrong items that are there."""
    return [loop_scores(row[i : i + 1], wrong.embedding[i, k : k + 1])[0][0] for k in range(2) if wrong.given[i, k]]


@pytest.mark.parametrize("rows", [None, 3])
def test_info_nce_with_wrong_items_equals_the_loop(rows):
    image, text = unit(4, 6), unit(4, 6)
    wrong_text, wrong_image = Wrong(unit(4, 2, 6), GIVEN), Wrong(unit(4, 2, 6), GIVEN.flip(0))
    scores, expected = loop_scores(image, text), 0.0
    for row, wrong, score in (
        (image, wrong_text, lambda i, j: scores[i][j]),
        (text, wrong_image, lambda i, j: scores[j][i]),
    ):
        for i in range(4):
            columns = [score(i, j) for j in range(4)] + loop_own(row, wrong, i)
            log_sum = math.log(sum(math.exp(9.0 * s) for s in columns))
            positive = [score(i, j) for j in range(4) if IDS[i] == IDS[j]]
            target = 0.9 * sum(positive) / len(positive) + 0.1 * sum(score(i, j) for j in range(4)) / 4
            expected += (log_sum - 9.0 * target) / 4 / 2
    settings = {"scale": 9.0, "label_smoothing": 0.1, "wrong_text": wrong_text, "wrong_image": wrong_image}
    assert close(info_nce(image, text, IDS, rows=rows, **settings), expected)


@pytest.mark.parametrize("rows", [None, 3])
def test_sigmoid_with_wrong_items_equals_the_loop(rows):
    image, text = unit(4, 3, 6), unit(4, 6)
    wrong_text, wrong_image = Wrong(unit(4, 2, 6), GIVEN), Wrong(unit(4, 2, 3, 6), GIVEN.flip(0))
    expected = 4 * float(sigmoid_loss(image, text, IDS, scale=10.0, bias=-2.0))
    for i in range(4):
        images = [loop_scores(wrong_image.embedding[i, k : k + 1], text[i : i + 1])[0][0] for k in range(2)]
        found = loop_own(image, wrong_text, i) + [s for k, s in enumerate(images) if wrong_image.given[i, k]]
        expected += sum(math.log(1 + math.exp(10 * s - 2)) for s in found)
    settings = {"scale": 10.0, "bias": -2.0, "wrong_text": wrong_text, "wrong_image": wrong_image}
    assert close(sigmoid_loss(image, text, IDS, rows=rows, **settings), expected / 4)


@pytest.mark.parametrize("loss", [info_nce, partial(sigmoid_loss, bias=-1.0)], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("rows", [None, 2])
def test_gradient_with_wrong_items(loss, rows):
    """Row by row, too, and into the scale although some logits are minus infinity."""

    def value(image, text, texts, images, scale):
        wrong = {"wrong_text": Wrong(texts, GIVEN), "wrong_image": Wrong(images, GIVEN)}
        return loss(image, text, IDS, scale=scale, rows=rows, **wrong)

    inputs = (unit(4, 3), unit(4, 3), unit(4, 2, 3), unit(4, 2, 3), torch.tensor(3.0).double())
    assert gradcheck(value, [x.requires_grad_() for x in inputs])


def test_wrong_items_of_other_shape_are_named():
    with pytest.raises(
        ValueError, match=r"wrong items \(3, 2, 6\) with a mask \(3, 2\) for 4 rows; expected \[B, K, E\]"
    ):
        info_nce(unit(4, 6), unit(4, 6), IDS, scale=1.0, wrong_text=Wrong(unit(3, 2, 6), GIVEN[:3]))


# --- Contrast with masked false negatives -----------------------------------------------------------------------------


@pytest.mark.parametrize("within", [True, False])
def test_masked_info_nce_equals_the_loop(within):
    query, document, wrong = unit(4, 3), unit(4, 3), Wrong(unit(4, 2, 3), GIVEN)
    found = [loop_scores(a, b) for a, b in ((query, document), (query, query), (document, document))]
    expected, left_out = 0.0, 0
    for i in range(4):
        positive = found[0][i][i]
        others = [s[i][j] for s in (found if within else found[:1]) for j in range(4) if IDS[i] != IDS[j]]
        others += loop_own(query, wrong, i)
        kept = [s for s in others if s <= positive + 0.1]
        left_out += len(others) - len(kept)
        expected += math.log(math.exp(5 * positive) + sum(math.exp(5 * s) for s in kept)) - 5 * positive
    assert 0 < left_out < 20
    assert close(masked_info_nce(query, document, IDS, scale=5.0, wrong=wrong, margin=0.1, within=within), expected / 4)


def test_later_stages_drop_exactly_two_sums():
    """Orthogonal pairs at scale 2: Z is e^2 + 1 without and e^2 + 3 with the sums within a modality."""
    eye, ids = torch.eye(2, dtype=torch.float64), torch.arange(2)
    assert close(masked_info_nce(eye, eye, ids, scale=2.0), math.log(1 + math.exp(-2)))
    assert close(masked_info_nce(eye, eye, ids, scale=2.0, within=True), math.log(1 + 3 * math.exp(-2)))
    assert masked_info_nce(eye, eye, torch.zeros(2), scale=2.0) == 0  # a duplicate is no negative


def test_masked_info_nce_gradient():
    inputs = (unit(4, 3), unit(4, 3), unit(4, 2, 3), torch.tensor(3.0).double())
    assert gradcheck(
        lambda q, d, w, scale: masked_info_nce(q, d, IDS, scale=scale, wrong=Wrong(w, GIVEN), within=True),
        [x.requires_grad_() for x in inputs],
    )


def test_masked_info_nce_needs_one_vector_per_item():
    with pytest.raises(ValueError, match=r"queries \(4, 3, 6\).*one vector per item"):
        masked_info_nce(unit(4, 3, 6), unit(4, 6), IDS, scale=1.0)


# --- Distillation -----------------------------------------------------------------------------------------------------


def test_distillation_equals_the_loop():
    logits, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    given = torch.cat([torch.ones(4, 1).bool(), GIVEN], dim=1)
    teacher = teacher.masked_fill(~given, math.nan)  # nobody knows what a teacher says of nothing
    expected = 0.0
    for i in range(4):
        there = [c for c in range(3) if given[i, c]]
        sums = [sum(math.exp(float(x[i, c]) / t) for c in there) for x, t in ((teacher, 2.0), (logits, 1.0))]
        for c in there:
            expected -= math.exp(float(teacher[i, c]) / 2) / sums[0] * (float(logits[i, c]) - math.log(sums[1]))
    assert close(distillation_loss(logits, teacher, given, temperature=2.0), expected / 4)
    assert close(distillation_loss(logits[:, :1], teacher[:, :1]), 0.0)  # nothing to order


def test_distillation_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda x: distillation_loss(x, teacher), [student])
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    expected = (student.softmax(1) - teacher.softmax(1)) / 3  # of a cross-entropy
    assert torch.allclose(student.grad, expected)
    with pytest.raises(ValueError, match=r"logits \(3, 4\), teacher \(3, 3\)"):
        distillation_loss(student, teacher[:, :3])
    with pytest.raises(ValueError, match="Query 1 has no candidate"):
        distillation_loss(student, teacher, torch.tensor([True, False, True])[:, None].expand(3, 4))


# --- Few bits ---------------------------------------------------------------------------------------------------------


def test_lsq_equals_the_loop_in_value_and_gradient():
    """Against the rule of the paper: inside, x passes and the step gets round(x/s) - x/s; beyond, x stops and it gets -Q or Q."""
    x = (2 * torch.randn(5, 4, dtype=torch.float64)).requires_grad_()
    step, levels = torch.tensor(0.4, dtype=torch.float64, requires_grad=True), 3
    weight = torch.randn(5, 4, dtype=torch.float64)
    out = lsq(x, step, levels)
    (out * weight).sum().backward()
    expected_step, clipped = 0.0, 0
    for value, w, code, grad in zip(*(t.flatten().tolist() for t in (x, weight, out, x.grad))):
        ratio = value / 0.4
        inside = abs(ratio) <= levels
        clipped += not inside
        level = round(ratio) if inside else math.copysign(levels, ratio)
        assert close(code, level * 0.4) and close(grad, w if inside else 0.0)
        expected_step += w * (level - ratio if inside else level)
    assert 0 < clipped < 20
    assert close(step.grad, expected_step / math.sqrt(4 * levels))


def test_one_bit_is_the_sign_with_the_gradient_of_the_identity():
    x = torch.tensor([0.3, -0.2, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    out = one_bit(x)
    (out * torch.arange(4)).sum().backward()
    assert out.tolist() == [1, -1, -1, 1] and x.grad.tolist() == [0, 1, 2, 3]


def test_quantised_is_the_mean_over_three_precisions():
    image, text, step = unit(4, 16), unit(4, 16), torch.tensor(0.14, dtype=torch.float64)
    loss = partial(info_nce, image_id=IDS, scale=9.0)
    signs = [torch.where(x > 0, 1.0, -1.0).double() / 4 for x in (image, text)]
    codes = [F.normalize((x * 4 / 0.14).round().clamp(-127, 127), dim=-1) for x in (image, text)]
    assert close(quantised(loss, image, text, step=step), (loss(image, text) + loss(*codes) + loss(*signs)) / 3)
    # Around it, Matryoshka quantises prefixes at the same step, in units of their own root mean square.
    both = matryoshka(partial(quantised, loss, step=step), image, text, dims=[4, 16])
    prefix = [F.normalize(x[:, :4], dim=-1) for x in (image, text)]
    assert close(both, (quantised(loss, *prefix, step=step) + quantised(loss, image, text, step=step)) / 2)


# --- Matching ---------------------------------------------------------------------------------------------------------


def test_hard_negatives_never_show_the_same_image():
    """Even where the same image is by far the most similar."""
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    scores = 1000.0 * (ids[:, None] == ids[None, :]).float()
    for _ in range(200):
        text_index, image_index = sample_hard_negatives(scores, ids, ids)
        assert (ids[text_index] != ids).all() and (ids[image_index] != ids).all()


def chi_square(drawn: Tensor, probability: Tensor) -> float:
    expected = probability * len(drawn)
    observed = torch.bincount(drawn, minlength=len(probability))
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    return float(((observed - expected)[possible] ** 2 / expected[possible]).sum())


def test_hard_negatives_follow_the_softmax():
    """20,000 equal rows are 20,000 draws. Column 0 is their own image, which leaves 5 candidates, 4 degrees of freedom:
    one honest sampler in a thousand passes 18.47."""
    draws, limit = 20_000, 18.47
    generator = torch.Generator().manual_seed(0)
    row = torch.tensor([9.0, 0.0, 1.0, -1.0, 2.0, 0.5])
    few, many = torch.arange(6), torch.zeros(draws, dtype=torch.long)
    other = torch.tensor([99])  # gives text 0 a negative
    expected = torch.cat([torch.zeros(1), row[1:].softmax(0)])

    scores = torch.cat([row.expand(draws, 6), torch.zeros(1, 6)])
    text_index, _ = sample_hard_negatives(scores, torch.cat([many, other]), few, generator)
    assert chi_square(text_index[:draws], expected) < limit
    _, image_index = sample_hard_negatives(scores.T, few, torch.cat([many, other]), generator)
    assert chi_square(image_index[:draws], expected) < limit
    assert chi_square(text_index[:draws], torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2])) > limit  # the test can fail


def test_hard_negatives_repeat_with_the_generator():
    scores, ids = torch.randn(16, 16), torch.arange(16)
    first, again, other = (
        sample_hard_negatives(scores, ids, ids, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_hard_negatives_carry_no_gradient_and_take_bfloat16():
    scores, ids = torch.randn(4, 4, dtype=torch.bfloat16, requires_grad=True), torch.arange(4)
    assert all(
        not index.is_floating_point() and not index.requires_grad for index in sample_hard_negatives(scores, ids, ids)
    )


def test_hard_negatives_need_two_images():
    with pytest.raises(
        ValueError, match=r"image at row 0 \(image id 5\) has no negative: 1 of the 1 texts.*at least 2 different"
    ):
        sample_hard_negatives(torch.zeros(1, 1), torch.tensor([5]), torch.tensor([5]))
    with pytest.raises(ValueError, match=r"image at row 0 \(image id 5\) has no negative: 3 of the 3 texts"):
        sample_hard_negatives(torch.zeros(3, 3), torch.full((3,), 5), torch.full((3,), 5))
    with pytest.raises(ValueError, match=r"text at row 1 \(image id 2\) has no negative: 1 of the 1 images"):
        sample_hard_negatives(torch.zeros(1, 2), torch.tensor([2]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"similarity \(3, 2\) with image_id \(3,\) and text_image_id \(3,\)"):
        sample_hard_negatives(torch.zeros(3, 2), torch.arange(3), torch.arange(3))


def test_several_hard_negatives_are_different_ones_and_follow_the_softmax():
    """Of two drawn without replacement, {a, b} has the probability p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b)."""
    draws, generator = 20_000, torch.Generator().manual_seed(0)
    row = torch.tensor([9.0, 0.0, 1.0, -1.0])
    many, few = torch.zeros(draws, dtype=torch.long), torch.arange(4)
    scores = torch.cat([row.expand(draws, 4), torch.zeros(2, 4)])
    ids = torch.cat([many, torch.tensor([98, 99])])  # two more images, of which text 0 may take its negatives
    drawn, _ = sample_hard_negatives(scores, ids, few, generator, count=2)
    drawn = drawn[:draws]
    assert (drawn[:, 0] != drawn[:, 1]).all() and (drawn != 0).all()
    p = row[1:].softmax(0)
    pairs = [(1, 2), (1, 3), (2, 3)]
    expected = torch.tensor([p[a - 1] * p[b - 1] * (1 / (1 - p[a - 1]) + 1 / (1 - p[b - 1])) for a, b in pairs])
    number = {pair: i for i, pair in enumerate(pairs)}
    found = torch.tensor([number[(a, b)] for a, b in drawn.sort(dim=1).values.tolist()])
    assert chi_square(found, expected) < 13.82  # 2 degrees of freedom, one in a thousand
    with pytest.raises(ValueError, match=r"image at row 0 .* has only 1 of 2 negatives.*at least 3 different images"):
        sample_hard_negatives(torch.zeros(2, 2), torch.arange(2), torch.arange(2), count=2)


def test_listwise_loss_equals_a_loop_and_needs_a_second_candidate():
    lists = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loop = sum(math.log(sum(math.exp(float(x - row[0])) for x in row)) for row in lists) / 3
    assert close(listwise_loss(lists), loop)
    assert gradcheck(listwise_loss, [lists])
    assert listwise_loss(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"logits \(5, 1\); expected \[Q, 1 \+ K\], the true candidate first"):
        listwise_loss(torch.zeros(5, 1))


def test_matching_loss_equals_two_way_cross_entropy():
    two_way, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([1, 0, 0, 1, 0, 0])
    expected = F.cross_entropy(two_way, labels)
    assert close(matching_loss(two_way[:, 1] - two_way[:, 0], labels), expected)
    assert close(matching_loss(two_way[:, 1] - two_way[:, 0], labels.bool()), expected)
    loop = sum(math.log(1 + math.exp(float((no - yes) * (2 * y - 1)))) for (no, yes), y in zip(two_way, labels)) / 6
    assert close(expected, loop)


def test_matching_loss_golden_gradient_and_dtype():
    assert close(matching_loss(torch.tensor([0.0, 0.0]).double(), torch.tensor([1, 0])), math.log(2))
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: matching_loss(x, torch.tensor([1, 0, 0, 1, 0])), [logits])
    assert matching_loss(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1, 0])).dtype == torch.float32


def test_matching_loss_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"logits \(6, 2\) and labels \(6,\); expected \[P\]"):
        matching_loss(torch.zeros(6, 2), torch.zeros(6))
    with pytest.raises(ValueError, match=r"logits \(6,\) and labels \(5,\)"):
        matching_loss(torch.zeros(6), torch.zeros(5))


# --- Captioning -------------------------------------------------------------------------------------------------------

CAPTION_MASK = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
).bool()  # full, right-padded, left-padded


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_caption_loss_equals_the_double_loop(smoothing):
    logits, ids = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    total, count = 0.0, 0
    for b in range(3):
        for i in range(4):
            if CAPTION_MASK[b, i] and CAPTION_MASK[b, i + 1]:
                log_sum = math.log(sum(math.exp(x) for x in logits[b, i]))
                for v in range(7):
                    target = (1 - smoothing) * float(ids[b, i + 1] == v) + smoothing / 7
                    total -= target * (float(logits[b, i, v]) - log_sum)
                count += 1
    assert count == 4 + 2 + 2
    assert close(caption_loss(logits, ids, CAPTION_MASK, label_smoothing=smoothing), total / count)


def test_caption_loss_golden():
    """Two words, one to predict, with probability 3/4."""
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, -5.0]]], dtype=torch.float64)
    value = caption_loss(logits, torch.tensor([[0, 1]]), torch.ones(1, 2).bool(), label_smoothing=0.0)
    assert close(value, math.log(4 / 3))


def test_caption_loss_shifts():
    """Logits that know the next token cost nothing; logits that repeat the current one do."""
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4).bool()
    knows_next = 50.0 * F.one_hot(torch.tensor([[2, 3, 4, 0]]), 5).double()
    repeats = 50.0 * F.one_hot(ids, 5).double()
    assert caption_loss(knows_next, ids, mask, label_smoothing=0.0) < 1e-10
    assert caption_loss(repeats, ids, mask, label_smoothing=0.0) > 10


def test_caption_loss_ignores_pads():
    logits, ids = torch.randn(3, 5, 7, requires_grad=True), torch.randint(7, (3, 5))
    loss = caption_loss(logits, ids, CAPTION_MASK)
    loss.backward()
    assert logits.grad is not None
    used = CAPTION_MASK & torch.cat([CAPTION_MASK[:, 1:], torch.zeros(3, 1).bool()], dim=1)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, used)
    other_pads = ids.masked_fill(~CAPTION_MASK, 6)
    assert torch.equal(loss, caption_loss(logits, other_pads, CAPTION_MASK))
    longer = F.pad(logits.detach(), (0, 0, 0, 2)), F.pad(ids, (0, 2)), F.pad(CAPTION_MASK, (0, 2))
    assert close(loss.detach(), caption_loss(*longer), 1e-6)


def test_caption_loss_gradient_and_dtype():
    logits, ids = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True), torch.randint(4, (3, 5))
    assert gradcheck(lambda x: caption_loss(x, ids, CAPTION_MASK), [logits])
    assert caption_loss(logits.bfloat16(), ids, CAPTION_MASK).dtype == torch.float32


def test_caption_loss_errors():
    ids, mask = torch.zeros(3, 5).long(), torch.ones(3, 5).bool()
    with pytest.raises(ValueError, match=r"logits \(3, 4, 7\), ids \(3, 5\) and mask \(3, 5\)"):
        caption_loss(torch.zeros(3, 4, 7), ids, mask)
    with pytest.raises(ValueError, match=r"ids \(3, 5\) and mask \(3, 4\)"):
        caption_loss(torch.zeros(3, 5, 7), ids, mask[:, :4])
    with pytest.raises(ValueError, match=r"L of at least 2"):
        caption_loss(torch.zeros(3, 1, 7), ids[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match=r"mask of shape \(3, 4\) has no real entry"):
        caption_loss(torch.zeros(3, 5, 7), ids, ~mask)


# --- Matryoshka -------------------------------------------------------------------------------------------------------


def test_matryoshka_at_full_dim_is_the_base_loss():
    image, text = unit(4, 3, 8), unit(4, 8)
    base = partial(info_nce, image_id=IDS, scale=6.0)
    assert close(matryoshka(base, image, text, dims=[8]), base(image, text))


def test_matryoshka_is_the_weighted_mean_over_renormalised_prefixes():
    image, text = unit(4, 8), unit(4, 8)
    base = partial(info_nce, image_id=IDS, scale=6.0)
    losses = []
    for dim in (2, 4, 8):
        cut = [
            torch.stack([row[:dim] / math.sqrt(sum(float(x) ** 2 for x in row[:dim])) for row in e])
            for e in (image, text)
        ]
        losses.append(base(*cut))
    assert close(matryoshka(base, image, text, dims=[2, 4, 8]), sum(losses) / 3)
    weighted = (1 * losses[0] + 2 * losses[1] + 5 * losses[2]) / 8
    assert close(matryoshka(base, image, text, dims=[2, 4, 8], weights=[1, 2, 5]), weighted)


def test_matryoshka_hands_the_loss_unit_vectors():
    seen: list[Tensor] = []

    def record(image: Tensor, text: Tensor) -> Tensor:
        seen.extend([image, text])
        return image.sum() + text.sum()

    matryoshka(record, unit(4, 3, 8), unit(4, 8), dims=[3, 8])
    assert [x.shape for x in seen] == [(4, 3, 3), (4, 3), (4, 3, 8), (4, 8)]
    assert all(torch.allclose(x.norm(dim=-1), torch.ones(1, dtype=torch.float64)) for x in seen)


def test_matryoshka_gradient():
    base = partial(info_nce, image_id=IDS, scale=6.0)
    inputs = [x.requires_grad_() for x in (unit(4, 6), unit(4, 6))]
    assert gradcheck(lambda image, text: matryoshka(base, image, text, dims=[2, 6]), inputs)


def test_matryoshka_errors():
    base = partial(info_nce, image_id=IDS, scale=1.0)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 8\), \(4, 6\)\]; expected one common last dimension"):
        matryoshka(base, unit(4, 8), unit(4, 6), dims=[4])
    for dims in ([], [0, 8], [4, 16]):
        with pytest.raises(
            ValueError, match=r"dims .* for embeddings of width 8; expected at least one, each from 1 to 8"
        ):
            matryoshka(base, unit(4, 8), unit(4, 8), dims=dims)
    for weights in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match=r"weights .* for dims \[4, 8\]; expected one per dim, none negative"):
            matryoshka(base, unit(4, 8), unit(4, 8), dims=[4, 8], weights=weights)


# --- Flow and conditioning --------------------------------------------------------------------------------------------


def test_flow_matching_equals_the_loop():
    prediction, target = torch.randn(3, 2, 2, 2).double(), torch.randn(3, 2, 2, 2).double()
    weight = torch.tensor([0.5, 2.0, 0.0]).double()
    per_sample = [
        sum(float(a - b) ** 2 for a, b in zip(p.flatten(), t.flatten())) / 8 for p, t in zip(prediction, target)
    ]
    assert close(flow_matching_loss(prediction, target), sum(per_sample) / 3)
    assert close(flow_matching_loss(prediction, target, weight), sum(w * e for w, e in zip(weight, per_sample)) / 3)
    prediction.requires_grad_()
    assert gradcheck(lambda x: flow_matching_loss(x, target, weight), [prediction])


def test_conditioning_equals_the_loop():
    output, target = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    total = 0.0
    for b in range(3):
        for n in range(4):
            if mask[b, n]:
                total += sum(float(x - y) ** 2 for x, y in zip(output[b, n], target[b, n])) / 5
    assert close(conditioning_loss(output, target, mask), total / 7)
    output.requires_grad_()
    assert gradcheck(lambda x: conditioning_loss(x, target, mask), [output])


def test_regressions_golden_and_float32():
    prediction, target = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])
    assert flow_matching_loss(prediction, target) == 2.5
    assert conditioning_loss(prediction, target, torch.ones(1, 1).bool()) == 2.5
    half = prediction.bfloat16(), target.bfloat16()
    assert flow_matching_loss(*half).dtype == conditioning_loss(*half, torch.ones(1, 1).bool()).dtype == torch.float32


def test_regressions_refuse_what_would_broadcast():
    with pytest.raises(ValueError, match=r"prediction \(3, 2, 4, 4\) and a target \(3, 1, 4, 4\)"):
        flow_matching_loss(torch.zeros(3, 2, 4, 4), torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"weight \(1,\) for velocities \(3, 2, 4, 4\); expected one per sample"):
        flow_matching_loss(torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4), torch.ones(1))
    with pytest.raises(ValueError, match=r"prediction \(3, 4, 5\) and a target \(3, 4, 6\)"):
        conditioning_loss(torch.zeros(3, 4, 5), torch.zeros(3, 4, 6), torch.ones(3, 4).bool())
    with pytest.raises(ValueError, match=r"mask \(3, 5\) for states \(3, 4, 5\)"):
        conditioning_loss(torch.zeros(3, 4, 5), torch.zeros(3, 4, 5), torch.ones(3, 5).bool())
    with pytest.raises(ValueError, match=r"mask of shape \(3, 4\) has no real entry"):
        conditioning_loss(torch.zeros(3, 4, 5), torch.zeros(3, 4, 5), torch.zeros(3, 4).bool())


def slow_triplet(scores: torch.Tensor, ids: torch.Tensor, margin: float, hardest: bool) -> float:
    total = 0.0
    for i in range(len(scores)):
        for line, own in ((scores[i], scores[i, i]), (scores[:, i], scores[i, i])):
            hinges = [max(0.0, margin + float(line[j] - own)) for j in range(len(scores)) if ids[j] != ids[i]]
            total += max(hinges, default=0.0) if hardest else sum(hinges)
    return total


@pytest.mark.parametrize("hardest", [True, False])
def test_triplets_are_those_of_a_plain_loop(hardest: bool) -> None:
    scores = torch.randn(6, 6, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 1, 4, 5])
    assert float(triplet_loss(scores, ids, hardest=hardest)) == pytest.approx(slow_triplet(scores, ids, 0.2, hardest))
    alone = torch.arange(6)  # without ids another caption of the image counts as wrong, as in SCAN
    assert float(triplet_loss(scores, hardest=hardest)) == pytest.approx(slow_triplet(scores, alone, 0.2, hardest))


def test_triplets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores \(3, 4\); expected \[B, B\]"):
        triplet_loss(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"image_id \(2,\) for scores \(3, 3\)"):
        triplet_loss(torch.zeros(3, 3), torch.zeros(2))


# --- Rewards ----------------------------------------------------------------------------------------------------------


def test_self_critical_loss_equals_a_loop_and_its_gradient_the_advantage() -> None:
    log_probs = (-torch.rand(3, 4, 5, dtype=torch.float64)).requires_grad_()
    lengths = torch.randint(1, 6, (3, 4))
    mask = torch.arange(5) < lengths[..., None]
    rewards = torch.rand(3, 4, dtype=torch.float64)
    total, real, gradient = 0.0, int(mask.sum()), torch.zeros(3, 4, 5, dtype=torch.float64)
    for b in range(3):
        for k in range(4):
            others = [float(rewards[b, j]) for j in range(4) if j != k]
            advantage = float(rewards[b, k]) - sum(others) / 3
            for place in range(int(lengths[b, k])):
                total -= advantage * float(log_probs[b, k, place]) / real
                gradient[b, k, place] = -advantage / real
    loss = self_critical_loss(log_probs, mask, rewards)
    assert close(loss, total)
    loss.backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, gradient)
    # What all draws of an image share does not matter.
    moved = rewards + torch.tensor([[3.0], [-2.0], [0.5]], dtype=torch.float64)
    assert close(self_critical_loss(log_probs, mask, moved), total)


def test_self_critical_loss_refuses_what_has_no_baseline() -> None:
    log_probs = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match="Got 1 caption of each image; its baseline is the others, so draw at least 2"):
        self_critical_loss(log_probs, torch.ones(2, 1, 3, dtype=torch.bool), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"rewards \(2, 2\); expected \[B, K, L\], \[B, K, L\] and \[B, K\]"):
        self_critical_loss(log_probs, torch.ones(2, 1, 3, dtype=torch.bool), torch.zeros(2, 2))
