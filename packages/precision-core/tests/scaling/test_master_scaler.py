"""MasterScaler: half gradients carry the scale until the step, whatever clips, accumulates or skips before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

from precision_core import Fabric, HalfPrecision
from precision_core.scaling.scaler import Scaler

SCALE = 2.0**10


def make(
    mode: str = "16-master", scale: float = SCALE, on_device: bool = False, **options: float
) -> tuple[Fabric, nn.Sequential, Optimizer]:
    """Returns a run of SGD with a learning rate of 1: the step is the gradient."""
    fabric = Fabric("cpu", precision=HalfPrecision(mode, scaler={"init_scale": scale, **options}))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    if on_device:  # as if the CPU were one on which reading a value waits
        scaler = fabric.precision_plugin.scaler
        scaler._scale._avoid_sync = scaler._records._avoid_sync = True  # type: ignore[attr-defined]
        scaler._scale._is_plain = False  # type: ignore[attr-defined]
    return fabric, model, optimizer


def backward(fabric: Fabric, model: nn.Module, factor: float = 1.0, seed: int = 0) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    fabric.backward(model(x).square().mean() * factor)


def unscaled(model: nn.Module, scale: float = SCALE) -> list[Tensor]:
    return [param.grad.float() / scale for param in model.parameters() if param.grad is not None]


def values(fabric: Fabric, model: nn.Module) -> list[Tensor]:
    masters = fabric.precision_plugin.masters
    return [masters.value(param).clone() for param in model.parameters()]


def moved(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    return [old - new for old, new in zip(before, after, strict=True)]


def close(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether differences of float32 values of about 1 are those gradients."""
    return all(torch.allclose(a, b, rtol=1e-5, atol=2e-7) for a, b in zip(mine, theirs, strict=True))


DEVICES = pytest.mark.parametrize("on_device", [False, True], ids=["read", "not read"])


@DEVICES
def test_a_step_moves_by_the_unscaled_gradients(on_device: bool) -> None:
    fabric, model, optimizer = make(on_device=on_device)
    before = values(fabric, model)
    backward(fabric, model)
    wanted = unscaled(model)
    optimizer.step()
    assert close(moved(before, values(fabric, model)), wanted)
    left = [param.grad for param in model.parameters()]
    assert all(torch.allclose(a.float(), b, rtol=2e-3, atol=1e-7) for a, b in zip(left, wanted, strict=True))  # type: ignore[union-attr]


@DEVICES
@pytest.mark.parametrize("mode", ["16-master", "16-master; 1: 32-true", "16-master; 0: bf16-true"])
def test_clipping_by_norm_is_torchs_on_unscaled_gradients(mode: str, on_device: bool) -> None:
    fabric, model, optimizer = make(mode, on_device=on_device)
    before = values(fabric, model)
    backward(fabric, model)
    reference = [nn.Parameter(torch.zeros_like(each)) for each in unscaled(model)]
    for param, gradient in zip(reference, unscaled(model), strict=True):
        param.grad = gradient
    norm = clip_grad_norm_(reference, 0.01)
    found = fabric.clip_gradients(model, optimizer, max_norm=0.01)
    assert found is not None and found.item() == pytest.approx(norm.item(), rel=1e-6) and norm > 0.1
    optimizer.step()
    now = moved(before, values(fabric, model))
    wanted = [param.grad for param in reference]
    for mine, theirs in zip(now, wanted, strict=True):
        spacing = 2e-3 if mine.dtype is torch.bfloat16 else 1e-7  # of weights up to 0.5
        assert theirs is not None and torch.allclose(mine.float(), theirs, rtol=1e-5, atol=spacing)


@DEVICES
def test_clipping_by_value_and_by_norm_add_up(on_device: bool) -> None:
    fabric, model, optimizer = make(on_device=on_device)
    before = values(fabric, model)
    backward(fabric, model)
    wanted = [each.clamp(-0.02, 0.02) for each in unscaled(model)]
    norm = math.sqrt(sum(each.square().sum().item() for each in wanted))
    assert fabric.clip_gradients(model, optimizer, clip_val=0.02) is None
    found = fabric.clip_gradients(model, optimizer, max_norm=norm / 2)
    assert found is not None and found.item() == pytest.approx(norm, rel=1e-6)
    assert fabric.clip_gradients(model, optimizer, clip_val=0.005) is None
    wanted = [(each / 2).clamp(-0.005, 0.005) for each in wanted]
    optimizer.step()
    assert close(moved(before, values(fabric, model)), wanted)


