"""What is asked of DeepSpeed itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy


def modes_after_each_other() -> list[tuple[bool, float]]:
    """Returns of one engine a mode whether DeepSpeed's mark of autocast is set, and how far a step goes."""
    from deepspeed.runtime import torch_autocast

    found = []
    for mode in ("16-mixed", "32-true"):
        fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(2), precision=mode)
        model = nn.Linear(4, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        fabric.setup(model, optimizer)
        before = model.weight.detach().clone()
        fabric.backward(model(torch.full((1, 4), 0.25)).sum())
        optimizer.step()
        found.append((torch_autocast.TORCH_AUTOCAST_INITIALIZED, (before - model.weight).sum().item()))
        fabric.teardown()
    return found


def test_an_engine_takes_no_mode_from_the_one_before_it() -> None:
    ((first, second),) = run_in_ranks(1, modes_after_each_other)
    assert first[0] is True and second == (False, pytest.approx(1.0, rel=1e-6))
