"""Tasks: every objective reaches exactly what its stage trains, frozen parts are proved not to move, padding changes
nothing from the batch to the loss, and evaluation names its numbers and protocols."""

import math
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from toy import toy_config, toy_model

from unimodal import stages
from unimodal.candidates import draw_candidates
from unimodal.cli.finish import protocols
from unimodal.cli.stage import evaluate
from unimodal.data.module import PairData
from unimodal.data.scenes import Scenes
from unimodal.heads import LanguageModelCaptioner
from unimodal.losses import caption_loss
from unimodal.metrics import cider_d
from unimodal.tasks import (
    ITC,
    ITG,
    ITM,
    LCE,
    SCST,
    Conditioning,
    EvaluationSettings,
    Flow,
    Joint,
    StageProof,
    Step,
    Task,
)

SMALL = EvaluationSettings(rerank_k=3, captions=4, pictures=2, steps=2)
OBJECTIVES = {
    "itc": ITC(matryoshka=True),
    "itm": ITM(),
    "lce": LCE(candidates=2),
    "itg": ITG(),
    "scst": SCST(draws=3, max_new_tokens=6),
    "foresee": Conditioning(),
    "flow": Flow(handover=0.5),
}
DRAWING = {"bridge.query_sets.generate": 1.0, "heads.generation.*": 1.0}
# What each objective's own head and query sets are called: a stage that trains only these must reach all of them.
OWN = {
    "itc": {
        "heads.image_embedding.*": 1.0,
        "heads.text_embedding.*": 1.0,
        "log_scale": 1.0,
        "bridge.query_sets.text": 1.0,
    },
    "itm": {"heads.matching.*": 1.0, "bridge.query_sets.image": 1.0},
    "lce": {"heads.matching.*": 1.0, "bridge.query_sets.image": 1.0},
    "itg": {"heads.captioning.*": 1.0, "bridge.query_sets.image": 1.0},
    "scst": {"heads.captioning.*": 1.0, "bridge.query_sets.image": 1.0},
    "foresee": {"bridge.query_sets.generate": 1.0},
    "flow": DRAWING,
}


def data(**settings: Any) -> PairData:
    train, val, test = (Scenes(split, count=8) for split in ("train", "val", "test"))
    return PairData(train, val, test, batch_size=4, target_size=32, **settings)


def task(names: list[str], trainable: dict[str, float] | None = None, **settings: Any) -> Task:
    objectives = {name: OBJECTIVES[name] for name in names}
    return Joint(toy_config(), objectives, trainable, evaluation=SMALL, pretrained=False, **settings)


def batch_of(task: Task, module: PairData | None = None) -> dict[str, torch.Tensor]:
    module = module or data()
    task.processor = module.bind(task.config, task.model.backbone)
    task.prepare_objectives(module.train)
    return next(iter(module.train_dataloader()))


def trainer(folder: Path, *callbacks: pl.Callback, steps: int = 2) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=steps + 1,
        check_val_every_n_epoch=None,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# Losses and gradients.


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_each_head_alone(name: str) -> None:
    """A finite loss, a gradient to every parameter that trains and none to any other."""
    one = task([name], OWN[name])
    losses, _ = one.training_forward(batch_of(one))
    losses[name].backward()
    assert math.isfinite(losses[name].item())
    for key, parameter in one.model.named_parameters():
        trained = one.factors[key] > 0
        assert parameter.requires_grad == trained == (parameter.grad is not None), key


@pytest.mark.parametrize("names", [list(OBJECTIVES), list(OBJECTIVES)[::-1]], ids=["in order", "reversed"])
def test_all_objectives_together_reach_every_parameter(names: list[str]) -> None:
    """In any order: what one objective reads first, the others share with its gradient."""
    one = task(names)
    one.model.train()
    losses, report = one.training_forward(batch_of(one))
    torch.stack(list(losses.values())).sum().backward()
    assert set(losses) == set(OBJECTIVES) and all(map(math.isfinite, (loss.item() for loss in losses.values())))
    assert set(report) == {"itc/scale", "itm/balanced_accuracy", "lce/first", "scst/cider_d", "flow/replaced"}
    without = {key for key, parameter in one.model.named_parameters() if parameter.grad is None}
    # The toy captions with a decoder of its own and matches on cached tokens, so the bridge's text branch is not asked.
    assert {key for key in without if "text_" not in key and "lm_" not in key and "pooler" not in key} == set()


