"""A few of the first, small parameters: one that is not finite is told in the step that made it so, before the step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import precision_lab
from precision_lab.watching.probes import ELEMENTS, Probes


def with_gradients(*values: float, size: int = 3, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for _ in values]
    for param, value in zip(params, values, strict=True):
        param.grad = torch.full_like(param, 1.0)
        param.grad[0] = value
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values(bad: float, dtype: torch.dtype) -> None:
    largest = Probes().largest(with_gradients(2.0, -5.0, dtype=dtype))
    assert largest is not None and float(largest) == 7.0
    largest = Probes().largest(with_gradients(2.0, bad, dtype=dtype))
    assert largest is not None and not bool(largest.isfinite())
    many = Probes().largest(with_gradients(6e4, 6e4, size=ELEMENTS, dtype=torch.float16))
    assert many is not None and bool(many.isfinite())  # whose norm float16 has not


def test_only_a_few_small_ones_are_looked_at() -> None:
    assert Probes().largest(with_gradients(1.0, size=ELEMENTS + 1)) is None
    assert float(Probes().largest(with_gradients(1, 1, 1, 1, 1e6)) or 0) == 4.0
    optimizer = with_gradients(1.0)
    optimizer.param_groups[0]["params"][0].grad = None
    assert Probes().largest(optimizer) is None


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sqrt(self.body(x).square()))


def test_a_slope_that_is_infinite_is_named_before_the_step(tmp_path: Path) -> None:
    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with precision_lab.watch(model, optimizer, file=tmp_path / "a.jsonl") as watched:
        for number in range(5):
            if number == 2:
                with torch.no_grad():
                    model.body.weight.zero_()
                    model.body.bias.zero_()
            model(torch.rand(3, 4)).square().mean().backward()
            if number == 2:  # still finite
                assert watched.alarms == [] and bool(model.body.weight.isfinite().all())
            optimizer.step()
            optimizer.zero_grad()
    (alarm,) = watched.alarms
    assert (alarm.kind, alarm.step, alarm.before_step) == ("gradients", 3, True)
    assert alarm.explanation.kind == "infinite slope" and alarm.explanation.remedy is not None
    assert alarm.explanation.line.text == "return self.head(torch.sqrt(self.body(x).square()))"


def test_gradients_of_a_closure_are_looked_at_before_the_step(tmp_path: Path) -> None:
    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model.body.weight.zero_()
        model.body.bias.zero_()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.rand(3, 4)).square().mean()
        loss.backward()
        return loss

    with precision_lab.watch(model, optimizer, file=tmp_path / "a.jsonl") as watched:
        optimizer.step(closure)
    (alarm,) = watched.alarms
    assert (alarm.kind, alarm.step, alarm.before_step) == ("gradients", 1, True)
    assert alarm.explanation.kind == "infinite slope"
