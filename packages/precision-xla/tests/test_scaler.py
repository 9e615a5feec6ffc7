"""16-mixed: overflows are found, skipped and counted on the device, by the vendor's sync-free optimizers too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_xla.amp.syncfree as syncfree
from torch import nn

from precision_core import Fabric
from precision_xla import XLAPrecision

OPTIMIZERS: dict[str, tuple[Any, Any]] = {  # the vendor's, and torch's own
    "SGD": (syncfree.SGD, torch.optim.SGD),
    "Adam": (syncfree.Adam, torch.optim.Adam),
    "AdamW": (syncfree.AdamW, torch.optim.AdamW),
}
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.1}, "AdamW": {"lr": 0.1}}


def fabric_of(**scaler: float) -> Fabric:
    return Fabric(accelerator="cpu", strategy="xla", precision=XLAPrecision("16-mixed", scaler=scaler or None))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sync_free_optimizer_steps_and_skips_as_torchs_own(name: str) -> None:
    """The first step overflows, then one in the middle: moments must be as if these had never been."""
    found = []
    for kind in OPTIMIZERS[name]:
        torch.manual_seed(0)
        fabric, model = fabric_of(init_scale=2.0**10, growth_interval=3), nn.Linear(4, 4)
        optimizer = kind(model.parameters(), **OPTIONS[name])
        fabric.setup(model, optimizer)
        x = torch.linspace(-1, 1, 8).view(2, 4).to(fabric.device)
        for step in range(7):
            optimizer.zero_grad()
            bad = step in (0, 4)
            fabric.backward(model(x).pow(2).sum() * (float("inf") if bad else 1.0))
            optimizer.step()
        plugin = fabric.precision_plugin
        assert (plugin.steps, plugin.skipped_steps, fabric.last_step_skipped) == (5, 2, False)
        found.append((plugin.scale, model.weight.detach().cpu()))
    assert found[0][0] == found[1][0] == 2.0**9  # halved, doubled after three, halved
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5), (found[0][1] - found[1][1]).abs().max()


def test_many_overflows_in_a_row_raise_with_the_parameters_name() -> None:
    fabric, model = fabric_of(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    x = torch.ones(2, 4, device=fabric.device)
    with pytest.raises(FloatingPointError, match=r"50 optimizer steps in a row were skipped.*weight"):
        for _ in range(60):
            optimizer.zero_grad()
            fabric.backward(model(x).sum() * float("inf"))
            optimizer.step()


def test_the_scaler_may_be_given() -> None:
    given = torch.amp.GradScaler("xla", init_scale=4.0)
    plugin = XLAPrecision("16-mixed", scaler=given)
    assert plugin.setup_scaler() is given and plugin.scale == 4.0
    assert not XLAPrecision("bf16-mixed").setup_scaler().is_enabled()
    with pytest.raises(ValueError, match=r"XLAPrecision\('bf16-mixed', scaler=...\): this policy does not scale"):
        XLAPrecision("bf16-mixed", scaler=given)
    with pytest.raises(ValueError, match="scaler for 'cpu'"):
        XLAPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu"))
