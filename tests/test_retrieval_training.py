"""Training for retrieval: large batches on small memory give the gradient of the large batch, hard negatives are mined into
a file that says where it comes from, the embedding learns from the matching head and in few bits, and weights merge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_tasks import trainer
from toy import toy_config, toy_model, toy_processor

from unimodal import chunks, cli
from unimodal.cli import between
from unimodal.cli.messages import ConfigError
from unimodal.data import KarpathyJson, Scenes, write_karpathy
from unimodal.data.items import Item
from unimodal.data.module import PairData
from unimodal.data.negatives import read_negatives, write_negatives
from unimodal.hub import load_checkpoint, save_checkpoint
from unimodal.losses import info_nce, quantised
from unimodal.merge import merge_weights
from unimodal.search import Encoder, dequantise, mine_negatives, quantise
from unimodal.tasks import ITC, ITM, Distillation, EmbeddingObjective, Joint, MaskedITC, Retrieval, SigmoidITC, Step

EMBEDDING = {"dim": 16, "matryoshka": [8], "bias": -10.0, "quantise": True}
FROZEN_VISION = {"*": 1.0, "backbone.vision.*": 0.0}


def config(dropout: float = 0.1, **parts: Any) -> Any:
    """The toy configuration for retrieval, with a bias and a step; `dropout` in text tower, bridge and matching head."""
    whole = toy_config(captioning=None, generation=None, **{"embedding": EMBEDDING, **parts})
    whole.backbone.text.kwargs.update(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    object.__setattr__(whole.bridge, "dropout", dropout)
    if whole.matching is not None:
        object.__setattr__(whole.matching, "dropout", dropout)
    return whole


def data(**settings: Any) -> PairData:
    return PairData(Scenes("train", count=8), Scenes("val", count=2), batch_size=8, **settings)


def task(*objectives: Any, dropout: float = 0.1, **settings: Any) -> Joint:
    named = {type(one).__name__: one for one in objectives}
    return Joint(config(dropout), named, settings.pop("trainable", FROZEN_VISION), pretrained=False, **settings)


def batch_of(one: Joint, module: PairData) -> dict[str, torch.Tensor]:
    one.processor = module.bind(one.config, one.model.backbone)
    return next(iter(module.train_dataloader()))


def gradients(one: Joint, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradient of the weighted sum, in training mode, from one random state."""
    one.train()
    one.zero_grad()
    torch.manual_seed(5)
    losses, _ = one.training_forward(batch)
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Negatives of the eight training scenes by the toy of seed 0, every query kept."""
    encoder = Encoder(toy_model(), toy_processor())
    header, rows = mine_negatives(
        encoder, Scenes("train", count=8), num_negatives=3, top_k=6, positive_threshold=-9.0, margin=9.0
    )
    return write_negatives(tmp_path_factory.mktemp("mined") / "negatives.jsonl", header, rows)


# Objectives.

EVERYTHING = [
    ITC(matryoshka=True, quantise=True, negatives=True),
    SigmoidITC(matryoshka=True, quantise=True, negatives=True),
    MaskedITC(within=True, matryoshka=True, quantise=True, negatives=True),
    Distillation(matryoshka=True, quantise=True),
    Distillation(teacher="file"),
]


@pytest.mark.parametrize("objective", EVERYTHING, ids=lambda x: type(x).__name__)
def test_each_objective_reaches_the_embedding_and_never_the_matching_head(
    objective: EmbeddingObjective, mined: Path
) -> None:
    one = task(objective)
    found = gradients(one, batch_of(one, data(negatives=str(mined), hard_texts=2, hard_images=2)))
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert {"log_scale", "heads.image_embedding.gate", "heads.text_embedding.gate"} <= set(found)
    assert ("pair_bias" in found) == isinstance(objective, SigmoidITC)
    assert ("int8_step" in found) == objective.quantise
    assert not any("matching" in name for name in found)


def test_a_model_without_bias_or_step_says_what_to_set() -> None:
    for objective, message in (
        (SigmoidITC(), "learns a bias and this model has none; set embedding.bias"),
        (ITC(quantise=True), "learns a step and this model has none; set embedding.quantise"),
    ):
        one = Retrieval(toy_config(), objective, pretrained=False)
        with pytest.raises(ValueError, match=message):
            one.training_forward(batch_of(one, data()))
    one = task(Distillation())
    with pytest.raises(
        ValueError, match=r"batch has none; mine some \(unimodal mine\) and name the file in data.negatives"
    ):
        one.training_forward(batch_of(one, data(false_captions=0)))


def test_a_retrieval_task_takes_the_sigmoid_from_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "model": {
            "class_path": "unimodal.tasks.Retrieval",
            "init_args": {
                "config": {"embedding": {"dim": 16, "bias": -10}},
                "itc": {"class_path": "unimodal.tasks.SigmoidITC", "init_args": {"matryoshka": True}},
                "mini_batch_size": 4,
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert stop.value.code == 0 and printed["itc"]["class_path"] == "unimodal.tasks.SigmoidITC"
    assert printed["config"]["embedding"]["bias"] == -10 and printed["mini_batch_size"] == 4


# Large batches on small memory.


@pytest.mark.parametrize(
    "objectives",
    [
        [ITC(matryoshka=True, quantise=True, negatives=True)],
        [SigmoidITC()],
        [MaskedITC(), ITM()],
    ],
    ids=["softmax", "sigmoid", "with states"],
)
def test_chunks_give_the_gradient_of_the_batch(
    objectives: list[Any], mined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout the gradient of the same chunks kept in memory, which needs the same dropout in both readings; without
    dropout the gradient of the batch read at once."""
    module = data(negatives=str(mined))
    for dropout in (0.3, 0.0):
        one = task(*objectives, dropout=dropout, mini_batch_size=3)
        batch = batch_of(one, module)
        one.double()
        batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
        batch["image_id"][1] = batch["image_id"][6]  # two captions of one image, in different chunks
        found = gradients(one, batch)
        if dropout:
            monkeypatch.setattr(chunks, "checkpoint", lambda read, *inputs, use_reentrant: read(*inputs))
        else:
            one.mini_batch_size = None
        expected = gradients(one, batch)
        monkeypatch.undo()
        assert set(found) == set(expected) and any(gradient.abs().max() > 1e-3 for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_chunks_draw_other_dropout_than_one_reading() -> None:
    """So that the test above can fail: two readings under other random states do not agree."""
    one = task(ITC(), dropout=0.3, mini_batch_size=3)
    batch = batch_of(one, data())
    whole = task(ITC(), dropout=0.3)
    whole.model.load_state_dict(one.model.state_dict())
    first, second = gradients(one, batch), gradients(whole, batch)
    assert not torch.allclose(first["heads.text_embedding.gate"], second["heads.text_embedding.gate"], rtol=1e-3)


def test_chunks_train_under_lightning_with_clipping(tmp_path: Path) -> None:
    """Automatic optimisation: the same weights after three clipped steps as without chunks."""
    ends = []
    for size in (None, 3):
        one = task(ITC(matryoshka=True), dropout=0.0, mini_batch_size=size)
        training = trainer(tmp_path / str(size), steps=3)
        training.gradient_clip_val = 0.1
        training.fit(one, datamodule=data())
        ends.append(one.model.state_dict())
    for name, tensor in ends[0].items():
        if name.endswith(
            "key.bias"
        ):  # a softmax does not see it, so its gradient is rounding, which Adam brings to size
            continue
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_chunks_refuse_what_couples_rows() -> None:
    one = task(ITC(), mini_batch_size=3, trainable={"*": 1.0})
    batch = batch_of(one, data())
    one.train()
    with pytest.raises(ValueError, match=r"backbone.vision.* is a batch normalisation that trains.*Freeze its tower"):
        one.training_forward(batch)
    with pytest.raises(ValueError, match="mini_batch_size: expected at least 1, or None for the whole batch, got 0"):
        task(ITC(), mini_batch_size=0)


# Mining.


class Twice(Scenes):
    """Scenes of which 0 and 3 count as one image."""

    def image_id(self, i: int) -> int:
        return 0 if i == 3 else i


@pytest.mark.parametrize("judge", ["match", "cosine"])
def test_mining_equals_a_plain_loop(judge: str) -> None:
    encoder, pairs = Encoder(toy_model(), toy_processor()), Twice("train", count=6)
    captions = [(i, c) for i in range(6) for c in range(5)]
    images = encoder.read([Item(image=pairs.image(i)) for i in range(6)])
    texts = encoder.read([Item(text=pairs.captions(i)[c]) for i, c in captions])
    cosine = images.embedding @ texts.embedding.T  # [6, 30]
    every = [(image, text) for image in images.tokens for text in texts.tokens]
    score = encoder.match(every, batch_size=64).view(6, 30) if judge == "match" else cosine
    same = torch.tensor([[pairs.image_id(i) == pairs.image_id(j) for j, _ in captions] for i in range(6)])
    threshold, margin = float(score[same].median()), float(score.std() / 2)

    header, rows = mine_negatives(
        encoder, pairs, num_negatives=2, top_k=4, positive_threshold=threshold, margin=margin, judge=judge, batch_size=4
    )
    expected: dict[Any, list] = {}
    for matrix, scores, right, of_images in ((cosine, score, same, True), (cosine.T, score.T, same.T, False)):
        for q in range(len(matrix)):
            near = [int(j) for j in matrix[q].argsort(descending=True) if not right[q, j]][:4]
            limit = scores[q][right[q]].mean() + margin
            kept = [j for j in near if scores[q, j] < limit][:2]
            if scores[q][right[q]].max() > threshold and kept:
                expected[q if of_images else captions[q]] = [captions[j] if of_images else j for j in kept]
    found = {row["image"]: [(j, c) for j, c, _ in row["texts"]] for row in rows if "image" in row}
    found |= {tuple(row["caption"]): [j for j, _ in row["images"]] for row in rows if "caption" in row}
    assert found == expected and 0 < len(expected) < 36
    assert header["kept"]["images"] == f"{sum('image' in row for row in rows)} of 6"
    assert header["model"] == encoder.fingerprint() and header["data"]["fingerprint"] == pairs.fingerprint()
    for row in rows:
        if "caption" in row:
            i, c = row["caption"]
            assert row["positive"] == pytest.approx(float(score[i, i * 5 + c]), abs=1e-5)


def test_mining_is_reproducible_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    pairs = Scenes("train", count=6)
    files = []
    for name in ("a", "b"):
        header, rows = mine_negatives(Encoder(toy_model(), toy_processor()), pairs, positive_threshold=-9, margin=9)
        files.append(write_negatives(tmp_path / name, header, rows).read_bytes())
    assert files[0] == files[1]
    encoder = Encoder(toy_model(matching=None), toy_processor())
    with pytest.raises(ValueError, match="this model has no matching head"):
        mine_negatives(encoder, pairs)
    with pytest.raises(ValueError, match="1 <= num_negatives <= top_k, got num_negatives 9 and top_k 3"):
        mine_negatives(encoder, pairs, num_negatives=9, top_k=3)
    with pytest.raises(ValueError, match="judge: expected 'match' or 'cosine', got 'best'"):
        mine_negatives(encoder, pairs, judge="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shows one image only"):
        mine_negatives(encoder, Scenes("train", count=1), judge="cosine")


def test_batches_carry_mined_negatives(mined: Path) -> None:
    pairs, module = Scenes("train", count=8), data(negatives=str(mined), hard_texts=2, hard_images=2)
    one = task(ITM())
    batch, file = batch_of(one, module), read_negatives(mined, pairs)
    assert batch["negative_text"].shape[:2] == (8, 3)  # one of the reader's, two mined
    assert batch["negative_text_logit"][:, 0].isnan().all() and batch["negative_text_logit"][:, 1:].isfinite().all()
    assert batch["negative_image"].shape == (8, 2, 3, 32, 32) and batch["negative_image_mask"].all()
    assert one.processor is not None
    for row, (i, text_id) in enumerate(zip(batch["image_id"].tolist(), batch["text_id"].tolist())):
        told = {pairs.captions(j)[c]: score for j, c, score in file.texts[i]}
        for k in (1, 2):
            ids, mask = batch["negative_text"][row, k], batch["negative_mask"][row, k]
            score = told[one.processor.decode(ids[mask].tolist())]
            assert score == pytest.approx(float(batch["negative_text_logit"][row, k]))
        for k in range(2):
            logit = pytest.approx(float(batch["negative_image_logit"][row, k]))
            candidates = [j for j, score in file.images[i, text_id % 1000] if score == logit]
            pictures = [one.processor.images([pairs.image(j)])[0] for j in candidates]
            assert i not in candidates and any(torch.equal(batch["negative_image"][row, k], it) for it in pictures)
        assert float(batch["match_logit"][row]) == pytest.approx(file.own[i, text_id % 1000])


def test_a_batch_without_any_mined_negative_keeps_its_keys(mined: Path, tmp_path: Path) -> None:
    """Ranks exchange alike, whatever was kept for their rows; nothing is then added to the loss."""
    lines = mined.read_text().splitlines()
    (tmp_path / "none.jsonl").write_text(lines[0] + "\n")
    module = data(negatives=str(tmp_path / "none.jsonl"), false_captions=0)
    one = task(ITC(negatives=True), ITM(), Distillation(teacher="file"))
    one.eval()
    batch = batch_of(one, module)
    assert not batch["negative_mask"].any() and not batch["negative_image_mask"].any()
    with torch.no_grad():
        losses, _ = one.training_forward(batch)
        plain = ITC()(Step(one.model, batch, 0.0))[0]
    assert float(losses["Distillation"]) == 0 and float(losses["ITC"]) == pytest.approx(float(plain), abs=1e-6)


def test_matching_judges_mined_pictures(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = task(ITM())
    batch = batch_of(one, data(negatives=str(mined), hard_images=2))
    batch["negative_image_mask"][0] = False
    seen: dict[str, Any] = {}

    def match(image, text, image_index, text_index):
        seen.update(images=len(image.tokens), image=image_index, text=text_index)
        return torch.zeros(len(image_index), requires_grad=True)

    monkeypatch.setattr(one.model, "match", match)
    ITM()(Step(one.model, batch, 1.0))
    assert seen["images"] == 8 + 14 and seen["image"][-14:].tolist() == list(range(8, 22))
    assert seen["text"][-14:].tolist() == [row for row in range(1, 8) for _ in range(2)]


def test_negatives_of_other_data_are_refused(mined: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"was mined from scenes train \[.*trains on scenes val .*mine the negatives of this"
    ):
        read_negatives(mined, Scenes("val", count=8))
    with pytest.raises(FileNotFoundError, match="no such file; mine hard negatives with `unimodal mine"):
        read_negatives(tmp_path / "gone.jsonl", Scenes("val", count=8))
    for text, message in (
        ("{}\n", "line 1: expected a header"),
        ("[", "line 1 is no JSON"),
        ('{"image": 0}\n', "does not open with a header"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_negatives(tmp_path / "bad.jsonl", Scenes("val", count=8))


def test_the_shell_mines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_karpathy({"train": Scenes("train", count=4)}, tmp_path / "data")
    model = save_checkpoint(toy_model(), toy_processor(), tmp_path / "model")
    out = tmp_path / "negatives.jsonl"
    arguments = ["mine", "--model", model, "--data", path, "--out", out, "--num_negatives", 2, "--top_k", 3]
    arguments += ["--positive_threshold=-9", "--margin=9"]
    assert cli.main([str(word) for word in arguments]) == 0
    assert "negatives for 4 of 4 images and 20 of 20 captions" in capsys.readouterr().out
    assert len(read_negatives(out, KarpathyJson(path, split="train")).images) == 20
    elsewhere = [*arguments, "--out", tmp_path / "other.jsonl", "--split", "val"]
    assert cli.main([str(word) for word in elsewhere]) == 1
    assert "has no split 'val'" in capsys.readouterr().err


# The reranker teaches the embedding.


def test_the_stored_teacher_is_the_head_that_stored_it(mined: Path) -> None:
    one = task(Distillation())
    one.model.load_state_dict(toy_model().state_dict(), strict=False)
    one.eval()
    batch = batch_of(one, data(negatives=str(mined), false_captions=0, hard_texts=2, hard_images=2))
    step = Step(one.model, batch, 0.0)
    for head, file in zip(Distillation()._from_head(step), Distillation(teacher="file")._from_file(step)):
        torch.testing.assert_close(head, file, rtol=0, atol=1e-4)
    with torch.no_grad():
        values = [float(Distillation(teacher=teacher)(step)[0]) for teacher in ("head", "file")]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_distillation_orders_candidates_as_the_teacher_does(mined: Path, tmp_path: Path) -> None:
    trainable = {"heads.image_embedding.*": 1.0, "heads.text_embedding.*": 1.0, "bridge.query_sets.text": 1.0}
    one = task(Distillation(teacher="file", temperature=0.02), dropout=0.0, trainable=trainable)
    module = data(negatives=str(mined), false_captions=0, hard_texts=3, hard_images=3)
    before = float(one.training_forward(batch_of(one, module))[0]["Distillation"])
    trainer(tmp_path, steps=30).fit(one, datamodule=module)
    assert one.step_losses["Distillation"] < 0.8 * before


# Few bits.


def test_training_in_few_bits_helps_retrieval_in_few_bits() -> None:
    """Forty pairs of vectors with noise, embedded in 16 dimensions, as the index stores them."""
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(40, 24, generator=generator)
    items = [meaning + 0.7 * torch.randn(40, 24, generator=generator) for _ in range(2)]
    ids = torch.arange(40)

    def recall(bits: bool) -> dict[str, float]:
        torch.manual_seed(0)
        towers = [torch.nn.Linear(24, 16), torch.nn.Linear(24, 16)]
        step = torch.nn.Parameter(torch.tensor(0.14))
        optimizer = torch.optim.Adam([*towers[0].parameters(), *towers[1].parameters(), step], lr=0.02)
        for _ in range(150):
            embeddings = [torch.nn.functional.normalize(tower(x), dim=-1) for tower, x in zip(towers, items)]

            def loss_fn(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                return info_nce(image, text, ids, scale=15.0)

            loss = quantised(loss_fn, *embeddings, step=step) if bits else loss_fn(*embeddings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        vectors = [torch.nn.functional.normalize(tower(x), dim=-1).detach().numpy() for tower, x in zip(towers, items)]
        out = {}
        for precision in ("float32", "int8", "binary"):
            image, text = (dequantise(quantise(x, precision), precision) for x in vectors)
            out[precision] = float(np.mean((image @ text.T).argmax(1) == np.arange(40)))
        return out

    plain, trained = recall(bits=False), recall(bits=True)
    assert trained["int8"] >= plain["int8"] - 0.025 and trained["binary"] > plain["binary"]
    assert trained["int8"] >= trained["float32"] - 0.025


# Merging.


def test_merging_is_the_weighted_mean() -> None:
    a = {"x": torch.tensor([1.0, 3.0]), "n": torch.tensor(4)}
    b = {"x": torch.tensor([5.0, 7.0]), "n": torch.tensor(9)}
    merged = merge_weights([a, b], [1, 3])
    assert merged["x"].tolist() == [4.0, 6.0] and merged["n"] == 9
    assert merge_weights([a, b], [0.5, 0.5])["n"] == 4
    x = {"x": torch.randn(1000)}
    assert torch.equal(merge_weights([x, x, x], [0.2, 0.5, 0.3])["x"], x["x"])


def test_merging_unlike_models_names_what_differs() -> None:
    a, b = {"x": torch.zeros(2), "y": torch.zeros(1)}, {"x": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"2 tensors differ: x \(2,\) and \(3,\); y \(1,\) and absent"):
        merge_weights([a, b], [1, 1])
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(ValueError, match="expected one weight per state, none negative, not all zero"):
            merge_weights([a, a], weights)


# The recipe, two steps per stage: the last of a stage has no rate.


def test_the_embedding_recipe_takes_two_steps_in_every_stage(tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent / "tasks/embedding/schedule.yaml"
    schedule = yaml.safe_load(recipe.read_text())
    words = ["--output", tmp_path / "out", "--data.batch_size", 4, "--model.init_args.evaluation.rerank_k", 3]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    for split in ("train", "val", "test"):
        words += [f"--data.{split}.init_args.count", 6]
    for name, stage in schedule["stages"].items():
        if between.kind(stage) is None:
            words += [f"--stages.{name}.trainer.max_steps", 2]
        elif between.kind(stage) == "mine":  # whatever untrained heads say, keep everything
            words += [f"--stages.{name}.mine.positive_threshold", -9, f"--stages.{name}.mine.margin", 9]
    assert cli.main(["fit", "--config", str(recipe), *map(str, words)]) == 0
    done = {name: json.loads((tmp_path / "out" / name / "done.json").read_text()) for name in schedule["stages"]}
    assert {name: row["steps"] for name, row in done.items()} == {
        name: 2 * (between.kind(stage) is None) for name, stage in schedule["stages"].items()
    }
    assert "t2i_r1_reranked" in done["s3"]["scores"] and done["mine_s0"]["scores"] == {}
    s1, s2, s3 = (load_checkpoint(tmp_path / "out" / name / "model")[0].state_dict() for name in ("s1", "s2", "s3"))
    key = "heads.text_embedding.bridge_projection.weight"
    assert not torch.equal(s1[key], s2[key])
    torch.testing.assert_close(s3[key], (s1[key] + s2[key]) / 2)
    assert torch.equal(s1["heads.matching.score.weight"], s2["heads.matching.score.weight"])
    header = json.loads((tmp_path / "out/mine_s1/negatives.jsonl").read_text().splitlines()[0])
    assert header["settings"]["judge"] == "match"
    assert "the weights are an average" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {"merge": {"b": 1}}}, "stage 'a': merge needs the weights of an earlier stage, and there is none"),
        ({"a": {}, "b": {"merge": {"c": 1}}}, "stage 'b': merge names 'c', which is no earlier stage with weights: a"),
        ({"a": {}, "b": {"merge": {"a": "half"}}}, "merge gives 'a' the weight 'half'; expected a number from 0"),
        ({"a": {}, "b": {"merge": {"a": 0}}}, "merge gives no stage a weight above 0"),
        ({"a": {}, "b": {"merge": 0.5}}, "merge is 0.5; expected a mapping of settings"),
        ({"a": {}, "b": {"mine": {"top": 5}}, "c": {}}, "mine has no setting 'top'; did you mean 'top_k'"),
        (
            {"a": {}, "b": {"mine": {}, "data": {}}, "c": {}},
            "it trains nothing, so 'data' has no meaning beside 'mine'",
        ),
        ({"a": {}, "b": {"mine": {}}}, "the last stage must leave weights to score"),
        ({"a": {"data": {"negatives": "b"}}, "b": {"mine": {}}, "c": {}}, "names stage 'b', which is no earlier stage"),
    ],
)
def test_stages_that_cannot_run_are_refused(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        between.check(stages)
