"""Learning rate schedulers, made before or after setup: torch's own learning rates, and no warning (warnings fail)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from precision_core import MODES, Fabric, MixedPrecision

INF = float("inf")
Make = Callable[[Optimizer], Any]

MAKERS: dict[str, Make] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.5, total_steps=10),
    "SequentialLR": lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), StepLR(optimizer, 1)], [2]),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
}


def weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def advance(scheduler: Any) -> None:
    scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))


def rates(model: nn.Module, optimizer: Optimizer, scheduler: Any, backward: Callable[..., None]) -> list[float]:
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        advance(scheduler)
    return seen


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
def test_learning_rates_and_updates_are_torchs_own(mode: str, when: str, make: Make) -> None:
    plain = weight()
    reference = SGD(plain.parameters(), lr=0.1)
    expected = rates(plain, reference, make(reference), lambda loss: loss.backward())

    scaler = {"init_scale": 8.0} if mode == "16-mixed" else None  # so that nothing overflows
    fabric, model = Fabric(accelerator="cpu", precision=MixedPrecision(mode, "cpu", scaler)), weight()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = make(optimizer) if when == "before" else None
    fabric.setup(model, optimizer)
    scheduler = scheduler or make(optimizer)
    assert rates(model, optimizer, scheduler, fabric.backward) == expected
    assert torch.equal(model.weight, plain.weight)


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("first", [INF, 1.0])
def test_a_skipped_step_warns_of_nothing_and_need_not_count(when: str, first: float) -> None:
    fabric, model = Fabric(accelerator="cpu", precision="16-mixed"), weight()
    optimizer = SGD(model.parameters(), lr=1.0)
    schedulers: list[LRScheduler] = [StepLR(optimizer, 1, gamma=0.5)] if when != "after" else []
    fabric.setup(model, optimizer)
    schedulers += [StepLR(optimizer, 1, gamma=0.5)] if when != "before" else []
    skipped = []
    for index, factor in enumerate((first, INF, 1.0, 1.0)):
        optimizer.zero_grad()
        fabric.backward((model.weight * factor).sum())
        optimizer.step()
        skipped.append(fabric.last_step_skipped)
        for scheduler in schedulers:
            if index == 0 or not fabric.last_step_skipped:  # the first time without looking
                scheduler.step()
    assert skipped == [first == INF, True, False, False]
    factor = 0.5 ** len(schedulers)
    assert optimizer.param_groups[0]["lr"] == factor**3
    rates_of_taken_steps = [1.0, factor, factor**2] if first == 1.0 else [factor, factor**2]
    assert model.weight.item() == -sum(rates_of_taken_steps)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_after_teardown_the_step_is_torchs_own_under_any_scheduler(mode: str, when: str) -> None:
    fabric, model = Fabric(accelerator="cpu", precision=mode), weight()
    optimizer = SGD(model.parameters(), lr=1.0)
    schedulers: list[LRScheduler] = [StepLR(optimizer, 1, gamma=0.5)] if when != "after" else []
    fabric.setup(model, optimizer)
    schedulers += [StepLR(optimizer, 1, gamma=0.5)] if when != "before" else []
    fabric.teardown()
    steps = fabric.precision_plugin.steps
    for gradient in (2.0, INF):
        optimizer.zero_grad()
        (model.weight * gradient).sum().backward()  # under a scaled mode this would be refused, or skipped
        assert optimizer.step() is None
        for scheduler in schedulers:
            scheduler.step()
    assert model.weight.item() == -INF and fabric.precision_plugin.steps == steps
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    fabric.setup(model, optimizer)
    optimizer.zero_grad()
    fabric.backward((model.weight * 0.0).nansum())
    optimizer.step()
    assert fabric.precision_plugin.steps + fabric.precision_plugin.skipped_steps == steps + 1


def test_a_deepcopied_optimizer_with_a_scheduler_steps_itself_only() -> None:
    fabric, model = Fabric(accelerator="cpu", precision="bf16-mixed"), weight()
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    scheduler = StepLR(fabric.setup_optimizers(twin), 1, gamma=0.5)
    fabric.backward(twin_model(torch.ones(1, 1)).sum())
    twin.step()
    scheduler.step()
    assert (twin_model.weight.item(), model.weight.item()) == (-1.0, 0.0)
    assert (twin.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (0.5, 1.0)