@DEVICES
def test_a_backward_after_clipping_adds_to_what_was_clipped(on_device: bool) -> None:
    fabric, model, optimizer = make(on_device=on_device)
    before = values(fabric, model)
    backward(fabric, model)
    first = unscaled(model)
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.01)
    assert norm is not None
    backward(fabric, model, seed=1)
    wanted = [each.clone() for each in unscaled(model)]
    optimizer.step()
    now = moved(before, values(fabric, model))
    assert close(now, wanted)
    assert not close(wanted, first)
    assert max(each.abs().max().item() for each in moved(wanted, first)) > 0.05  # the second was not clipped


def test_the_norm_of_large_scaled_gradients_is_right() -> None:
    """The sum of their squares is beyond float16, and each alone is near its end."""
    fabric, model, _ = make(scale=2.0**15)
    backward(fabric, model)
    assert max(param.grad.abs().max().item() for param in model.parameters()) > 2**12  # type: ignore[union-attr]
    wanted = math.sqrt(sum(each.square().sum().item() for each in unscaled(model, 2.0**15)))
    norm = fabric.clip_gradients(model, max_norm=1e9)
    assert norm is not None and norm.item() == pytest.approx(wanted, rel=1e-6)


@DEVICES
def test_an_overflow_skips_the_step_and_halves_the_scale(on_device: bool) -> None:
    fabric, model, optimizer = make(on_device=on_device)
    before, plugin = values(fabric, model), fabric.precision_plugin
    backward(fabric, model, factor=1e8)
    assert not all(bool(param.grad.isfinite().all()) for param in model.parameters())  # type: ignore[union-attr]
    optimizer.step()
    assert fabric.last_step_skipped and (plugin.steps, plugin.skipped_steps, plugin.scale) == (0, 1, SCALE / 2)
    assert all(map(torch.equal, before, values(fabric, model)))
    optimizer.zero_grad()
    backward(fabric, model)
    wanted = unscaled(model, SCALE / 2)
    optimizer.step()
    assert not fabric.last_step_skipped and close(moved(before, values(fabric, model)), wanted)


@pytest.mark.parametrize("clip", [{"max_norm": 1.0}, {"clip_val": 1.0}], ids=["by norm", "by value"])
def test_clipping_hides_no_overflow(clip: dict[str, float]) -> None:
    fabric, model, optimizer = make("16-master; 1: 32-true")
    backward(fabric, model, factor=1e8)
    fabric.clip_gradients(model, optimizer, **clip)
    backward(fabric, model)  # what was clipped is now in the gradients
    optimizer.step()
    assert fabric.last_step_skipped


def test_a_norm_that_is_to_be_finite_raises() -> None:
    fabric, model, optimizer = make()
    backward(fabric, model, factor=1e8)
    with pytest.raises(RuntimeError, match=r"the 2-norm of the gradients is non-finite.*\[nonfinite-norm\]"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)


def test_unscaling_in_place_is_refused_by_name() -> None:
    fabric, model, optimizer = make()
    backward(fabric, model)
    with pytest.raises(RuntimeError, match=r"16-master leaves float16 gradients scaled until the step.*clip_gradients"):
        fabric.unscale_gradients(optimizer)
    assert fabric.precision_plugin.scale == SCALE
    optimizer.step()
    assert not fabric.last_step_skipped


@pytest.mark.parametrize("is_clipped", [False, True])
def test_a_change_of_scaled_gradients_is_an_error_even_after_clipping(is_clipped: bool) -> None:
    fabric, model, optimizer = make()
    backward(fabric, model)
    if is_clipped:
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    model[0].weight.grad.add_(1.0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"0\.weight were changed after fabric\.backward.*16-master leaves them so"):
        optimizer.step()


@pytest.mark.parametrize("is_clipped", [False, True])
def test_another_optimizer_does_not_step_scaled_gradients(is_clipped: bool) -> None:
    fabric, model, optimizer = make()
    backward(fabric, model)
    if is_clipped:
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    with pytest.raises(RuntimeError, match=r"holds the same parameters: call its step \[scaled-gradients\]"):
        SGD(model.parameters(), lr=1.0).step()
    optimizer.step()


def test_two_optimizers_step_under_one_scale() -> None:
    fabric = Fabric("cpu", precision=HalfPrecision("16-master", scaler={"init_scale": SCALE, "growth_interval": 1}))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    first, second = SGD(model[0].parameters(), lr=1.0), SGD(model[1].parameters(), lr=1.0)
    fabric.setup(model, first, second)
    plugin = fabric.precision_plugin
    for step in range(3):
        scale = plugin.scale
        before = values(fabric, model)
        first.zero_grad(), second.zero_grad()
        backward(fabric, model, seed=step)
        wanted = unscaled(model, scale)
        first.step()
        assert plugin.scaler.torch_scaler.get_scale() == scale  # type: ignore[attr-defined]  # until both have stepped
        second.step()
        assert close(moved(before, values(fabric, model)), wanted)
        assert plugin.scale == 2 * scale


