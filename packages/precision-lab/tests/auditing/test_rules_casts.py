"""Half copies of weights that autocast keeps too long, or without gradients: each with its right twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding

Step = Callable[[nn.Module, torch.optim.Optimizer], None]


def found(step: Step, steps: int = 2, level: str = "warning") -> list[Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
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


def steps_in_one_context(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            optimizer.zero_grad()
            output = model(torch.randn(4, 8))  # here
            value = output.float().square().mean()
            with torch.autocast("cpu", enabled=False):
                end(value, optimizer)


def test_steps_in_one_context_compute_with_old_weights() -> None:
    (finding,) = found(steps_in_one_context, steps=1)
    assert (finding.code, finding.level) == ("stale-casts", "error")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")
    assert "4 of its parameters" in finding.what


def test_torch_does_compute_with_old_weights() -> None:
    model, x = nn.Linear(4, 1), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with torch.no_grad():
            model.weight.add_(1.0)
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)


class Cached(nn.Module):
    """Keeps a half copy of its weight that it made without gradients."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8))
        self.bias = nn.Parameter(torch.zeros(2))
        self.right = right

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.right):
            weight = self.weight.to(torch.bfloat16)  # here
        return nn.functional.linear(x.to(torch.bfloat16), weight).float() + self.bias


@pytest.mark.parametrize("right", [False, True])
def test_a_weight_that_was_cast_under_no_grad_is_found(right: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Cached(right))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with audit(model, optimizer) as report:
        for _ in range(2):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    findings = [each for each in report.at("warning") if each.code == "cast-without-gradients"]
    assert [(each.level, each.module) for each in findings] == ([] if right else [("error", "1")])
    if not right:
        assert findings[0].line is not None
        assert findings[0].line.text.endswith("# here")


@pytest.mark.parametrize("own", [False, True])
def test_a_forward_under_no_grad_that_shares_the_cache_is_worth_knowing(own: bool) -> None:
    """Newer versions of torch do not keep what was cast under no_grad."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                model(torch.randn(4, 8))  # here
            if own:
                torch.clear_autocast_cache()
            value = loss(model)
        end(value, optimizer)

    findings = found(step, steps=1, level="info")
    assert [(each.code, each.level) for each in findings] == ([] if own else [("cast-without-gradients", "info")])
    assert all(each.line is not None and each.line.text.endswith("# here") for each in findings)
