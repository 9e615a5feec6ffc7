"""Schedules that go on where the optimizer does not: each with its right twin."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding

Step = Callable[[Any], None]


def found(step: Step, steps: int = 2, scale: float = 256.0, level: str = "warning") -> list[Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        with audit(model, optimizer) as report:
            t = SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler, scheduler=StepLR(optimizer, 1))
            for _ in range(steps):
                step(t)
    return report.at(level)


def loss(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 8)).square().mean()  # type: ignore[no-any-return]


def half_loss(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return loss(model).float()


def scaled(t: Any) -> None:
    t.optimizer.zero_grad()
    t.scaler.scale(half_loss(t.model)).backward()
    t.scaler.step(t.optimizer)
    t.scaler.update()
    t.scheduler.step()  # here


def guarded(t: Any) -> None:
    t.optimizer.zero_grad()
    before = t.scaler.get_scale()
    t.scaler.scale(half_loss(t.model)).backward()
    t.scaler.step(t.optimizer)
    t.scaler.update()
    if t.scaler.get_scale() >= before:
        t.scheduler.step()


@pytest.mark.parametrize("kind", [StepLR, LambdaLR])
def test_a_scheduler_that_steps_where_the_optimizer_was_skipped_is_found(kind: type) -> None:
    def step(t: Any) -> None:
        if kind is LambdaLR and not hasattr(t, "made"):
            t.made = t.scheduler = LambdaLR(t.optimizer, lambda step: 0.9**step)
        scaled(t)

    (finding,) = found(step, scale=2.0**60)
    assert (finding.code, finding.level) == ("scheduler-on-skipped-step", "warning")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


@pytest.mark.parametrize("step", [scaled, guarded], ids=lambda step: step.__name__)
def test_a_scheduler_after_steps_that_ran_is_right(step: Step) -> None:
    assert found(step) == []
    assert [each.code for each in found(step, level="info")] == (["scheduler-unguarded"] if step is scaled else [])


def test_a_scheduler_that_is_guarded_waits_for_the_skipped_step() -> None:
    assert found(guarded, scale=2.0**60) == []


def test_a_scheduler_once_an_epoch_is_right_where_a_step_of_it_was_skipped() -> None:
    def epoch(t: Any) -> None:
        for number in range(3):
            t.optimizer.zero_grad()
            factor = 2.0**60 if number == 0 else 1.0
            (t.scaler.scale(half_loss(t.model)) * factor).backward()
            t.scaler.step(t.optimizer)
            t.scaler.update()
        t.scheduler.step()

    assert found(epoch, steps=1) == []


@pytest.mark.parametrize("first", ["scheduler", "optimizer"])
def test_a_scheduler_before_the_optimizer_is_found(first: str) -> None:
    def step(t: Any) -> None:
        t.optimizer.zero_grad()
        loss(t.model).backward()
        (t.scheduler if first == "scheduler" else t.optimizer).step()
        (t.optimizer if first == "scheduler" else t.scheduler).step()

    assert [each.code for each in found(step)] == (["scheduler-before-optimizer"] if first == "scheduler" else [])


# ---------------------------------------------------------------- by hand


def unscheduled(t: Any) -> None:
    t.optimizer.zero_grad()
    t.scaler.scale(half_loss(t.model)).backward()
    t.scaler.step(t.optimizer)
    t.scaler.update()


class WarmUp:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * self.steps


def test_a_schedule_by_hand_that_steps_where_the_optimizer_was_skipped_is_found() -> None:
    def step(t: Any) -> None:
        if not hasattr(t, "warm_up"):
            t.warm_up = WarmUp(t.optimizer)
        unscheduled(t)
        t.warm_up.step()

    (finding,) = found(step, steps=3, scale=2.0**60)
    assert (finding.code, finding.level, finding.sure) == ("scheduler-on-skipped-step", "warning", "likely")
    assert finding.line is not None and 'group["lr"] = ' in finding.line.text
    assert found(step, steps=3) == []  # none was skipped


def test_a_rate_that_does_not_change_is_right() -> None:
    assert found(unscheduled, steps=3, scale=2.0**60, level="info") == []