def test_padding_and_neighbours_change_nothing() -> None:
    """Longer padding changes no loss, and a text embeds alike beside longer and more texts."""
    one = task(["itc", "itm", "itg"])
    one.model.eval()
    batch = batch_of(one)
    longer = dict(batch)
    for ids, mask in (("text", "text_mask"), ("negative_text", "negative_mask")):
        longer[ids] = nn.functional.pad(batch[ids], (0, 5))
        longer[mask] = nn.functional.pad(batch[mask], (0, 5))
    losses = []
    for form in (batch, longer):
        torch.manual_seed(0)
        losses.append(one.training_forward(form)[0])
    for name, loss in losses[0].items():
        assert loss.item() == pytest.approx(losses[1][name].item(), abs=1e-5), name
    assert one.processor is not None
    texts = ["a star", "a small solid red circle is left of a large striped blue square on a grey background."]
    with torch.no_grad():
        alone, beside = (
            one.model.text_embedding(one.model.encode_text(*one.processor.texts(some))) for some in (texts[:1], texts)
        )
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_foreseeing_moves_the_reading_of_the_caption_and_never_that_of_the_image() -> None:
    one = task(["foresee"])
    step = Step(one.model, batch_of(one), 0.0)
    loss, _ = OBJECTIVES["foresee"](step)
    loss.backward()
    got = {name for name, parameter in one.model.named_parameters() if parameter.grad is not None}
    assert {"bridge.query_sets.generate", "bridge.token_embedding.weight"} < got
    assert "bridge.query_sets.image" not in got and not any("vision" in name for name in got)

    fewer = toy_config(
        bridge={
            "width": 32,
            "layers": 2,
            "heads": 2,
            "intermediate": 64,
            "queries": {"image": 4, "text": 3, "generate": 2},
        }
    )
    other = Joint(fewer, {"foresee": Conditioning()}, pretrained=False)
    with pytest.raises(
        ValueError, match="as many generation queries as image queries, got 2 and 4; set bridge.queries.generate"
    ):
        other.training_forward(batch_of(other))


