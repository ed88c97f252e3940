"""Evidence for every system of the survey, from its own configuration at toy size: it learns 64 pairs by heart, what a stage trains
moves and what it freezes stays, chunks change no score, it is the same after saving and loading, and its explanations pass their test."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toysurvey import ToyEncoders, endless, part, toy_pairs

from unimodal import stages
from unimodal.survey import score
from unimodal.survey.explain import deletion_test
from unimodal.survey.specs import Spec, read_spec
from unimodal.survey.train import Budget, train
from unimodal.systems import Batch, System

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs/systems").glob("*.yaml"))}
SMALL: dict[str, Any] = {"width": 48, "heads": 4, "dropout": 0.0, "dims": ()}
# Steps and a factor of the rate, tried in turn. A doubled rate learns most systems in fewer steps, by rounding not always the same ones.
ATTEMPTS = ((100, 2.0), (200, 2.0), (400, 1.0))


class WideEncoders(ToyEncoders):
    """Wider than there are pairs: a linear map learns no more pairs by heart than it has directions."""

    image_width = text_width = 96


def pairs_for(system: System) -> Batch:
    """64 pairs, as the system's encoders read them."""
    return toy_pairs(64, system.encoders)  # type: ignore[arg-type]


def built(name: str, **settings: Any) -> tuple[Spec, System]:
    """A system's configuration and the system at toy size; what a class does not take is left out."""
    spec = read_spec(CONFIGS[name])
    accepted = spec.system.keywords.keys()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key in accepted}
    encoders = WideEncoders() if name == "cca" else ToyEncoders()
    return spec, spec.system(encoders, **{**small, **settings})


def plan(spec: Spec, **changes: Any) -> dict[str, Any]:
    """The stages of a configuration, in batches of 64."""
    return {name: dataclasses.replace(stage, batch_size=64, **changes) for name, stage in spec.stages.items()}


def known_by_heart(spec: Spec, system: System) -> float:
    """R@1 of its pairs by its own rule, the worse of its directions; for a system of categories, how many of the first eight share one."""
    pairs, scoring, shortlist = pairs_for(system), spec.scoring, None
    if scoring.metric == "category":
        image, text = score.embeddings(system, pairs.images, pairs.texts)
        best = (text @ image.T).topk(8).indices
        return float((best % 4 == torch.arange(64)[:, None] % 4).float().mean())
    if scoring.shortlist is not None:  # it scores a shortlist of another: here of the whole gallery
        shortlist = (torch.ones(64, 1), torch.ones(64, 1))
    if scoring.first == "embed":
        scoring = dataclasses.replace(scoring, k=64)
    found = score.rank(system, scoring, pairs.images, pairs.texts, pairs.image_id, pairs.image_id, shortlist=shortlist)
    t2i, i2t = (found.t2i, found.i2t) if found.t2i_reranked is None else (found.t2i_reranked, found.i2t_reranked)
    assert (i2t is None) == (scoring.directions == "text_to_image")
    return min(float((ranks == 1).float().mean()) for ranks in (t2i, i2t) if ranks is not None)


@pytest.fixture(scope="module", params=CONFIGS)
def learned(request: pytest.FixtureRequest) -> tuple[str, Spec, System, dict[str, Any]]:
    """A system that has learned its pairs, in few steps where they are enough."""
    for steps, factor in ATTEMPTS:
        spec, system = built(request.param)
        pairs = pairs_for(system)
        system.prepare(iter([pairs]))
        attempt = {name: dataclasses.replace(stage, lr=factor * stage.lr) for name, stage in plan(spec).items()}
        done = train(system, attempt, lambda name, stage, pairs=pairs: endless(pairs, 64), Budget(steps=steps))
        if not spec.stages or known_by_heart(spec, system.eval()) > 0.95:
            break
    return request.param, spec, system, done


def test_it_learns_64_pairs_by_heart(learned: Any) -> None:
    name, spec, system, _ = learned
    if not system.state_dict():
        pytest.skip("it has nothing to learn with")
    assert known_by_heart(spec, system) > 0.95, name


def test_every_stage_trains_what_it_says_and_nothing_else(learned: Any) -> None:
    name, spec, _, done = learned
    assert done.keys() == spec.stages.keys()
    _, system = built(name)
    pairs = pairs_for(system)
    system.prepare(iter([pairs]))
    for stage, settings in plan(spec).items():
        before = {key: p.detach().clone() for key, p in system.named_parameters()}
        train(system, {stage: settings}, lambda *_: endless(pairs, 64), Budget(steps=6))
        factors = stages.rates(system, settings.trainable)
        moved = {key for key, p in system.named_parameters() if not torch.equal(p, before[key])}
        assert moved == {key for key, factor in factors.items() if factor}, (name, stage)


def test_chunks_change_no_score(learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and pair scores of ten pairs: all read at once, in uneven pieces, and each image, text and pair alone."""
    name, spec, system, _ = learned
    pairs = part(pairs_for(system), torch.arange(10))

    def read(items: int, size: int) -> dict[str, Tensor]:
        monkeypatch.setattr(score, "ITEMS", items)
        found = {}
        if spec.scoring.first == "embed" and spec.scoring.shortlist is None:
            found["image"], found["text"] = score.embeddings(system, pairs.images, pairs.texts)
        if system.scores_pairs:
            state = score.states(system, pairs.images, pairs.texts)
            found["matrix"] = score.all_pairs(system, *state, size=size)
            found["pairs"] = score.pair_scores(system, *state, *torch.ones(10, 10).nonzero().T, size=size).view(10, 10)
        return found

    whole = read(items=10, size=100)
    for close in (read(items=3, size=7), read(items=1, size=1)):
        torch.testing.assert_close(close, whole, atol=1e-5, rtol=1e-4)
    if "text" in whole:
        assert torch.allclose(whole["text"].norm(dim=-1), torch.ones(10), atol=1e-5)
    if "pairs" in whole:
        torch.testing.assert_close(whole["matrix"], whole["pairs"], atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing(learned: Any) -> None:
    name, spec, system, _ = learned
    pairs = part(pairs_for(system), torch.arange(6))
    pad = torch.nn.functional.pad
    longer = system.encoders.read_texts(pad(pairs.texts.ids, (0, 3)), pad(pairs.texts.mask, (0, 3)))
    with torch.no_grad():
        before, after = system.score(pairs.images, pairs.texts), system.score(pairs.images, longer)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_it_is_the_same_after_saving_and_loading(learned: Any, tmp_path: Path) -> None:
    name, spec, system, _ = learned
    save_file({key: value.contiguous() for key, value in system.state_dict().items()}, tmp_path / "system.safetensors")
    _, again = built(name)
    again.load_state_dict(load_file(tmp_path / "system.safetensors"))
    pairs = part(pairs_for(system), torch.arange(6))
    with torch.no_grad():
        assert torch.equal(again.eval().score(pairs.images, pairs.texts), system.score(pairs.images, pairs.texts))


def test_without_what_it_finds_relevant_its_score_falls_faster(learned: Any) -> None:
    """Than without as much at random: on average, and for most of the pairs."""
    name, spec, system, _ = learned
    pairs = pairs_for(system)
    found = deletion_test(system, pairs.images, pairs.texts, pairs.image_id, pairs.image_id, pairs=64)
    assert found["pairs"] == 64 and found["gap"] > 0 and found["faster"] > 0.5, (name, found)
