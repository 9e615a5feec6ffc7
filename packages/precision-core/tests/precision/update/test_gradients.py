"""grads=float32: gradients of half parameters accumulate in float32, and any optimizer steps them."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

from precision_core import DDPStrategy, Fabric, HalfPrecision, Strategy
from precision_core.precision import runnable
from precision_core.precision.update.kinds import STEP
from precision_core.testing.stored import OPTIMIZERS, Model, equal, masters

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
def test_an_engine_that_narrows_them_is_refused_by_name() -> None:
    class Narrow(Strategy):
        multiprocess = True

    assert "its engine keeps no gradients wider than their parameters" in str(HalfPrecision(MASTER).refuses(Narrow()))
    assert HalfPrecision(MASTER).refuses(DDPStrategy()) is None
    assert HalfPrecision("bf16-master").refuses(Narrow()) is None


@needs_torch
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW fused", "Adafactor"])
def test_a_master_equals_float32_on_gradients_that_bfloat16_has_not(name: str) -> None:
    wide, half = Model(), Model()
    precision = HalfPrecision(MASTER)
    precision.convert_module(half)
    reference, optimizer = OPTIMIZERS[name](wide.values), OPTIMIZERS[name](half.values)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for mine, theirs in zip(half.values, wide.values, strict=True):
            theirs.grad = torch.empty_like(theirs).copy_(torch.randn(theirs.shape, generator=generator))
            mine.grad = theirs.grad.clone()
        reference.step()
        precision.optimizer_step(optimizer, half, None)
    assert equal(masters(precision, half.values), [param.detach() for param in wide.values])


def backward_twice(model: nn.Module) -> None:
    for value in (256.0, 1.0):
        model(torch.full((1, STEP), value)).sum().backward()


@needs_torch
def test_torchs_deepcopy_loses_them_which_a_step_tells() -> None:
    """torch's own behaviour, and that no step applies what was added up in bfloat16."""
    fabric, model, _ = accumulate(MASTER, optim.SGD, lr=1.0)
    assert model.weight.grad_dtype is torch.float32
    copied = nn.ModuleDict({"layer": copy.deepcopy(model)})
    assert copied["layer"].weight.grad_dtype is torch.bfloat16
    backward_twice(copied["layer"])
    assert copied["layer"].weight.grad.eq(256).all()  # 257 is lost
    optimizer = optim.SGD(copied.parameters(), lr=1.0)
    message = r"SGD\.step\(\) would apply gradients that were added up in bfloat16, and the policy says grads=float32: "
    with pytest.raises(RuntimeError, match=message + r"a parameter of shape \(2, 64\)"):
        fabric.precision_plugin.optimizer_step(optimizer, None, None)


@needs_torch
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "assign"])
def test_what_lost_them_and_is_set_up_has_them_again(how: str) -> None:
    fabric, model, _ = accumulate(MASTER, optim.SGD, lr=1.0)
    if how == "assign":
        copied = model
        model.load_state_dict({"weight": model.weight.detach().clone()}, assign=True)
    else:
        copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert copied.weight.grad_dtype is torch.bfloat16
    optimizer = optim.SGD(copied.parameters(), lr=1.0)
    if how == "pickle":  # what comes of it is a plain model
        fabric.setup(copied, optimizer)
    else:
        fabric.setup_optimizers(optimizer)
    backward_twice(copied)
    assert copied.weight.grad.dtype is torch.float32 and copied.weight.grad.eq(257).all()
    optimizer.step()


@needs_torch
def test_a_parameter_that_comes_later_has_to_say_so() -> None:
    _, _, optimizer = accumulate(MASTER, optim.SGD, lr=1.0)
    optimizer.step()
    later = nn.Linear(STEP, 2, bias=False, dtype=torch.bfloat16)
    optimizer.add_param_group({"params": later.parameters()})
    for grad_dtype in (None, torch.float32):
        if grad_dtype is not None:
            later.weight.grad, later.weight.grad_dtype = None, grad_dtype
        later(torch.ones(1, STEP, dtype=torch.bfloat16)).sum().backward()
        with (
            nullcontext() if grad_dtype else pytest.raises(RuntimeError, match=r"or set param\.grad_dtype = torch\.flo")
        ):
            optimizer.step()


@needs_torch
def test_gradients_that_there_are_at_setup_are_kept() -> None:
    model = nn.Linear(STEP, 2, bias=False).bfloat16()
    model(torch.ones(1, STEP, dtype=torch.bfloat16)).sum().backward()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    fabric = Fabric("cpu", precision=MASTER)
    fabric.setup(model, optimizer)
    assert model.weight.grad is not None and model.weight.grad.dtype is torch.float32
    assert model.weight.grad.eq(1).all()
    fabric.teardown()  # the step is torch's own again, which wants gradients of its parameters' dtype
    assert model.weight.grad.dtype is model.weight.grad_dtype is torch.bfloat16
    optimizer.step()


def test_an_older_torch_refuses_it_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        pass

    monkeypatch.setattr(runnable.torch, "Tensor", Older)
    with pytest.raises(ValueError, match=r"gradients wider than their parameters need Tensor\.grad_dtype"):
        HalfPrecision(MASTER)
