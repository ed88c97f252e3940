"""Calibration on logits whose truth is known, and the cost curve against `unimodal.metrics`."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_model, toy_processor

from unimodal.cli import main
from unimodal.data.readers import KarpathyJson
from unimodal.inference import Unimodal
from unimodal.metrics import first_stage, second_stage
from unimodal.search import Calibration, Encoder, build_index, calibrate
from unimodal.search.calibrate import expected_calibration_error, held_out_check
from unimodal.search.tune import Pairing, Setting, cheapest, cost_curve, held_out_pairs

# Calibration.


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that say too much, z = 3 u + 2, of pairs that are true with probability sigmoid(u - 1)."""
    random = torch.Generator().manual_seed(seed)
    u = 3 * torch.randn(count, generator=random, dtype=torch.float64)
    return 3 * u + 2, torch.rand(count, generator=random) < (u - 1).sigmoid()


def test_the_true_scale_and_offset_are_found() -> None:
    found = calibrate(*drawn(100_000, 0))
    assert found.scale == pytest.approx(1 / 3, abs=0.01)  # u - 1 = (z - 2) / 3 - 1
    assert found.offset == pytest.approx(-5 / 3, abs=0.04)
    logits, labels = drawn(20_000, 1)  # fresh
    before, after = (expected_calibration_error(p, labels) for p in (logits.sigmoid(), found.probability(logits)))
    assert before > 0.1 and after < 0.01
    assert found.error_before > 0.1 and found.error_after < 0.01


def test_newton_agrees_with_a_general_optimiser() -> None:
    logits, labels = drawn(500, 3)
    found = calibrate(logits, labels)
    true, wrong = int(labels.sum()), int((~labels).sum())
    target = torch.where(
        labels,
        torch.tensor((true + 1) / (true + 2), dtype=torch.float64),
        torch.tensor(1 / (wrong + 2), dtype=torch.float64),
    )
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(w[0] * logits + w[1], target)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert (found.scale, found.offset) == pytest.approx(tuple(w.tolist()), abs=1e-5)


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.97])
def test_a_threshold_means_a_precision_on_fresh_pairs(precision: float) -> None:
    found = calibrate(*drawn(20_000, 0))
    logits, labels = drawn(200_000, 1)
    passed = found.probability(logits) >= found.threshold_for(precision)
    assert 0 < passed.sum() < len(labels)
    assert float(labels[passed].float().mean()) == pytest.approx(precision, abs=0.015)


def test_thresholds_are_counted_where_the_sigmoid_does_not_fit() -> None:
    """Above 0 nine of ten pairs are right, however sure the sigmoid of so many easy wrong ones becomes."""
    random = torch.Generator().manual_seed(0)
    logits = torch.cat([-8 + torch.randn(50_000, generator=random), 8 * torch.rand(2000, generator=random)])
    labels = torch.cat([torch.zeros(50_000, dtype=torch.bool), torch.rand(2000, generator=random) < 0.9])
    found = calibrate(logits, labels)
    passed = found.probability(logits) >= found.threshold_for(0.85)
    assert 0.85 < float(labels[passed].double().mean()) < 0.88 and passed.sum() > 1900
    with pytest.raises(ValueError, match=r"reaches the precision 0.97 for certain, 0.9\d+ at most; ask for less"):
        found.threshold_for(0.97)


def test_the_lower_end_of_the_interval_by_hand() -> None:
    found = calibrate(torch.arange(10.0), torch.arange(10) >= 5)
    lows = []
    for n in range(10, 0, -1):  # of the n surest pairs
        share, z = min(n, 5) / n, 1.645
        centre, width = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
        lows.append((centre - width) / (1 + z**2 / n))
    assert found.curve[-1][1] == pytest.approx(max(lows)) and max(lows) == pytest.approx(5 / (5 + 1.645**2))
    assert found.threshold_for(0.6) == pytest.approx(float(found.probability(torch.tensor([5.0]))))


def test_the_check_counts_pairs_of_images_that_the_fit_did_not_see() -> None:
    logits, labels = drawn(20_000, 0)
    image_id = torch.arange(20_000) // 20 * 7
    found = held_out_check(logits, labels, image_id, (0.5, 0.9, 0.999999))
    assert found.error < 0.02 and found.passed[0.999999] == (0, 0)  # no pair is as sure
    for precision in (0.5, 0.9):
        pairs, right = found.passed[precision]
        assert pairs > 1000 and right / pairs == pytest.approx(precision, abs=0.02)


