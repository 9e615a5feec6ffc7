"""Fused optimizers: those that step the dtype run, those that do not are refused at setup."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from precision_core import Fabric
from precision_core.scaling.fused import _steps_right, check_fused


def moves(kind: type[Optimizer], dtype: torch.dtype) -> bool:
    """Whether a fused step of 256 elements moves all of them."""
    param = torch.ones(256, dtype=dtype, requires_grad=True)
    param.grad = torch.ones_like(param)
    kind([param], lr=0.5, fused=True).step()  # type: ignore[call-arg]
    return bool((param < 0.9).all())


@pytest.mark.parametrize("mode", ["bf16-true", "16-true"])
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_fused_optimizer_trains_or_is_refused(kind: type[Optimizer], mode: str) -> None:
    model = nn.Linear(16, 16)
    optimizer = kind(model.parameters(), lr=0.5, fused=True)  # type: ignore[call-arg]
    fabric = Fabric(accelerator="cpu", precision=mode)
    if not moves(kind, fabric.precision_plugin.policy.params):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(fused=True\).*pass fused=False, or foreach=True"):
            fabric.setup(model, optimizer)
        assert model.weight.dtype is torch.float32  # nothing was set up
        return
    fabric.setup(model, optimizer)
    before = model.weight.detach().clone()
    fabric.backward(model(torch.ones(4, 16)).pow(2).mean())
    optimizer.step()
    assert (model.weight != before).float().mean() > 0.9


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_what_is_found_by_trying_is_what_happens(kind: type[Optimizer]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert _steps_right(kind, dtype, "cpu") is moves(kind, dtype)


def test_others_are_not_tried() -> None:
    param = nn.Parameter(torch.ones(3))
    check_fused([SGD([param], foreach=True), SGD([param]), torch.optim.Adagrad([param], fused=True)], torch.half, "cpu")
