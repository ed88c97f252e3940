"""The optimizer: what Muon steps and how, proved against torch's own Muon on plain matrices; resuming; what takes no decay."""

import copy

import torch
from torch import nn

from unimodal.tasks.optimizer import OptimizerSettings, build_optimizer

SETTINGS = OptimizerSettings(lr=0.01, muon=2.0, weight_decay=0.1)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))


def build(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = build_optimizer(model, {name: 1.0 for name, _ in model.named_parameters()}, SETTINGS)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))


def train(model: nn.Module, optimizer, schedule, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()


def test_a_kernel_is_stepped_as_the_matrix_that_it_is() -> None:
    model = small_model()
    kernel = model[0].weight
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    reference = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer, _ = build(model)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        matrix.grad = kernel.grad.flatten(1).clone()
        optimizer.step()
        reference.step()
        assert torch.equal(kernel.flatten(1), matrix)


def test_every_step_starts_from_clean_gradients() -> None:
    model = small_model()
    optimizer, _ = build(model)
    model(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.zero_grad()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_resuming_continues_exactly() -> None:
    whole = small_model()
    train(whole, *build(whole), range(6))

    model = small_model()
    optimizer, schedule = build(model)
    train(model, optimizer, schedule, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))

    model = small_model()
    optimizer, schedule = build(model)
    for part, state in zip((model, optimizer, schedule), saved, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, schedule, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
