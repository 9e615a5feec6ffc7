"""`keep=True`: what an optimizer makes of finite gradients is named, its remedy tried, and the loop is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precision_lab
from precision_lab.watching.watch import Watch


def train(
    path: Path,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
    steps: int = 60,
    before_step: Callable[[int, nn.Module, torch.optim.Optimizer], object] = lambda *_: None,
    **options: Any,
) -> tuple[Watch, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).to(dtype)
    optimizer = make(model)
    watched: Watch
    with precision_lab.watch(model, optimizer, file=path, **options) as watched:
        for number in range(1, steps + 1):
            x = torch.rand(4, 8).to(dtype)
            model(x).float().square().mean().backward()
            before_step(number, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return watched, model


def adam(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), **{"lr": 1e-4, **options})


def test_its_bytes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    watched, model = train(path, adam(), steps=3, keep=True)
    size = sum(param.numel() for param in model.parameters())
    # weights, gradients and two moments in float32, and a count of steps for each of the four parameters
    assert watched.kept_bytes == 4 * 4 * size + 4 * 4
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["keep"] for each in told if "keep" in each] == [2 * 4 * size, watched.kept_bytes]
    assert train(path, adam(), steps=3)[0].kept_bytes == 0


@pytest.mark.parametrize("fault", ["", "nan", "rate"])
def test_a_loop_computes_the_same_bits(tmp_path: Path, fault: str) -> None:
    def before_step(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == 50 and fault == "nan":
            next(model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
        if fault == "rate":
            optimizer.param_groups[0]["lr"] = 3.0 if number == 50 else 1e-4

    found: list[list[Tensor]] = []
    for keep in (True, False):
        watched, model = train(tmp_path / "a.jsonl", adam(), before_step=before_step, keep=keep)
        assert len(watched.alarms) == bool(fault)
        found.append([param.detach() for param in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_learning_rate_that_jumps(tmp_path: Path) -> None:
    def before_step(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 3.0 if number == 50 else 1e-4

    (alarm,) = train(tmp_path / "a.jsonl", adam(), before_step=before_step, keep=True)[0].alarms
    found = alarm.explanation
    assert (alarm.kind, alarm.step) == ("spike", 51) and (found.kind, found.phase) == ("learning rate", "optimizer")
    assert "its learning rate was 3, and 0.0001 in the 49 steps before" in found.what
    assert found.remedy.ours == "lr=0.0001 there, or a warm-up"
    assert found.remedy.outcome.startswith("finite: the largest update is ")


@pytest.mark.parametrize("keep", [True, False])
def test_an_epsilon_that_half_precision_has_not(tmp_path: Path, keep: bool) -> None:
    (alarm,) = train(tmp_path / "a.jsonl", adam(), torch.float16, steps=3, keep=keep)[0].alarms
    found = alarm.explanation
    assert alarm.step == 2 and "eps" in found.what and "is zero in float16" in found.what
    assert found.remedy is not None if keep else found.remedies[0].outcome == "not tried"
    assert found.remedies[0].torch.startswith("eps=1e-")
    assert (found.phase == "optimizer") is keep
    # what it says mends it
    eps = float(found.remedies[0].ours.partition("=")[2].partition(",")[0])
    assert train(tmp_path / "a.jsonl", adam(eps=eps), torch.float16, steps=20)[0].alarms == []


def test_a_momentum_that_leaves_half_precision(tmp_path: Path) -> None:
    def large(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for param in model.parameters():
            param.grad.fill_(3e4)  # type: ignore[union-attr]

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-7, momentum=0.9)

    (alarm,) = train(tmp_path / "a.jsonl", sgd, torch.float16, steps=4, before_step=large, keep=True)[0].alarms
    found = alarm.explanation
    assert alarm.step == 4 and (found.kind, found.name) == ("overflow in the optimizer", "0.weight")
    assert found.remedy is not None and found.remedy.ours == 'precision="bf16-mixed" or "bf16-master"'


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 2000, bias=False), nn.Linear(2000, 1)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        hidden = self.body(x) * factor
        return self.head(torch.sqrt(hidden.square()))


def test_gradients_of_large_parameters_that_nobody_looked_at_are_named_to_the_operation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with precision_lab.watch(model, optimizer, file=tmp_path / "a.jsonl", keep=True) as watched:
        for number in range(4):
            model(torch.rand(3, 4), float(number != 2)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    (alarm,) = watched.alarms
    found = alarm.explanation
    assert alarm.step == 4 and (found.kind, found.forward) == ("infinite slope", "sqrt")
    assert found.line.text == "return self.head(torch.sqrt(hidden.square()))"
    assert found.remedy is not None and any("step before" in each for each in found.notes)


def test_without_it_the_state_tells_whose_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Root()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with precision_lab.watch(model, optimizer, file=tmp_path / "a.jsonl") as watched:
        for number in range(4):
            model(torch.rand(3, 4), float(number != 2)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    (alarm,) = watched.alarms
    assert (alarm.step, alarm.explanation.name) == (4, "body.weight")
    assert "AdamW's exp_avg of body.weight is not finite either: a gradient" in alarm.explanation.what
