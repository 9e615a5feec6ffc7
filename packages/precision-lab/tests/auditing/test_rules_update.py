"""Scalers that update too often, too late or never, and gradients of several scales: each with its right twin."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding

Loop = Callable[[Any], None]


def found(loop: Loop, fails: type[Exception] | None = None) -> list[Finding]:
    torch.manual_seed(0)
    one, two = nn.Linear(8, 2), nn.Linear(8, 2)
    t = SimpleNamespace(
        model=one,
        other=two,
        optimizer=torch.optim.SGD(one.parameters(), lr=0.01),
        second=torch.optim.SGD(two.parameters(), lr=0.01),
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
        another=torch.amp.GradScaler("cpu", init_scale=256.0),
    )
    with audit(one, two) as report:
        for _ in range(2):
            t.optimizer.zero_grad()
            t.second.zero_grad()
            if fails is None:
                loop(t)
        if fails is not None:
            with pytest.raises(fails):
                loop(t)
    return report.at("warning")


def loss(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 0, 1]))


def only(findings: list[Finding], code: str) -> Finding:
    (finding,) = findings
    assert (finding.code, finding.level) == (code, "error")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")
    return finding


def both(t: Any) -> None:
    t.scaler.scale(loss(t.model) + loss(t.other)).backward()


# ---------------------------------------------------------------- once for each optimizer


def per_optimizer(t: Any) -> None:
    both(t)
    for each in (t.optimizer, t.second):
        t.scaler.step(each)
        t.scaler.update()  # here


def before_the_second(t: Any) -> None:
    both(t)
    t.scaler.step(t.optimizer)
    t.scaler.update()  # here
    t.scaler.unscale_(t.second)
    nn.utils.clip_grad_norm_(t.other.parameters(), 1.0)
    t.scaler.step(t.second)
    t.scaler.update()


@pytest.mark.parametrize("loop", [per_optimizer, before_the_second], ids=lambda loop: loop.__name__)
def test_an_update_for_each_optimizer_is_found(loop: Loop) -> None:
    assert "once in an iteration" in only(found(loop), "update-per-optimizer").remedy.torch


def gan(t: Any) -> None:
    for model, optimizer in ((t.model, t.optimizer), (t.other, t.second)):
        t.scaler.scale(loss(model)).backward()
        t.scaler.step(optimizer)
        t.scaler.update()


def once(t: Any) -> None:
    both(t)
    t.scaler.step(t.optimizer)
    t.scaler.step(t.second)
    t.scaler.update()


def accumulated(t: Any) -> None:
    for _ in range(3):
        t.scaler.scale(loss(t.model) / 3).backward()
    t.scaler.step(t.optimizer)
    t.scaler.update()


def two_scalers(t: Any) -> None:
    for model, optimizer, scaler in ((t.model, t.optimizer, t.scaler), (t.other, t.second, t.another)):
        scaler.scale(loss(model)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("loop", [gan, once, accumulated, two_scalers], ids=lambda loop: loop.__name__)
def test_right_loops_give_no_finding(loop: Loop) -> None:
    assert found(loop) == []


# ---------------------------------------------------------------- never, or too often


def never(t: Any) -> None:
    for _ in range(2):
        t.optimizer.zero_grad()
        t.scaler.scale(loss(t.model)).backward()
        t.scaler.step(t.optimizer)  # here


def never_with_unscale(t: Any) -> None:
    for _ in range(2):
        t.optimizer.zero_grad()
        t.scaler.scale(loss(t.model)).backward()
        t.scaler.unscale_(t.optimizer)
        t.scaler.step(t.optimizer)  # here


@pytest.mark.parametrize("loop", [never, never_with_unscale], ids=lambda loop: loop.__name__)
def test_a_missing_update_is_found_where_torch_raises(loop: Loop) -> None:
    only(found(loop, RuntimeError), "update-missing")


def test_an_update_in_each_micro_batch_is_found_where_torch_raises() -> None:
    def loop(t: Any) -> None:
        for _ in range(2):
            t.scaler.scale(loss(t.model) / 2).backward()
            t.scaler.update()  # here
        t.scaler.step(t.optimizer)

    only(found(loop, AssertionError), "update-without-step")


def test_a_scaler_for_each_step_is_found() -> None:
    def loop(t: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss(t.model)).backward()
        scaler.step(t.optimizer)  # here
        scaler.update()

    (finding,) = found(loop)
    assert (finding.code, finding.level) == ("scaler-per-step", "warning")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


# ---------------------------------------------------------------- several scales


def test_another_scaler_is_found() -> None:
    def loop(t: Any) -> None:
        t.another.scale(torch.zeros(()))
        t.scaler.scale(loss(t.model)).backward()
        t.another.step(t.optimizer)  # here
        t.another.update()

    only(found(loop), "another-scaler")


def test_scaled_gradients_on_unscaled_ones_are_found() -> None:
    def loop(t: Any) -> None:
        for _ in range(2):
            t.scaler.scale(loss(t.model) / 2).backward()
            for param in t.model.parameters():
                param.grad.div_(t.scaler.get_scale())
        t.optimizer.step()  # here

    assert only(found(loop), "scales-mixed").what.startswith("gradients of 2 parameters")
