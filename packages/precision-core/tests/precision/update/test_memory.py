"""Memory: what a step allocates beside what is kept, as torch's profiler sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from precision_core import Fabric

SHAPES = [(64, 96)] * 100 + [(200, 200)]
SIZE = sum(rows * columns for rows, columns in SHAPES)


def allocated(function: Callable[[], object], path: Path) -> tuple[float, float]:
    """Returns bytes for each parameter: the most that `function` had at a time, and what is left of it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most / SIZE, now / SIZE


class Unknown(SGD):
    """An optimizer that nothing is known of."""

    def step(self, closure: None = None) -> None:
        """Steps as its base class."""
        super().step()


def peak(mode: str, make: Callable[[nn.Module], Optimizer], path: Path) -> tuple[float, float]:
    """Returns what a step allocates that is not the first."""
    fabric = Fabric("cpu", precision=mode)
    model = nn.ParameterList(nn.Parameter(torch.randn(shape) * 0.1) for shape in SHAPES)
    optimizer = make(model)
    fabric.setup(model, optimizer)
    for step in range(3):
        fabric.backward(sum(param.float().mean() for param in model))  # type: ignore[arg-type]
        if step < 2:
            optimizer.step()
    return allocated(optimizer.step, path)


MODES = [
    "bf16-master",
    "16-master",
    "bf16-stochastic",
    "params=bfloat16,master=float32,state=bfloat16",
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_takes_less_than_half_a_byte_a_parameter(mode: str, fused: bool, tmp_path: Path) -> None:
    most, left = peak(mode, lambda model: AdamW(model.parameters(), fused=fused), tmp_path / "trace.json")
    assert 0.1 < most < 0.5 and left < 0.01


def test_placeholders_of_all_parameters_would_be_seen(tmp_path: Path) -> None:
    """The negative control: an optimizer that is not torch's gets float32 copies of all, values and gradients."""
    most, _ = peak("bf16-master", lambda model: Unknown(model.parameters(), lr=0.1), tmp_path / "trace.json")
    assert most > 8
