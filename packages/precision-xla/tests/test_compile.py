"""torch.compile(backend="openxla"), before and after setup."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_core import Fabric


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("first", ["compile", "setup"])
def test_a_compiled_model_trains_as_it_does_uncompiled(mode: str, first: str) -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", strategy="xla", precision=mode)
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if compiled and first == "compile":
            model = torch.compile(model, backend="openxla")  # type: ignore[assignment]
        fabric.setup(model, optimizer)
        if compiled and first == "setup":
            model = torch.compile(model, backend="openxla")  # type: ignore[assignment]
        x, curve = torch.linspace(-1, 1, 12).view(3, 4).to(fabric.device), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (model(x) - 1).pow(2).mean()
            fabric.backward(loss)
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if mode == "32-true" else 0.02)
    assert losses[1][-1] < losses[1][0]
