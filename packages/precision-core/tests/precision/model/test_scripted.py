"""Scripted and traced models, whole and as parts of others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

X = torch.linspace(-1, 1, 12).view(3, 4)
# Not 16-mixed beside bf16-mixed: torch keeps the first autocast dtype of a scripted class for the whole process.
MODES = ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"]
ATOL = {"32-true": 1e-6, "64-true": 1e-6}


def scripted() -> Any:
    torch.manual_seed(0)
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


def traced() -> Any:
    torch.manual_seed(0)
    return torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), X)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.traced, self.scripted = traced(), scripted()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("table", torch.linspace(0, 1, 4).sin(), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.layer(self.norm(self.scripted(self.traced(x + self.table) + self.table)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [scripted, traced, Parts])
def test_it_is_set_up_and_trains(make: Any, mode: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    model, exact = make(), make().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = fabric.setup(model, optimizer)
    output, expected = model(X), exact(X.double())
    assert output.dtype is (torch.float64 if mode == "64-true" else torch.float32)
    assert torch.allclose(output.double(), expected, atol=ATOL.get(mode, 0.05))
    before = [param.detach().clone() for param in model.parameters()]
    fabric.backward(output.square().sum() / 64)
    optimizer.step()
    if not fabric.last_step_skipped:
        assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    fabric.save(tmp_path / "c", {"model": model})
    fabric.load(tmp_path / "c", {"model": model})
    fabric.teardown()


@pytest.mark.parametrize("mode", ["bf16-true; traced: 32-true", "bf16-mixed; scripted: 32-true", "32-true"])
def test_scripted_parts_are_exceptions_and_are_copied(mode: str) -> None:
    model: Any = Fabric(accelerator="cpu", precision=mode).setup(Parts())
    assert model(X).dtype is torch.float32
    if mode == "bf16-true; traced: 32-true":
        assert {param.dtype for param in model.traced.parameters()} == {torch.float32}
    if mode == "32-true":
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for param in twin.parameters():
                param.zero_()
        assert not twin(X).any() and model(X).any()
