"""grads=float32: gradients of half parameters accumulate in float32, and any optimizer steps them."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

from precision_core import DDPStrategy, Fabric, HalfPrecision
from precision_core.precision import runnable
from precision_core.precision.update.kinds import STEP

MASTER = "params=bfloat16,master=float32,grads=float32"

needs_torch = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")


def accumulate(precision: str, make: type[Optimizer], **options: object) -> tuple[Fabric, nn.Linear, Optimizer]:
    """Returns a model whose gradients are 256 + 1, of two backwards."""
    fabric = Fabric("cpu", precision=precision)
    model = nn.Linear(STEP, 2, bias=False)
    optimizer = make(model.parameters(), **options)
    fabric.setup(model, optimizer)
    for value in (256.0, 1.0):
        fabric.backward(model(torch.full((1, STEP), value)).sum())
    return fabric, model, optimizer


@needs_torch
@pytest.mark.parametrize("precision", ["params=bfloat16,grads=float32", MASTER])
def test_256_and_1_are_257(precision: str) -> None:
    _, model, optimizer = accumulate(precision, optim.SGD, lr=1.0)
    assert model.weight.grad is not None and model.weight.grad.dtype is torch.float32
    assert model.weight.grad.eq(257).all()
    model.load_state_dict(model.state_dict())
    model.requires_grad_(False).requires_grad_(True)
    optimizer.zero_grad()
    model(torch.ones(1, STEP)).sum().backward()
    assert model.weight.grad.dtype is torch.float32  # it survives a load and freezing


def test_without_it_they_are_256() -> None:
    """The negative control."""
    _, model, _ = accumulate("bf16-master", optim.SGD, lr=1.0)
    assert model.weight.grad is not None and model.weight.grad.eq(256).all()


@needs_torch
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_every_form_of_adamw_steps_them(options: dict[str, bool]) -> None:
    fabric, model, optimizer = accumulate(MASTER, optim.AdamW, lr=0.1, **options)
    start = fabric.precision_plugin.masters.value(model.weight)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1e9)
    assert norm is not None and norm.item() == pytest.approx(257 * (2 * STEP) ** 0.5)
    reference = nn.Parameter(start.clone())
    reference.grad = torch.full_like(start, 257.0)
    optimizer.step()
    optim.AdamW([reference], lr=0.1, **options).step()  # type: ignore[arg-type]
    assert torch.equal(fabric.precision_plugin.masters.value(model.weight), reference)


@needs_torch
def test_several_processes_refuse_it_by_name() -> None:
    assert "grads=float32 is for one device" in str(HalfPrecision(MASTER).refuses(DDPStrategy()))
    assert HalfPrecision("bf16-master").refuses(DDPStrategy()) is None


def test_an_older_torch_refuses_it_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        pass

    monkeypatch.setattr(runnable.torch, "Tensor", Older)
    with pytest.raises(ValueError, match=r"gradients wider than their parameters need Tensor\.grad_dtype"):
        HalfPrecision(MASTER)
