"""No step of any system mixes devices: every stage of every recipe on a pretended device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended import ELSEWHERE, elsewhere, moved
from test_systems import CONFIGS, built
from torch import nn
from toysurvey import toy_pairs

from unimodal import stages
from unimodal.systems import Batch, System


class Mixed(nn.Module):
    """Adds numbers that were made on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(len(x))


def test_a_mixed_step_is_found() -> None:
    with elsewhere(nn.Linear(2, 2)), pytest.raises(RuntimeError, match="add mixes devices"):
        Mixed()(moved([torch.ones(3)])[0])


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a number beside others": lambda here, there: torch.stack([here[0], there[0]]),
    "values elsewhere": lambda here, there: here.add_(there[0]),
    "places elsewhere": lambda here, there: here[there.long()],
    "numbers written elsewhere": lambda here, there: there.index_put_((torch.arange(3),), here),
    "a generator": lambda here, there: torch.rand(3, device=there.device, generator=torch.Generator()),
    "a draw": lambda here, there: torch.multinomial(there, 1, generator=torch.Generator()),
}


@pytest.mark.parametrize("kind", MIXED)
def test_every_kind_of_mix_is_found(kind: str) -> None:
    with elsewhere(), pytest.raises(RuntimeError, match="mixes devices"):
        MIXED[kind](torch.ones(3), moved([torch.ones(3)])[0])


def test_what_torch_lets_mix_computes() -> None:
    with elsewhere():
        here, there = torch.arange(3), moved([torch.ones(3)])[0]
        assert (
            there[here].device == (there + here[1]).device == there.masked_fill(there > 1, here[0]).device == ELSEWHERE
        )
        assert torch.zeros(3).copy_(there).tolist() == [1, 1, 1]


def test_what_is_elsewhere_computes_and_learns() -> None:
    linear = nn.Linear(2, 1)
    x = torch.randn(4, 2)
    expected = linear(x).detach()
    with elsewhere(linear):
        out = linear(moved([x])[0])
        assert out.device == ELSEWHERE and torch.arange(3, device=out.device).device == ELSEWHERE
        out.sum().backward()
        assert linear.weight.grad is not None and linear.weight.grad.device == ELSEWHERE
        assert torch.equal(out.detach().to("cpu"), expected)


def there(system: System, batch: Batch) -> Batch:
    """The batch, and what the toy encoders hold, on the pretended device."""
    system.encoders.table = moved([system.encoders.table])[0]  # type: ignore[attr-defined]
    return Batch(
        *(
            None if part is None else type(part)(*moved(part)) if isinstance(part, tuple) else moved([part])[0]
            for part in batch
        )
    )


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in CONFIGS for stage in built(name)[0].stages])
def test_a_stage_stays_on_its_device(name: str, stage: str) -> None:
    labels = {"category_names": ["dog", "cat", "man", "ball"]} if name == "qwen_embedding" else {}
    spec, system = built(name, **labels)
    pairs = toy_pairs(24, system.encoders)  # type: ignore[arg-type]
    factors = stages.rates(system, spec.stages[stage].trainable)
    stages.freeze(system, factors)
    with elsewhere(system.train(), system.encoders.backbone):
        batch = there(system, pairs)
        system.learn_words()
        system.prepare(iter([batch]))
        system.start_stage(stage)
        losses: dict[str, Any] = {}
        for _ in range(4):  # buffers of trust need some rows before they judge
            losses = system.losses(batch, stage, 0.5)
        torch.stack(list(losses.values())).sum().backward()
        for parameter in system.parameters():
            assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.device == ELSEWHERE)
        system.after_step(stage)
        system.end_stage(stage)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_a_system_answers_is_on_its_device(name: str) -> None:
    _, system = built(name)
    pairs = toy_pairs(6, system.encoders)  # type: ignore[arg-type]
    with elsewhere(system.eval(), system.encoders.backbone):
        batch = there(system, pairs)
        system.prepare(iter([batch]))
        if system.embeds:
            assert system.embed_images(batch.images).device == system.embed_texts(batch.texts).device == ELSEWHERE
        if system.scores_pairs:
            state = system.image_state(batch.images), system.text_state(batch.texts)
            assert system.score_pairs(*state).device == system.score_matrix(*state).device == ELSEWHERE
        if system.writes:
            assert len(system.write(batch.images)) == 6
