"""Blocks: recomputed or compiled, a model loses the same, learns the same and calls its parameters the same."""

import copy
import functools
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_tasks import OBJECTIVES, batch_of
from torch import nn
from toy import toy_config, toy_model

from unimodal.blocks import blocks, compile_blocks, recompute
from unimodal.layers import MLP
from unimodal.tasks import Joint

IDS = {name: getattr(toy_config().captioning, name) for name in ("bos_id", "eos_id", "unk_id")}
IN_BRIDGE = {"matching": {"kind": "bridge"}, "captioning": {"kind": "bridge", **IDS}}


def task(parts: dict[str, Any], names: Sequence[str] = tuple(OBJECTIVES), **settings: Any) -> Joint:
    """Objectives on the toy with dropout, its convolutional tower in training."""
    config = toy_config(**parts)
    config.backbone.text.kwargs.update(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    object.__setattr__(config.bridge, "dropout", 0.1)
    return Joint(config, {name: OBJECTIVES[name] for name in names}, pretrained=False, **settings)


def learned(one: Joint, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses, gradients and running statistics of one step in training mode."""
    one.train()
    torch.manual_seed(3)
    losses, _ = one.training_forward(batch)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in one.model.named_parameters() if p.grad is not None}
    statistics = {name: buffer for name, buffer in one.model.named_buffers() if "running" in name or "tracked" in name}
    assert gradients and statistics
    return {name: loss.detach() for name, loss in losses.items()} | gradients | statistics


def test_blocks_are_the_members_of_alike_lists() -> None:
    names = {module: name for name, module in toy_model().named_modules()}
    model = next(iter(names))
    assert [names[block] for block in blocks(model)] == [
        "backbone.text.encoder.layer.0",
        "backbone.text.encoder.layer.1",
        "bridge.layers.0",
        "bridge.layers.1",
        "heads.matching.blocks.0",
        "heads.captioning.blocks.0",
        "heads.generation.transformer.transformer_blocks.0",
    ]
    stem = nn.Sequential(nn.Linear(2, 2))
    odd = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    lists = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])])
    residual = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    found = list(blocks(nn.ModuleDict({"stem": stem, "odd": odd, "lists": lists, "residual": residual})))
    assert found == [lists[0][0], lists[1][0], residual[0], residual[1]]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [{}, IN_BRIDGE], ids=["own", "in the bridge"])
def test_recomputed_blocks_learn_the_same_to_the_last_bit(parts: dict[str, Any], precision: torch.dtype) -> None:
    """With dropout, with caches that grow, with running statistics, and with attention kernels that a head chooses."""
    kept, again = task(parts), task(parts, gradient_checkpointing=True)
    batch = batch_of(kept)
    found = []
    for one in (kept, again):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            found.append(learned(one, batch))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert list(kept.state_dict()) == list(again.state_dict())


def test_recomputed_convolutions_count_their_statistics_once() -> None:
    tower = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)))
    whole, again = nn.ModuleDict({"tower": tower}), nn.ModuleDict({"tower": copy.deepcopy(tower)})
    recompute(again)
    for one in (whole, again):
        one["tower"](torch.ones(2, 3, 4, 4).cumsum(2)).square().sum().backward()
    assert whole["tower"][0][1].num_batches_tracked == 1
    for (name, ours), (_, theirs) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_compiled_blocks_keep_names_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a compiler is given, without the time that it takes; together with recomputation."""
    monkeypatch.setattr("unimodal.blocks.torch.compile", functools.partial(torch.compile, backend="eager"))
    names = ("itc", "itm")  # bridge and matching head
    plain, compiled = task({}, names), task({}, names, compile=True, gradient_checkpointing=True)
    batch = batch_of(plain)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    ours, theirs = (learned(one, batch) for one in (compiled, plain))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_the_compiler_itself() -> None:
    plain = nn.ModuleDict({"layers": nn.ModuleList([MLP(8, 16)])})
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    x = torch.randn(2, 5, 8)
    for one in (plain, compiled):
        one["layers"][0](x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    with torch.no_grad():  # runs as it is
        assert torch.equal(compiled["layers"][0](x), plain["layers"][0](x))
