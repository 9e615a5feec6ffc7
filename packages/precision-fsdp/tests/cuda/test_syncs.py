"""Which steps wait for the GPU, as torch itself sees it. Nobody has run these tests yet."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from precision_core import MODES, Fabric
from precision_core.testing import Problem, needs, sgd
from precision_fsdp import FSDPStrategy

pytestmark = needs("cuda")

FIRST, STEPS = 4, 10
"""Steps that make buffers, and in which 16-mixed looks at shards that somebody may have changed; and those watched."""


def fused(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=True)


def momentum(model: nn.Module) -> Optimizer:
    return sgd(model.parameters())


def waits(mode: str, make: Any, accumulate: int = 1, **clip: Any) -> list[str]:
    """Returns where ten steps wait for the device."""
    fabric = Fabric("gpu", FSDPStrategy(), devices=1, precision=mode)
    problem = Problem()
    model = problem.model()
    optimizer = make(model)
    fabric.setup(model, optimizer)
    rows = problem.batch(0).to(fabric.device).chunk(accumulate)

    def step() -> None:
        optimizer.zero_grad()
        for number, part in enumerate(rows, start=1):
            with fabric.no_backward_sync(model, enabled=number < accumulate):
                fabric.backward(problem.loss(model, part))
        if clip:
            fabric.clip_gradients(model, optimizer, **clip)
        optimizer.step()

    for _ in range(FIRST):
        step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(STEPS):
            step()
        torch.cuda.set_sync_debug_mode("default")
    fabric.teardown()
    found = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    return [f"{each.filename}:{each.lineno}" for each in found]


@pytest.mark.parametrize(("accumulate", "clip"), [(1, {}), (2, {"max_norm": 1.0}), (1, {"clip_val": 0.1})])
@pytest.mark.parametrize("mode", MODES)
def test_ten_steps_of_a_fused_optimizer_wait_for_nothing(mode: str, accumulate: int, clip: dict[str, float]) -> None:
    assert waits(mode, fused, accumulate, **clip) == []


@pytest.mark.parametrize("mode", MODES)
def test_others_wait_once_a_step_under_16_mixed_and_else_never(mode: str) -> None:
    assert len(waits(mode, momentum, max_norm=1.0)) == (STEPS if mode == "16-mixed" else 0)
