"""Sharded gradients: norms beyond the dtype's range, steps and changes that do not know that they carry a scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy


def make(mode: str, size: int) -> tuple[Fabric, nn.Sequential]:
    scaler = {"init_scale": 256.0} if mode == "16-mixed" else None
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision=FSDPPrecision(mode, scaler))
    model = nn.Sequential(nn.Linear(size, 2, bias=False), nn.Linear(2, 1, bias=False))
    for param in model.parameters():
        nn.init.ones_(param)
    return fabric, model


def norm_of_large_gradients(mode: str, value: float) -> tuple[float, float]:
    fabric, model = make(mode, 2000)
    fabric.setup(model, SGD(model.parameters(), lr=1.0))
    for param in model.parameters():
        param.grad = torch.full_like(param, value)
    norm = fabric.clip_gradients(model, max_norm=1.0)
    assert norm is not None
    return norm.item(), model[0].weight.grad.full_tensor()[0, 0].item()  # type: ignore[union-attr]


@pytest.mark.parametrize(("mode", "value"), [("16-true", 6e4), ("bf16-true", 1e30), ("32-true", 1e36)])
def test_a_norm_beyond_the_range_clips_and_does_not_zero(mode: str, value: float) -> None:
    for norm, clipped in run_in_ranks(2, norm_of_large_gradients, mode, value):
        assert norm == pytest.approx(value * 4002**0.5, rel=1e-2)
        assert clipped == pytest.approx(4002**-0.5, rel=2e-2)


def guarded() -> list[float]:
    fabric, model = make("16-mixed", 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    x = torch.ones(1, 2)
    fabric.backward(model(x).sum() / 4)
    with pytest.raises(RuntimeError, match=r"SGD, which fabric\.setup was given, holds the same"):
        SGD(model.parameters(), lr=0.1).step()
    nn.utils.clip_grad_norm_(model.parameters(), 0.125)
    with pytest.raises(RuntimeError, match=r"0\.weight.*were changed.*fabric\.unscale_gradients"):
        optimizer.step()
    optimizer.zero_grad()
    for synced in (False, True):
        with fabric.no_backward_sync(model, enabled=not synced):
            fabric.backward(model(x).sum() / 4)
    fabric.unscale_gradients(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.125)
    optimizer.step()
    moved = [1 - param.full_tensor() for param in model.parameters()]  # type: ignore[attr-defined]
    return [torch.cat([each.flatten() for each in moved]).norm().item()]


def test_changes_of_scaled_shards_raise() -> None:
    assert run_in_ranks(2, guarded) == [[pytest.approx(0.0125, rel=1e-2)]] * 2


def forgotten() -> float:
    fabric, model = make("16-mixed", 2)
    fabric.setup(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.backward(model(torch.ones(1, 2)).sum() / 4)
    with pytest.raises(RuntimeError, match="SGD was not set up"):
        optimizer.step()
    return model[0].weight.full_tensor()[0, 0].item()  # type: ignore[operator,no-any-return]


def test_an_optimizer_that_was_not_set_up_raises() -> None:
    assert run_in_ranks(2, forgotten) == [1.0, 1.0]