def test_the_check_by_hand() -> None:
    """Each half is fitted alone; the other is counted at its threshold."""
    logits, labels = drawn(400, 5)
    image_id = torch.arange(400) % 2
    found = held_out_check(logits, labels, image_id, (0.6,))
    pairs = right = 0
    for seen in (0, 1):
        fit = calibrate(logits[image_id == seen], labels[image_id == seen])
        for z, y in zip(logits[image_id != seen].tolist(), labels[image_id != seen].tolist()):
            if 1 / (1 + np.exp(-fit.scale * z - fit.offset)) >= fit.threshold_for(0.6):
                pairs, right = pairs + 1, right + y
    assert found.passed == {0.6: (pairs, right)} and pairs > 20


def test_calibration_error_by_hand() -> None:
    p, y = torch.tensor([0.1, 0.1, 0.9, 0.9]), torch.tensor([False, True, True, True])
    assert expected_calibration_error(p, y, bins=2) == pytest.approx(0.5 * abs(0.1 - 0.5) + 0.5 * abs(0.9 - 1))


def test_separable_pairs_have_a_finite_answer_and_the_file_comes_back(tmp_path: Path) -> None:
    found = calibrate(torch.tensor([-3.0, -2.0, 2.0, 3.0]), torch.tensor([False, False, True, True]), model="abc")
    assert 0 < found.scale < 10
    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found
    (tmp_path / "calibration.json").write_text('{"scale": 1}')
    with pytest.raises(ValueError, match="is no calibration"):
        Calibration.load(tmp_path / "calibration.json")
    with pytest.raises(
        ValueError, match=r"no threshold reaches the precision 0.999 for certain, 0.4\d+ at most; ask for less"
    ):
        found.threshold_for(0.999)
    with pytest.raises(ValueError, match="a share between 0 and 1, got 95"):
        found.threshold_for(95)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0, 2.0], [True], r"logits and labels \[P\], got \[2\] and \[1\]"),
        ([1.0, 2.0], [True, True], "both true and wrong pairs, got 2 true ones of 2"),
        ([1.0, float("nan")], [True, False], "logits: expected finite numbers"),
        ([1.0, 2.0, 3.0, 4.0], [True, True, False, False], "rank true pairs below wrong ones"),
    ],
)
def test_pairs_that_say_nothing_are_refused(logits: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(torch.tensor(logits), torch.tensor(labels))


# The cost curve.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of noise with two captions each; a model with random weights ranks them by chance."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "images").mkdir()
    random, images = np.random.default_rng(0), []
    words = ["red", "blue", "large", "small", "circle", "square", "star", "green", "yellow", "left"]
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        sentences = [{"raw": " ".join(random.choice(words, 5)) + f" {c}"} for c in range(2)]
        images.append({"filename": f"{i}.png", "split": "val", "sentences": sentences})
    (folder / "data.json").write_text(json.dumps({"dataset": "noise", "images": images}))
    return folder / "data.json"


@pytest.fixture(scope="module")
def pairing(data: Path) -> Pairing:
    return Pairing(Encoder(toy_model(), toy_processor()), KarpathyJson(data, split="val"))


@pytest.mark.parametrize("combine", ["replace", "sum"])
def test_recall_is_that_of_the_metrics(pairing: Pairing, combine) -> None:
    settings = cost_curve(pairing, depths=(0, 5, 24), precisions=("float32", "int8"), combine=combine, match_scale=0.1)
    for k in (0, 5, 24):
        t2i, i2t = first_stage(pairing.image.embedding, pairing.text.embedding, pairing.text_image_id, k=max(k, 1))
        expected = []
        for side, found in (("text", t2i), ("image", i2t)):
            rank = found.rank
            if k:
                pairs = [(q, int(r)) for q, rows in enumerate(found.index) for r in rows]
                scores = pairing.match(side, pairs).view_as(found.scores)
                rank = second_stage(found, found.scores + 0.1 * scores if combine == "sum" else scores)
            expected.append(float((rank == 1).float().mean()))
        some = [one for one in settings if one.k == k]
        assert [(one.precision, one.width) for one in some] == [
            ("float32", 8),
            ("float32", 16),
            ("int8", 8),
            ("int8", 16),
        ]
        for one in some:  # every candidate of so few is looked at, whatever the first pass reads
            assert (one.text_to_image, one.image_to_text) == pytest.approx(tuple(expected))
        assert 0 < sum(expected) < 2
    assert [one.memory for one in settings[::3]] == [4 * 8 + 8, 4 * 16 + 8, 8 + 4 + 8, 16 + 4 + 8]
    assert settings[0].disk == 4 * 16 and settings[1].disk == 4 * 16 + 4 * (32 + 4)


def test_cached_scores_are_those_of_a_search(pairing: Pairing) -> None:
    index = build_index(pairing.encoder, [{"image": np.zeros((4, 4, 3), np.uint8)}])
    assert len(index) == 1
    pairs = [(3, 5), (0, 1), (3, 5)]
    first = pairing.match("text", pairs)
    assert torch.equal(first, pairing.match("text", pairs)) and first[0] == first[2]
    both = [(pairing.image.tokens[row], pairing.text.tokens[query]) for query, row in pairs]
    assert torch.allclose(first, pairing.encoder.match(both, 1), atol=1e-5)


def setting(k: int, recall: float, milliseconds: float, memory: float = 1) -> Setting:
    return Setting(
        precision="int8", width=8, k=k, text_to_image=recall, image_to_text=0, milliseconds=milliseconds, memory=memory,
        disk=0,
    )  # fmt: skip


def test_the_cheapest_that_reaches_a_recall() -> None:
    settings = [setting(0, 0.2, 1), setting(8, 0.5, 5, 2), setting(16, 0.5, 5, 1), setting(32, 0.6, 9)]
    assert [cheapest(settings, recall) for recall in (0.1, 0.3, 0.6, 0.7)] == [
        settings[0],
        settings[2],
        settings[3],
        None,
    ]


def test_tune_and_calibrate_from_the_shell(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    Unimodal(toy_model(), toy_processor()).save_pretrained(model, example=False)
    ask = ["--model", str(model), "--data", str(data), "--queries", "8"]
    assert main(["search", "tune", *ask, "--recall", "0", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "cheapest with R@1 of at least 0: k 0" in output and "noise val" in output
    report = json.loads((tmp_path / "out/cost_curve.json").read_text())
    assert len(report["settings"]) == 6 * 2 * 3 and report["cheapest"]["k"] == 0
    drawing = ElementTree.parse(tmp_path / "out/cost_curve.svg").getroot()
    assert len(drawing.findall("{*}circle")) == 36
    assert main(["search", "tune", *ask, "--recall", "1.1"]) == 0
    assert "no setting reaches R@1 110; the best has" in capsys.readouterr().out

    plain = Unimodal.from_pretrained(model)
    pairs = KarpathyJson(data, split="val")
    logits, labels, image_id = held_out_pairs(Pairing(plain.encoder, pairs, queries=8), 16)
    assert logits.shape == (8 * 16,) and (image_id.view(8, 16) == image_id.view(8, 16)[:, :1]).all()
    found = calibrate(logits if logits[labels].mean() > logits[~labels].mean() else -logits, labels)
    assert found.pairs == 128

    before = plain.predict(("a red circle", data.parent / "images/0.png"))
    fingerprint = plain.encoder.fingerprint()
    Calibration(2.0, 1.0, 4, 2, 0.1, 0.0, ((0.5, 0.9),), fingerprint).save(model / "calibration.json")
    loaded = Unimodal.from_pretrained(model)
    logit = np.log(before / (1 - before))
    after = 1 / (1 + np.exp(-(2 * logit + 1)))
    assert loaded.predict(("a red circle", data.parent / "images/0.png")) == pytest.approx(after, abs=1e-4)
    hit = loaded.search("a red circle", loaded.build_index([data.parent / "images/0.png"], precision="float32"))[0]
    assert hit["rerank_score"] == pytest.approx(after, abs=1e-4)
    loaded.save_pretrained(tmp_path / "copy", example=False)
    assert (tmp_path / "copy/calibration.json").read_text() == (model / "calibration.json").read_text()
    Calibration(2.0, 1.0, 4, 2, 0.1, 0.0, ((0.5, 0.9),), "other").save(model / "calibration.json")
    with pytest.warns(UserWarning, match="was measured on model other, this is model .* calibrate again"):
        assert Unimodal.from_pretrained(model).encoder.calibration is None


def test_calibrate_from_the_shell(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(9):  # with random weights a head ranks true pairs above wrong ones or below them, by chance
        Unimodal(toy_model(seed), toy_processor()).save_pretrained(tmp_path / f"{seed}", example=False)
        status = main(["search", "calibrate", "--model", str(tmp_path / f"{seed}"), "--data", str(data)])
        output = capsys.readouterr()
        if status == 0:
            assert "did not see" in output.out and "precision 0.5: " in output.out
            assert Unimodal.from_pretrained(tmp_path / f"{seed}").encoder.calibration is not None
            return
        assert "rank true pairs below wrong ones" in output.err
    raise AssertionError("no seed ranks true pairs above wrong ones")


def test_a_calibration_is_dropped_with_its_precision_and_that_is_said() -> None:
    model = Unimodal(toy_model(), toy_processor())
    model.encoder.calibration = Calibration(2.0, 1.0, 4, 2, 0.1, 0.0, ((0.5, 0.9),), "any")
    assert model.to("cpu", torch.float32).encoder.calibration is not None
    message = "measured on weights in torch.float32, these are now torch.bfloat16: .* calibrate again"
    with pytest.warns(UserWarning, match=message):
        model.to(dtype=torch.bfloat16)
    assert model.encoder.calibration is None
