"""Which steps wait for the GPU, as torch itself sees it: only those of 16-mixed whose optimizer cannot skip there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from precision_core import DDPStrategy, Fabric, Strategy
from precision_core.testing import Net, loss_of, make_batch, needs

pytestmark = needs("cuda")

STEPS = 10
MODES = ("32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed")
Make = Callable[[nn.Module], Optimizer]


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def fused(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-3, fused=True)


def foreach(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-3, eps=1e-4, foreach=True)  # the default is 0 in float16


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9)


def run(mode: str, make: Make, debug: str, clip: dict[str, float], strategy: str | Strategy = "auto") -> Fabric:
    """Trains ten steps under torch's watch, after three that make buffers and find the scale."""
    fabric = Fabric("gpu", strategy, devices=1, precision=mode)
    model = Net()
    optimizer = make(model)
    fabric.setup(model, optimizer)
    batches = [make_batch(step, device=fabric.device) for step in range(3 + STEPS)]  # copying them from the host waits

    def step(batch: dict[str, Tensor], target: Tensor) -> None:
        optimizer.zero_grad()
        fabric.backward(loss_of(model(batch), target))
        if clip:
            fabric.clip_gradients(model, optimizer, **clip)  # type: ignore[arg-type]
        optimizer.step()

    for batch in batches[:3]:
        step(*batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(debug)
    for batch in batches[3:]:
        step(*batch)
    torch.cuda.set_sync_debug_mode("default")
    return fabric


@pytest.mark.parametrize("clip", [{}, {"max_norm": 1.0}, {"clip_val": 0.1}], ids=["", "norm", "value"])
@pytest.mark.parametrize("mode", MODES)
def test_ten_steps_of_a_fused_optimizer_wait_for_nothing(mode: str, clip: dict[str, float]) -> None:
    fabric = run(mode, fused, "error", clip)
    plugin = fabric.precision_plugin
    assert plugin.steps + plugin.skipped_steps == 3 + STEPS  # this reads the flags


@pytest.mark.parametrize("make", [foreach, momentum])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "16-mixed"])
def test_ten_steps_of_others_wait_for_nothing_where_nothing_is_scaled(mode: str, make: Make) -> None:
    run(mode, make, "error", {"max_norm": 1.0})


@pytest.mark.parametrize("clip", [{}, {"max_norm": 1.0}], ids=["", "norm"])
@pytest.mark.parametrize("make", [foreach, momentum])
def test_under_16_mixed_the_others_wait_once_a_step(make: Make, clip: dict[str, float]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("16-mixed", make, "warn", clip)
    waits = [str(each.message) for each in caught if "synchronizing CUDA operation" in str(each.message)]
    assert len(waits) == STEPS


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("mode", MODES)
def test_ten_steps_under_ddp_wait_for_nothing(mode: str) -> None:
    run(mode, fused, "error", {"max_norm": 1.0}, DDPStrategy()).teardown()


def test_flags_are_read_at_last_and_skipped_steps_counted() -> None:
    """Steps that overflow are skipped on the device; the host learns of it when it asks."""
    fabric = Fabric("gpu", devices=1, precision="16-mixed")
    model = Net()
    optimizer = fused(model)
    fabric.setup(model, optimizer)
    before: dict[str, Any] = {}
    for step in range(6):
        batch, target = make_batch(step, device=fabric.device)
        optimizer.zero_grad()
        factor = float("inf") if step in (2, 4) else 2.0**-4  # small enough for the scale that it begins with
        if step == 4:
            before = {name: param.detach().clone() for name, param in model.named_parameters()}
        fabric.backward(loss_of(model(batch), target) * factor)
        optimizer.step()
        if step == 4:
            assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    plugin = fabric.precision_plugin
    assert (plugin.steps, plugin.skipped_steps, plugin.scale) == (4, 2, 2.0**14)
