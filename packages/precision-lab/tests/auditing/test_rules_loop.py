"""Loops whose calls come in a wrong order: each with its right twin."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

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


def right(t: Any) -> None:
    t.optimizer.zero_grad()
    loss(t.model).backward()
    t.optimizer.step()
    t.scheduler.step()


def right_in_place(t: Any) -> None:
    loss(t.model).backward()
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=False)


def right_other_zeros(t: Any) -> None:
    loss(t.model).backward()
    t.optimizer.step()
    for param in t.model.parameters():
        param.grad = torch.zeros_like(param)


def right_accumulation(t: Any) -> None:
    for _ in range(4):
        (loss(t.model) / 4).backward()
    t.optimizer.step()
    for param in t.model.parameters():
        param.grad = None


def right_closure(t: Any) -> None:
    def closure() -> Tensor:
        t.optimizer.zero_grad()
        value = loss(t.model)
        value.backward()
        return value

    t.optimizer.step(closure)


def right_decaying_gradients(t: Any) -> None:
    """Momentum by hand: gradients are kept, and made smaller after the step."""
    loss(t.model).backward()
    t.optimizer.step()
    for param in t.model.parameters():
        param.grad.mul_(0.5)


@pytest.mark.parametrize(
    "step",
    [right, right_in_place, right_other_zeros, right_accumulation, right_closure, right_decaying_gradients],
    ids=lambda step: step.__name__,
)
def test_right_loops_give_no_finding(step: Step) -> None:
    assert found(step, steps=3) == []


def test_a_gan_whose_generator_adds_to_the_other_gradients_is_right() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4), nn.Linear(4, 1)
    first, second = (torch.optim.Adam(each.parameters(), lr=1e-3) for each in (one, two))
    with audit(one, two) as report:
        for _ in range(3):
            second.zero_grad()
            two(one(torch.randn(4, 4)).detach()).mean().backward()
            second.step()
            first.zero_grad()
            (-two(one(torch.randn(4, 4))).mean()).backward()
            first.step()
    assert report.at("warning") == []


# ---------------------------------------------------------------- zero_grad, backward, step


def never_cleared(t: Any) -> None:
    loss(t.model).backward()
    t.optimizer.step()  # here


def never_cleared_under_a_scaler(t: Any) -> None:
    t.scaler.scale(half_loss(t.model)).backward()
    t.scaler.step(t.optimizer)  # here
    t.scaler.update()


def cleared_between(t: Any) -> None:
    loss(t.model).backward()
    t.optimizer.zero_grad()
    t.optimizer.step()  # here


def cleared_in_place_between(t: Any) -> None:
    loss(t.model).backward()
    t.model.zero_grad(set_to_none=False)
    t.optimizer.step()  # here


def detached(t: Any) -> None:
    hidden = t.model(torch.randn(4, 8)).detach()
    nn.functional.mse_loss(hidden + torch.zeros(2, requires_grad=True), torch.ones(4, 2)).backward()
    t.optimizer.step()  # here


def of_a_copy(t: Any) -> None:
    if not hasattr(t, "copy"):
        t.copy = copy.deepcopy(t.model)
    loss(t.copy).backward()
    t.optimizer.step()  # here


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (never_cleared, "gradients-kept"),
        (never_cleared_under_a_scaler, "gradients-kept"),
        (cleared_between, "cleared-before-step"),
        (cleared_in_place_between, "cleared-before-step"),
        (detached, "stepped-without-gradients"),
        (of_a_copy, "stepped-without-gradients"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_a_wrong_order_is_found(step: Step, code: str) -> None:
    findings = [each for each in found(step, level="error") if each.code == code]
    assert len(findings) == 1
    assert findings[0].line is not None
    assert findings[0].line.text.endswith("# here")


def test_gradients_that_are_cleared_before_a_scaler_steps_are_found_where_torch_raises() -> None:
    def step(t: Any) -> None:
        t.scaler.scale(half_loss(t.model)).backward()
        t.optimizer.zero_grad()
        with pytest.raises(AssertionError):
            t.scaler.step(t.optimizer)

    assert [each.code for each in found(step, steps=1)] == ["cleared-before-step"]


@pytest.mark.parametrize("right", [False, True])
def test_a_part_that_was_replaced_after_the_optimizer_was_made_is_found(right: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if right:
        model[1] = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if not right:
        model[1] = nn.Linear(4, 3)
    with audit(model, optimizer) as report:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    found = [(each.code, each.level, each.module) for each in report.at("warning")]
    assert found == ([] if right else [("replaced-parameters", "error", "1")])


@pytest.mark.parametrize("right", [False, True])
def test_a_model_that_is_cast_while_it_trains_is_found(right: bool) -> None:
    def step(t: Any) -> None:
        dtype = next(t.model.parameters()).dtype
        t.model(torch.randn(4, 8, dtype=dtype)).float().square().mean().backward()
        t.optimizer.step()
        t.optimizer.zero_grad()
        (copy.deepcopy(t.model) if right else t.model).to(torch.bfloat16)

    findings = [each for each in found(step, level="error") if each.code == "recast-while-training"]
    assert [each.what for each in findings] == (
        [] if right else ["4 parameters are bfloat16 at this step, and were float32 before"]
    )


def test_an_optimizer_of_parameters_that_no_model_has_is_told() -> None:
    torch.manual_seed(0)
    old = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    model = copy.deepcopy(old)
    with audit() as report:
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            model.zero_grad()
    (finding,) = report.at("error")
    assert finding.code == "stepped-without-gradients"
    assert "no model that ran has them" in finding.what
    assert "make the optimizer last" in finding.remedy.torch


def test_a_model_that_is_cast_to_half_and_back_to_save_it_is_found() -> None:
    def step(t: Any) -> None:
        right(t)
        t.model.half()  # here
        t.model.state_dict()
        t.model.float()

    (finding,) = found(step, steps=1)
    assert (finding.code, finding.level) == ("recast-while-training", "error")
    assert "from float32 to float16 and back" in finding.what
    assert finding.line is not None and finding.line.text.endswith("# here")


def test_a_copy_that_is_cast_is_right() -> None:
    def step(t: Any) -> None:
        right(t)
        copy.deepcopy(t.model).half().float()

    assert found(step) == []
