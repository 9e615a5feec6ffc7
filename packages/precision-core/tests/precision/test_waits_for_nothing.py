"""Steps that a GPU would not wait in: no mode of core reads a value of the device, but where the user asks for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from precision_core import Fabric, HalfPrecision, MixedPrecision
from precision_core.policy import MODES
from precision_core.scaling.loss_scaler import LossScaler
from precision_core.scaling.master_scaler import MasterScaler
from precision_core.testing import HostReads, run_in_ranks

STEPS = 10
Ask = Callable[[Fabric, nn.Module, Any], object]


def nothing(fabric: Fabric, model: nn.Module, optimizer: Any) -> None:
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    fabric.clip_gradients(model, optimizer, clip_val=0.5)


ASKS: dict[str, Ask] = {
    "error_if_nonfinite": lambda fabric, model, optimizer: fabric.clip_gradients(
        model, optimizer, max_norm=1.0, error_if_nonfinite=True
    ),
    "last_step_skipped": lambda fabric, model, optimizer: fabric.last_step_skipped,
}


def reads(mode: str, strategy: str = "auto", ask: Ask = nothing, fused: bool = True) -> Counter[str]:
    """Returns how often ten steps asked for a value, by file, while the CPU plays a device that is slow to tell."""
    plugin: Any = mode
    if MODES[mode].scale:  # on such a device it leaves the flag where it is; no step overflows
        options: Any = {"min_scale": 2.0**-14, "max_skips": 50, "avoid_sync": True}
        if MODES[mode].mixed:
            plugin = MixedPrecision(mode, device="cpu", scaler={"init_scale": 128.0})
            plugin.scaler = LossScaler(plugin.setup_scaler(), **options)
        else:
            plugin = HalfPrecision(mode, scaler={"init_scale": 128.0})
            plugin.scaler = MasterScaler(plugin.setup_scaler(), dtype=torch.float16, mode=mode, **options)
    fabric = Fabric("cpu", strategy, devices=1, precision=plugin)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), eps=1e-4, fused=fused)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.randn(4 * (STEPS + 2), 8)), batch_size=4))
    counted, lines = HostReads(optimizer), list[str]()
    for number, (x,) in enumerate(loader):
        with counted:
            optimizer.zero_grad()
            fabric.backward(model(x).pow(2).mean())
            ask(fabric, model, optimizer)
            optimizer.step()
        lines = counted.lines if number >= 2 else counted.lines.clear() or []  # in the first ones state is made
    fabric.teardown()
    return Counter(line.partition(":")[0] for line in lines)


def in_ddp() -> dict[str, Counter[str]]:
    return {mode: reads(mode, "ddp") for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_reads_nothing(mode: str) -> None:
    assert reads(mode) == {}


def test_a_step_under_ddp_reads_nothing() -> None:
    assert run_in_ranks(1, in_ddp) == [{mode: {} for mode in MODES}]


@pytest.mark.parametrize(
    ("mode", "ask", "files"),
    [
        ("bf16-mixed", "error_if_nonfinite", {"scaling/clipping.py": STEPS}),
        ("16-mixed", "error_if_nonfinite", {"scaling/loss_scaler.py": STEPS, "scaling/gradients.py": STEPS}),
        ("bf16-mixed", "last_step_skipped", {}),
        ("16-mixed", "last_step_skipped", {"scaling/counters.py": STEPS}),
    ],
)
def test_who_asks_waits(mode: str, ask: str, files: dict[str, int]) -> None:
    assert reads(mode, ask=ASKS[ask]) == files


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_that_cannot_skip_by_itself_waits_once_a_step_where_steps_are_skipped(mode: str) -> None:
    assert reads(mode, fused=False) == ({"scaling/loss_scaler.py": STEPS} if MODES[mode].scale else {})