def test_rewards_make_the_better_of_two_captions_likelier() -> None:
    """From a captioner that writes a true and a false caption alike, to one that prefers the true one."""
    torch.manual_seed(0)
    one = task(["scst"], {"*": 0.0, "heads.captioning.*": 1.0})
    batch = batch_of(one)
    model, pairs = one.model.eval(), Scenes("train", count=8)
    row = {pairs.image_id(i): i for i in range(8)}
    true = [pairs.captions(row[int(i)])[0] for i in batch["image_id"]]
    false = true[1:] + true[:1]
    assert one.processor is not None
    ids, mask = one.processor.texts(true + false)
    drawn = [row[real].tolist()[1:-1] for row, real in zip(ids, mask)]

    def likelihood() -> torch.Tensor:
        """Mean log-probability of the true and of the false captions."""
        with torch.no_grad():
            image = model.encode_image(batch["image"]).select(torch.arange(8) % 4)
            logits = model.caption_logits(image, model.start_caption(ids))
        targets = model.caption_targets(ids)[:, 1:, None]
        found = logits[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0] * mask[:, 1:]
        return found.sum(1).view(2, 4).mean(1)

    # What it "draws" is given: the true caption of each image, then the false one.
    objective = SCST(draws=2, max_new_tokens=40)
    objective.prepare(pairs, one.processor)
    turns = cycle([drawn[:4], drawn[4:]])
    model.caption = lambda *_, **__: next(turns)  # type: ignore[method-assign]
    before = likelihood()
    optimizer = torch.optim.SGD(model.heads["captioning"].parameters(), lr=0.1)
    for _ in range(5):
        loss, report = objective(Step(model, batch, 1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = likelihood()
    assert after[0] > before[0] and after[1] < before[1]
    rewards = [cider_d(texts, [pairs.captions(row[int(i)]) for i in batch["image_id"]]) for texts in (true, false)]
    assert report["cider_d"] > 0 and (rewards[0] > rewards[1]).all()


def test_rewards_reach_a_bridge_that_writes_and_say_what_they_do_not_train() -> None:
    overrides: dict[str, Any] = {"captioning": {"kind": "bridge", "bos_id": 2, "eos_id": 3}}
    one = Joint(toy_config(**overrides), {"scst": OBJECTIVES["scst"]}, evaluation=SMALL, pretrained=False)
    batch = batch_of(one)
    one.model.bridge.norm.eval()  # as a stage leaves what it freezes
    modes = [module.training for module in one.model.modules()]
    losses, report = one.training_forward(batch)
    assert [module.training for module in one.model.modules()] == modes
    losses["scst"].backward()
    assert report["scst/cider_d"] >= 0 and one.model.bridge.training
    assert one.model.bridge.query_sets["image"].grad.any() and one.model.bridge.token_embedding.weight.grad.any()
    with pytest.raises(ValueError, match="draws is 1; each caption is compared with the others, so give at least 2"):
        SCST(draws=1)
    one.model.heads["captioning"] = object.__new__(LanguageModelCaptioner)
    nn.Module.__init__(one.model.heads["captioning"])
    with pytest.raises(ValueError, match="of kind 'decoder' or 'bridge', and this model writes by a language model"):
        OBJECTIVES["scst"](Step(one.model, batch, 0.0))


def test_matching_uses_the_false_captions_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    one = task(["itm"])
    batch = batch_of(one)
    batch["negative_mask"][0] = False  # this image has none
    seen: dict[str, torch.Tensor] = {}

    def match(image, text, image_index, text_index):
        seen.update(ids=text.ids, image=image_index, text=text_index)
        return torch.zeros(len(image_index), requires_grad=True)

    monkeypatch.setattr(one.model, "match", match)
    OBJECTIVES["itm"](Step(one.model, batch, 1.0))
    assert len(seen["image"]) == 3 * 4 + 3  # true pairs, drawn texts, drawn images, given false captions
    assert seen["image"][12:].tolist() == [1, 2, 3]
    assert torch.equal(seen["ids"][seen["text"][12:]], batch["negative_text"][1:, 0])
    drawn = list(zip(seen["image"][4:12].tolist(), seen["text"][4:12].tolist()))
    assert all(image != text for image, text in drawn)


def test_false_captions_fill_their_places_and_no_more() -> None:
    one = task(["itm"])
    module = data(false_captions=20)  # more than any scene has
    batch = batch_of(one, module)
    pairs = module.train
    assert isinstance(pairs, Scenes)
    told = [[one.processor.decode(ids[mask].tolist()) for ids, mask in zip(*row) if mask.any()]
            for row in zip(batch["negative_text"], batch["negative_mask"])]  # fmt: skip
    assert batch["negative_text"].shape[:2] == (4, 20)
    for image, false in zip(batch["image_id"].tolist(), told):
        possible = [set(pairs.negatives(image, c)) for c in range(5)]
        assert set(false) in possible and len(false) == len(set(false))


def test_hard_neighbours_are_mined_and_stand_together(tmp_path: Path) -> None:
    module = data(hard_neighbours=2)
    trainer(tmp_path, steps=1).fit(task(["itc"]), datamodule=module)
    assert module.neighbours is not None and module.neighbours.shape == (8, 2)
    assert not (module.neighbours == torch.arange(8)[:, None]).any()
    assert (tmp_path / "neighbours.safetensors").exists()


# Stages.


def test_patterns_decide_what_trains() -> None:
    model = toy_model()
    factors = stages.rates(model, {"*": 0.1, "heads.*": 1.0, "heads.generation.*": 0.0})
    assert factors["log_scale"] == 0.1
    assert {factor for key, factor in factors.items() if key.startswith("heads.generation")} == {0.0}
    assert {factor for key, factor in factors.items() if key.startswith("heads.matching")} == {1.0}
    with pytest.raises(ValueError, match=r"'heads.matchin' matches no parameter; did you mean 'heads.matching'\?"):
        stages.rates(model, {"heads.matchin": 1.0})
    with pytest.raises(
        ValueError, match="this stage trains nothing: trainable is .*give at least one pattern a factor"
    ):
        stages.rates(model, {"*": 0.0})


def test_frozen_parts_and_untouched_heads_stay_bit_identical(tmp_path: Path) -> None:
    """Training the drawing head and its queries alone, as the last stage of the quickstart does."""
    one = task(["flow"], DRAWING)
    assert stages.untouched_heads(one.model) == ["embedding", "matching", "captioning"]
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    outputs = stages.probe(one.model, ["embedding", "matching", "captioning"])
    trainer(tmp_path, StageProof()).fit(one, datamodule=data())
    after = one.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(one.factors.get(key) for key in moved)
    again = stages.probe(one.model, ["embedding", "matching", "captioning"])
    for name, output in again.items():
        assert torch.equal(output, outputs[name]), name


@pytest.mark.parametrize(
    "kinds", [{}, {"matching": {"kind": "bridge"}, "captioning": {"kind": "bridge"}}], ids=["own", "bridge"]
)
def test_a_head_is_untouched_exactly_when_its_outputs_cannot_move(kinds: dict[str, Any]) -> None:
    """Every part of the model in turn is moved a little: which heads answer otherwise?"""
    model = toy_model(**kinds)
    heads = ["embedding", "matching", "captioning", "generation"]
    model.heads[
        "generation"
    ].transformer.proj_out.weight.data.normal_()  # it starts at zero, and would hide all before it
    for part in sorted(
        {str(row["part"]) for row in stages.table(model, dict.fromkeys(dict(model.named_parameters()), 1.0))}
    ):
        if part == "log_scale" or "null_condition" in part:  # no head's output shows them
            continue
        pattern = part if part in dict(model.named_parameters()) else f"{part}.*"
        stages.freeze(model, stages.rates(model, {pattern: 1.0}))
        before = stages.probe(
            model, heads
        )  # after freezing: kernels differ in the last bit with what requires a gradient
        trained = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        for p in trained:
            p.data.add_(torch.randn_like(p), alpha=0.1)
        after = stages.probe(model, heads)
        same = [head for head in heads if all(torch.equal(after[k], before[k]) for k in before if k.startswith(head))]
        assert stages.untouched_heads(model) == same, part
        for p, was in trained.items():
            p.data.copy_(was)


class Disturb(pl.Callback):
    """Moves one frozen tensor by the smallest amount."""

    def __init__(self, name: str) -> None:
        self.name = name

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, *_: Any) -> None:
        tensor = task.model.state_dict()[self.name].view(-1)
        tensor[:1] = torch.nextafter(tensor[:1], tensor[:1] + 1)


def test_a_moved_frozen_tensor_fails_the_run(tmp_path: Path) -> None:
    one = task(["flow"], DRAWING)
    buffer = next(key for key in one.model.state_dict() if key.endswith("running_var"))
    for name in ("bridge.query_sets.image", buffer):
        with pytest.raises(RuntimeError, match=f"frozen tensors moved during this stage: {name}"):
            trainer(tmp_path, Disturb(name), StageProof(), steps=1).fit(task(["flow"], DRAWING), datamodule=data())


def test_fingerprints_cover_running_statistics_of_frozen_towers() -> None:
    model = toy_model()
    stages.freeze(model, stages.rates(model, DRAWING))
    known = stages.fingerprints(model)
    statistics = {key for key, _ in model.backbone.vision.named_buffers() if "running" in key}
    assert statistics and {f"backbone.vision.{key}" for key in statistics} <= set(known)
    model.train()
    stages.quiet_frozen(model)
    model.encode_image(torch.randn(2, 3, 32, 32))
    assert stages.moved(known, stages.fingerprints(model)) == []


# Evaluation.


def test_pictures_are_judged_by_the_first_one_the_chosen_one_and_on_known_combinations() -> None:
    one, module = task(["flow"]), data()
    one.processor = module.bind(one.config, one.model.backbone)
    settings = replace(SMALL, captions=0, drawings=5)
    evaluation = evaluate(one.model, one.processor, module, settings, torch.device("cpu"), final=True)
    results = evaluation.results()
    numbers, lines = evaluation.numbers(results), protocols(evaluation, results)
    first, chosen, known = results["drawn"], results["chosen"], results["known"]
    assert first.prompts == chosen.prompts == [module.test.captions(i)[0] for i in range(2)]
    assert known.prompts == [Scenes("train", count=10).captions(i)[0] for i in (8, 9)]
    pool = draw_candidates(
        one.model,
        one.processor,
        one.model.encode_text(*one.processor.texts(first.prompts)),
        5,
        match_scale=evaluation.rule.scale,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(first.pictures, pool[0][0])
    assert torch.equal(chosen.pictures, pool[0][pool[1].argmax(0), [0, 1]]) and not torch.equal(
        chosen.pictures, first.pictures
    )
    for suffix in ("", "_chosen", "_known"):
        assert 0 <= numbers[f"generation_attribute_accuracy{suffix}"] <= 1
    assert (
        "the best of 5 pictures by the model's own cosine + 1 match logit"
        in lines["generation_attribute_accuracy_chosen"]
    )
    assert "scenes that no stage trained on" in lines["generation_attribute_accuracy_known"]
    assert module.train.later(2).fingerprint() in lines["generation_attribute_accuracy_known"]


def test_dropped_words_are_read_as_unknown_and_still_written() -> None:
    one = task(["itg"])
    batch = batch_of(one)
    one.model.eval()
    step, read = Step(one.model, batch, 0.0), []
    logits = one.model.caption_logits
    one.model.caption_logits = lambda image, ids, mask: read.append(ids) or logits(image, ids, mask)
    whole, _ = ITG(label_smoothing=0.0)(step)
    torch.manual_seed(0)
    dropped, _ = ITG(label_smoothing=0.0, word_dropout=0.5)(step)
    plain, hidden = read
    changed = plain != hidden
    unknown = one.model.head("captioning").unk_id
    assert (hidden[changed] == unknown).all() and not changed[:, 0].any()
    assert 0.2 < changed[:, 1:].float().mean() < 0.8
    targets, mask = one.model.caption_targets(plain), batch["text_mask"]
    expected = caption_loss(logits(step.image, hidden, mask), targets, mask, label_smoothing=0.0)
    assert torch.equal(dropped, expected) and dropped != whole
    at_the_end, _ = ITG(label_smoothing=0.0, word_dropout=0.5)(Step(one.model, batch, 1.0))
    assert torch.equal(at_the_end, whole)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"word_dropout is a share of words, at least 0 and below 1, got {share}"):
            ITG(word_dropout=share)


def test_evaluation_names_numbers_and_protocols(tmp_path: Path) -> None:
    one, module = task(["itc"]), data()
    trainer(tmp_path).validate(one, datamodule=module, verbose=False)
    results = one.results
    first, reranked = results["retrieval_first"].protocol, results["retrieval_reranked"].protocol
    assert (first.dataset, first.split, first.images, first.captions, first.captions_per_image) == (
        "scenes",
        "val",
        8,
        40,
        5,
    )
    assert (first.stage, reranked.stage, reranked.k) == ("first", "reranked", 3)
    assert first.fingerprint == module.val.fingerprint()
    assert (
        len(results["written"]) == 4
        and len(results["drawn"].pictures) == 2
        and results["captions"].protocol.images == 4
    )
    assert not {"chosen", "known"} & results.keys()  # one picture of each caption, and nobody asked for other scenes
    with pytest.raises(ValueError, match="which is not configured; name a reader for it"):
        PairData(val=module.val).test_dataloader()
    logged = trainer(tmp_path)
    logged.test(one, datamodule=module, verbose=False)
    named = {key.removeprefix("test/") for key in logged.callback_metrics}
    assert named == {
        "t2i_r1_first",
        "t2i_r1_reranked",
        "i2t_r1_first",
        "i2t_r1_reranked",
        "cider_d",
        "bleu_4",
        "swap_accuracy_embed",
        "swap_accuracy_match",
        "caption_exact_attributes",
        "generation_attribute_accuracy",
    }
    assert all(0 <= float(value) <= 10 for value in logged.callback_metrics.values())


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    one = task(["itc"])
    batch = batch_of(one)
    batch["image"][0] = math.nan
    with pytest.raises(FloatingPointError, match=r"losses are not finite: .*lower the learning rate"):
        one.training_step(batch, 0)
    del batch["text"]
    with pytest.raises(KeyError, match="objective 'itc' needs batch key 'text'"):
        one.training_forward(batch)


class Batches(pl.Callback):
    """Notes what every step read and lost."""

    def __init__(self, loss: str = "flow") -> None:
        self.loss = loss
        self.rows: list[tuple[list[int], list[int], float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
        self.rows.append((batch["image_id"].tolist(), batch["text_id"].tolist(), task.step_losses[self.loss]))


def test_a_run_resumes_exactly_at_any_step(tmp_path: Path) -> None:
    """Inside the first and a later epoch, and between two; the frozen text tower has dropout, which must stay off."""

    def rows(*callbacks: pl.Callback, start: Path | None = None) -> list:
        seen = Batches()
        training = trainer(tmp_path, seen, *callbacks, steps=6)
        module = PairData(Scenes("train", count=12), Scenes("val", count=2), batch_size=4, target_size=32)
        training.fit(task(["flow"], DRAWING), datamodule=module, ckpt_path=start)
        return seen.rows

    kept = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = rows(kept)
    epochs = [sorted(image for images, _, _ in whole[part] for image in images) for part in (slice(3), slice(3, 6))]
    assert epochs == [list(range(12))] * 2
    assert [images for images, _, _ in whole[:3]] != [images for images, _, _ in whole[3:]]
    assert {text for _, texts, _ in whole[:3] for text in texts} != {
        text for _, texts, _ in whole[3:] for text in texts
    }
    for step in (2, 3, 4):
        assert rows(start=tmp_path / f"step={step}.ckpt") == whole[step:], step
