"""Schedulers beside skipped steps: the rates are those of a loop that asks after each step, and no step waits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, SequentialLR, StepLR

from precision_core import Fabric, MixedPrecision
from precision_core.scaling.loss_scaler import LossScaler
from precision_core.testing import HostReads

STEPS = 12


def one_cycle(optimizer: Any) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)


def warmup(optimizer: Any) -> LRScheduler:
    warm = LambdaLR(optimizer, lambda step: (step + 1) / 4)
    return SequentialLR(optimizer, [warm, CosineAnnealingLR(optimizer, STEPS)], milestones=[3])


SCHEDULERS = (one_cycle, warmup, lambda optimizer: StepLR(optimizer, 2, gamma=0.5))


class OwnState(StepLR):
    """Keeps a state of its own, with a key that is also a method's name."""

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["step"]


def made(*, on_device: bool, precision: str = "16-mixed") -> tuple[Fabric, nn.Module, Any]:
    """Returns a Fabric whose scaler leaves outcomes where they are, as on a GPU, or reads them at once."""
    plugin: Any = precision
    if precision == "16-mixed":
        plugin = MixedPrecision(precision, device="cpu", scaler={"init_scale": 128.0})
        plugin.scaler = LossScaler(plugin.setup_scaler(), min_scale=2.0**-14, max_skips=50, avoid_sync=on_device)
    fabric = Fabric("cpu", precision=plugin)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return fabric, *fabric.setup(model, AdamW(model.parameters(), lr=0.01, eps=1e-4, fused=True))


def rates(overflows: list[bool], make: Any, *, on_device: bool, set_up: bool) -> tuple[list[float], list[float]]:
    """Returns the rate that each step was taken with, and the parameters in the end."""
    fabric, model, optimizer = made(on_device=on_device)
    scheduler = make(optimizer)
    if set_up:
        assert fabric.setup_schedulers(scheduler) is scheduler
    seen = []
    x = torch.ones(2, 4)
    for overflow in overflows:
        optimizer.zero_grad()
        fabric.backward(model(x * (float("inf") if overflow else 1.0)).mean())
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"])  # what the step had
        if set_up or not fabric.last_step_skipped:
            scheduler.step()
    seen.append(scheduler.get_last_lr()[0])
    assert scheduler.state_dict()["last_epoch"] == STEPS - sum(overflows)
    fabric.teardown()
    return seen, [value for param in model.parameters() for value in param.flatten().tolist()]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()` was not necessary")  # SequentialLR's own
@pytest.mark.parametrize("on_device", [False, True])
def test_the_rates_are_those_of_a_loop_that_asks(on_device: bool) -> None:
    for seed in range(100):
        chance = random.Random(seed)
        overflows = [chance.random() < 0.3 for _ in range(STEPS)]
        make = SCHEDULERS[seed % len(SCHEDULERS)]
        asked = rates(overflows, make, on_device=False, set_up=False)
        assert rates(overflows, make, on_device=on_device, set_up=True) == asked


def test_no_step_waits_to_know() -> None:
    fabric, model, optimizer = made(on_device=True)
    scheduler = fabric.setup_schedulers(StepLR(optimizer, 1, gamma=0.5))
    counted, own, before = HostReads(optimizer), 0, 0
    for number in range(5):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 4)).mean())
        with counted:
            optimizer.step()
        lines = [line for line in counted.lines if "strategies/schedulers.py" in line]
        if number > 1:  # in the first ones state is made
            assert len(lines) == own + 1  # of the step before, whose flag came meanwhile
            assert len(counted.lines) == before + 1
        with counted:
            scheduler.step()
        own, before = len(lines), len(counted.lines)
    assert optimizer.param_groups[0]["lr"] == 0.01 * 0.5**4 and scheduler.get_last_lr() == [0.01 * 0.5**5]


def test_each_optimizer_has_an_outcome_of_its_own() -> None:
    plugin = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 128.0})
    fabric = Fabric("cpu", precision=plugin)
    models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optimizers = [SGD(models[0].parameters(), lr=1.0), Adam(models[1].parameters(), lr=1.0)]
    for model, optimizer in zip(models, optimizers, strict=True):
        fabric.setup(model, optimizer)
    schedulers = fabric.setup_schedulers(*(StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers))
    fabric.backward(models[0](torch.full((1, 2), float("inf"))).sum())
    fabric.backward(models[1](torch.ones(1, 2)).sum())
    for optimizer in optimizers:
        optimizer.step()
    for scheduler in schedulers:
        scheduler.step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1.0, 0.5]


def test_where_nothing_is_scaled_each_step_is_taken_at_once() -> None:
    fabric, model, optimizer = made(on_device=False, precision="bf16-mixed")
    scheduler = fabric.setup_schedulers(StepLR(optimizer, 1, gamma=0.5))
    fabric.backward(model(torch.ones(2, 4)).mean())
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    fabric.teardown()
    assert "step" not in vars(scheduler)


def test_what_cannot_be_set_up_is_refused_by_name() -> None:
    fabric, _, optimizer = made(on_device=False)
    other = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="set the optimizer of this StepLR up first"):
        fabric.setup_schedulers(StepLR(other, 1))
    with pytest.raises(ValueError, match="expected schedulers with an `optimizer` and a `step`, got a SGD"):
        fabric.setup_schedulers(other)
    scheduler = StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="this StepLR is set up already"):
        fabric.setup_schedulers(scheduler, scheduler)
    assert "step" not in vars(scheduler)  # nothing was set up


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()` was not necessary")  # SequentialLR's own
@pytest.mark.parametrize("make", [*SCHEDULERS, lambda optimizer: OwnState(optimizer, 3)])
def test_a_set_up_scheduler_is_saved_as_if_it_were_not(make: Any, tmp_path: Path) -> None:
    states = []
    for set_up in (False, True):
        fabric, model, optimizer = made(on_device=False)
        scheduler = make(optimizer)
        if set_up:
            fabric.setup_schedulers(scheduler)
        for _ in range(2):
            fabric.backward(model(torch.ones(2, 4)).mean())
            optimizer.step()
            scheduler.step()
        states.append(scheduler.state_dict())
        if set_up:
            fabric.save(tmp_path / "last.ckpt", {"scheduler": scheduler})
            again = fabric.setup_schedulers(make(optimizer))
            fabric.load(tmp_path / "last.ckpt", {"scheduler": again})
            assert again.state_dict() == scheduler.state_dict()
            assert again.last_epoch == 2
        fabric.teardown()
    plain, saved = states
    assert saved == plain
