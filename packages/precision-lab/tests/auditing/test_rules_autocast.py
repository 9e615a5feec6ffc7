"""Autocast that does nothing, or covers too much or too little: each with its right twin."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding
from precision_lab.auditing.record import Asked, Context, Event, Record
from precision_lab.auditing.rules_autocast import around_backward

Step = Callable[[nn.Module, torch.optim.Optimizer], None]


def found(step: Step, steps: int = 2, level: str = "warning") -> list[Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available|In CPU autocast|.*torch.cuda.amp.autocast")
        with audit(model, optimizer) as report:
            for _ in range(steps):
                optimizer.zero_grad()
                step(model, optimizer)
    return report.at(level)


def loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 0, 1]))


def end(value: Tensor, optimizer: torch.optim.Optimizer) -> None:
    value.backward()
    optimizer.step()


def right(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model)
    end(value, optimizer)


def right_and_evaluates(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    right(model, optimizer)
    model.eval()
    with torch.no_grad():
        loss(model)
    model.train()


def right_turned_off(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        value = loss(model)
    end(value, optimizer)


def right_off_within(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model)
        with torch.autocast("cpu", enabled=False):
            value = value + loss(model)
    end(value, optimizer)


def right_for_both(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cuda", torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        value = loss(model)
    end(value, optimizer)


def right_no_grad_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(torch.randn(4, 8))
        value = loss(model)
    end(value, optimizer)


def right_loop_in_one_context_without_cache(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for _ in range(2):
            optimizer.zero_grad()
            value = loss(model)
            with torch.autocast("cpu", enabled=False):
                end(value, optimizer)


@pytest.mark.parametrize(
    "step",
    [
        *(right, right_and_evaluates, right_turned_off, right_off_within, right_for_both, right_no_grad_first),
        right_loop_in_one_context_without_cache,
    ],
    ids=lambda step: step.__name__,
)
def test_right_loops_give_no_finding(step: Step) -> None:
    assert found(step) == []


def test_a_dry_run_before_training_is_right() -> None:
    ran = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not ran:
            ran.append(model(torch.zeros(1, 8)))
        right(model, optimizer)

    assert found(step) == []


# ---------------------------------------------------------------- does nothing


def on_cuda(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cuda", torch.float16):  # here
        value = loss(model)
    end(value, optimizer)


def on_cuda_as_of_old(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.cuda.amp.autocast():  # here
        value = loss(model)
    end(value, optimizer)


def on_xla(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("xla", torch.bfloat16):  # here
        value = loss(model)
    end(value, optimizer)


def in_float64(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.float64):  # here
        value = loss(model)
    end(value, optimizer)


def as_decorator(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    forward = torch.autocast("cuda", torch.bfloat16)(loss)
    end(forward(model), optimizer)


@pytest.mark.parametrize("step", [on_cuda, on_cuda_as_of_old, on_xla, in_float64], ids=lambda step: step.__name__)
def test_autocast_that_does_nothing_is_found(step: Step) -> None:
    (finding,) = found(step)
    assert (finding.code, finding.level) == ("autocast-does-nothing", "warning")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")
    said = "torch disabled" if step is in_float64 else 'the parameters are on "cpu"'
    assert said in finding.what


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("xla", ["autocast-does-nothing"])])
def test_a_loop_without_modules_has_a_device_too(device: str, expected: list[str]) -> None:
    weight = nn.Parameter(torch.randn(8, 2))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    with audit() as report:
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                value = nn.functional.cross_entropy(torch.randn(4, 8) @ weight, torch.tensor([0, 1, 0, 1]))
            end(value, optimizer)
    assert [each.code for each in report.at("warning")] == expected


def test_a_decorator_that_does_nothing_is_found() -> None:
    assert [each.code for each in found(as_decorator)] == ["autocast-does-nothing"]


def around_the_loss(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    output = model(torch.randn(4, 8))
    with torch.autocast("cpu", torch.bfloat16):  # here
        value = nn.functional.cross_entropy(output, torch.tensor([0, 1, 0, 1]))
    end(value, optimizer)


def test_autocast_around_the_loss_alone_is_found() -> None:
    (finding,) = found(around_the_loss)
    assert (finding.code, finding.level) == ("autocast-around-nothing", "warning")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


# ---------------------------------------------------------------- too much, too little


def backward_inside(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss(model).backward()  # here
    optimizer.step()


def backward_by_autograd_inside(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward([loss(model)])  # here
    optimizer.step()


@pytest.mark.parametrize("step", [backward_inside, backward_by_autograd_inside], ids=lambda step: step.__name__)
def test_backward_under_autocast_is_found(step: Step) -> None:
    (finding,) = found(step)
    assert (finding.code, finding.level) == ("autocast-around-backward", "warning")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


def second_loss_outside(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model)
    other = model(torch.randn(4, 8)).square().mean()  # here
    end(value + other, optimizer)


def every_other_outside(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for inside in (True, False):
        optimizer.zero_grad()
        if inside:
            right(model, optimizer)
        else:
            output = model(torch.randn(4, 8))  # here
            end(output.square().mean(), optimizer)


@pytest.mark.parametrize("step", [second_loss_outside, every_other_outside], ids=lambda step: step.__name__)
def test_a_forward_outside_of_autocast_is_found(step: Step) -> None:
    (finding,) = found(step)
    assert (finding.code, finding.level) == ("forward-outside-autocast", "warning")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")
    assert "bfloat16" in finding.what


@pytest.mark.parametrize(
    ("host", "by", "expected"), [("Trainer", "Lightning", 0), ("Trainer", "", 1), ("Fabric", "Lightning", 1)]
)
def test_what_lightnings_trainer_runs_under_autocast_is_right(host: str, by: str, expected: int) -> None:
    """It runs all of training_step so; what the user entered there is the user's."""
    record = Record(asked=[Asked("Lightning", f'{host}(precision="bf16-mixed")', torch.bfloat16, False)])
    open_ones = [
        Context("cpu", torch.bfloat16, True, True, "Lightning"),
        Context("cpu", torch.bfloat16, True, True, by),
    ]
    record.events = [Event("backward", None, "Lightning", 0, {"autocast": ["cpu"], "contexts": open_ones})]
    assert len(list(around_backward(record))) == expected
