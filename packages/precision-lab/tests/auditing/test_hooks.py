"""Which model a forward belongs to: the outermost module with a method that runs, as a training_step is."""

from __future__ import annotations

import pytest
import torch
from planted import audited, found
from torch import Tensor, nn


class Learner(nn.Module):
    """Its forward is never called: a training_step calls its parts, as Lightning's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def training_step(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).square().mean()  # type: ignore[no-any-return]


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def run(self, x: Tensor) -> Tensor:
        return self.inner.training_step(x)  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize(("wrapped", "name"), [(False, "body.weight"), (True, "inner.body.weight")])
def test_parts_of_a_model_have_its_names(wrapped: bool, name: str) -> None:
    model = Outer(Learner()) if wrapped else Learner()
    model.bfloat16()

    def run() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            (model.run if wrapped else model.training_step)(torch.randn(8, 16).bfloat16()).backward()  # type: ignore
            optimizer.step()

    report = audited(run)
    assert name in report.record.modules or name in report.record.params.values()
    assert "all 4 parameters" in found(report, "half-optimizer-state").what


def test_a_caller_that_does_not_contain_the_module_is_not_its_model() -> None:
    other = nn.Linear(16, 4)

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(2, 2)

        def run(self) -> None:
            optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
            other(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()

    report = audited(Caller().run)
    assert set(report.record.modules) == {""} and set(report.record.params.values()) == {"weight", "bias"}


@pytest.mark.parametrize("closure", [False, True])
def test_what_a_closure_computes_is_the_loops_own(closure: bool) -> None:
    """Lightning's Trainer runs training_step within the optimizer's step."""
    model = nn.Linear(16, 600).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def compute() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", enabled=False):
            loss = nn.functional.cross_entropy(model(torch.randn(8, 16).bfloat16()), torch.arange(8))  # here
        loss.backward()
        return loss

    def run() -> None:
        for _ in range(2):
            if closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()

    report = audited(run)
    finding = found(report, "half-loss")
    assert finding.line is not None and finding.line.text.endswith("# here")
    assert report.record.count("autocast") == 2 and report.record.steps == 2


def test_a_closure_is_given_back_what_it_returns() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    losses: list[float] = []

    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 2)).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss  # type: ignore[no-any-return]

    def run() -> None:
        assert optimizer.step(compute).item() == losses[0]

    assert audited(run).findings == [] and len(losses) > 1