def test_gradients_that_were_not_stepped_follow_the_scale() -> None:
    """One of two optimizers steps; the other's gradients are added to under the new scale."""
    fabric = Fabric("cpu", precision=HalfPrecision("16-master", scaler={"init_scale": SCALE, "growth_interval": 1}))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    first, second = SGD(model[0].parameters(), lr=0.0), SGD(model[1].parameters(), lr=1.0)
    fabric.setup(model, first, second)
    before = values(fabric, model)[2:]
    backward(fabric, model)
    once = unscaled(model[1])
    first.step()
    first.zero_grad()
    backward(fabric, model)
    assert fabric.precision_plugin.scale == 2 * SCALE
    second.step()
    assert close(moved(before, values(fabric, model)[2:]), [2 * each for each in once])


@DEVICES
def test_gradients_left_after_a_step_are_added_to(on_device: bool) -> None:
    """Scaled again, by a number that is beyond float16."""
    fabric, model, optimizer = make(scale=2.0**16, on_device=on_device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(fabric, model, factor=1e-3)
    once = unscaled(model, 2.0**16)
    optimizer.step()
    assert not fabric.last_step_skipped
    before = values(fabric, model)
    backward(fabric, model, factor=1e-3)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    assert not fabric.last_step_skipped
    for mine, first in zip(moved(before, values(fabric, model)), once, strict=True):
        assert torch.allclose(mine, 2 * first, rtol=2e-3, atol=2e-7)  # those left were rounded to float16 unscaled


def test_a_closure_that_leaves_no_gradients_moves_nothing() -> None:
    class Foreign(Optimizer):
        """Calls its closure itself, as optimizers do that are not torch's."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            assert closure is not None
            with torch.enable_grad():
                return closure()

    precision = HalfPrecision("16-master", scaler={"init_scale": SCALE})
    model = precision.convert_module(nn.Linear(4, 2))
    optimizer = Foreign(model.parameters(), {})
    precision.register_optimizers(optimizer)
    before = [precision.masters.value(param) for param in model.parameters()]

    def closure() -> str:
        precision.pre_backward(torch.zeros((), requires_grad=True) * 1.0, model).backward()
        return "loss"

    assert precision.optimizer_step(optimizer, model, closure) == "loss"
    assert all(map(torch.equal, before, [precision.masters.value(param) for param in model.parameters()]))


def test_teardown_unscales() -> None:
    fabric, model, _ = make()
    backward(fabric, model)
    wanted = [each.half() for each in unscaled(model)]
    fabric.teardown()
    left = [param.grad for param in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(left, wanted, strict=True) if a is not None)


def test_gradients_in_float32_are_unscaled_where_they_are() -> None:
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch 2.10 brought grad_dtype")
    fabric, model, optimizer = make("params=float16,master=float32,grads=float32")
    before = values(fabric, model)
    backward(fabric, model)
    wanted = unscaled(model)
    optimizer.step()
    assert {param.grad.dtype for param in model.parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert close(moved(before, values(fabric, model)), wanted)


def test_without_scaling_nothing_is_scaled() -> None:
    fabric = Fabric("cpu", precision="params=float16,master=float32,scale=false")
    model = nn.Linear(6, 2)
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    assert type(fabric.precision_plugin.scaler) is Scaler
    before = values(fabric, model)
    fabric.backward(model(torch.ones(1, 6)).sum())
    optimizer.step()
    ones = [torch.ones_like(each) for each in before]
    assert close(moved(before, values(fabric, model)), ones)


def test_a_scaler_of_the_users_own() -> None:
    own = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = HalfPrecision("16-master", scaler=own)
    assert precision.setup_scaler() is own and precision.scale == 8.0
    with pytest.raises(ValueError, match=r"HalfPrecision\('bf16-master', scaler=...\): this policy does not scale"):
        HalfPrecision("bf16-master", scaler=own)
    with pytest.raises(ValueError, match=r"HalfPrecision\(scaler=.*unknown \['initial'\]"):
        HalfPrecision("16-master", scaler={"initial": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(ValueError, match=r'HalfPrecision\("16-master", scaler=torch\.amp\.GradScaler\("cpu", \.\.\.\)'):
        HalfPrecision("16-master", scaler=disabled)
