"""Under torch.compile: no graph break, no compilation a step, and what cannot be seen is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_lab import watch

pytestmark = [
    pytest.mark.slow_start,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch's own, compiling
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(4, 4), Part(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.first(x)))


def train(how: str, path: Path | None) -> tuple[list[float], dict[str, int]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run: Any = model
    given: nn.Module = model
    if how == "in place":
        model.compile(backend="eager", fullgraph=True)
    elif how == "a part":
        model.part = torch.compile(model.part, backend="eager", fullgraph=True)
    else:
        run = torch.compile(model, backend="eager", fullgraph=True)
        given = run if how == "given" else model
    losses = []

    def loop() -> None:
        for _ in range(6):
            loss = run(torch.randn(3, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    if path is None:
        loop()
    else:
        with watch(given, optimizer, every=2, file=path):
            loop()
    return losses, dict(torch._dynamo.utils.counters["stats"])


@pytest.mark.parametrize("how", ["given", "inner given", "in place", "a part"])
def test_nothing_is_compiled_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.jsonl"
    assert train(how, path) == train(how, None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    found = lines(path)
    samples = [line for line in found if "sample" in line]
    assert [line["loss"] > 0 for line in found if "step" in line] == [True] * 6 and len(samples) == 3
    assert all(len(line["parameters"]) == 6 for line in samples)
    modules = {name for line in samples for name in line["modules"]}
    unseen = found[-1]["unseen"]
    if how == "a part":
        assert modules == {"first", "last", "part"} and unseen == [
            "inside of part: it is compiled; its own output and gradients of parameters are seen"
        ]
    elif how == "given":
        assert modules == {""} and unseen[0].startswith("inside of OptimizedModule: it is compiled")
    elif how == "in place":
        assert modules == {""} and unseen[0].startswith("inside of Net: it is compiled")
    else:
        assert modules == set() and unseen[0].startswith("no training forward of Net was seen")
