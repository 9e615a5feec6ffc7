"""Products: against float64, against the products of the very operands, and what autograd is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from precision_te.recipes import MXFP8, NVFP4, RECIPES, Block, Current, Delayed, recipe_from
from precision_te.reference.amax import AmaxState
from precision_te.reference.operands import quantize
from precision_te.reference.products import Scales, linear
from precision_te.reference.region import Region

NEAREST_1D = NVFP4(disable_2d_quantization=True, disable_stochastic_rounding=True)


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def scales_for(recipe: Any, x: Tensor, weight: Tensor, grad: Tensor) -> Scales | None:
    """Delayed scaling's, as if the last step had seen the same values."""
    if not isinstance(recipe, Delayed):
        return None
    state = AmaxState(recipe.amax_history_len, torch.device("cpu"))
    for role, tensor in (("input", x), ("weight", weight), ("grad", grad)):
        state.record(role, tensor)  # type: ignore[arg-type]
    state.update(recipe, ("input", "weight", "grad"))
    return Scales(Region(recipe, None, False), state, state.scale.clone())


def three_products(recipe: Any, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight, None, recipe, scales_for(recipe, x, weight, grad))
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def decibels(result: Tensor, exact: Tensor) -> float:
    return 10 * torch.log10(exact.square().sum() / (result.double() - exact).square().sum()).item()


E4M3, E5M2, MX, FP4 = 28.5, 24.6, 27.6, 17.5
"""Known signal-to-noise of products at K = 1024: e4m3 x e4m3, e5m2 x e4m3, MXFP8 by OCP's rule, NVFP4 to nearest."""


@pytest.mark.parametrize(
    ("recipe", "known", "measured"),  # y, then dx and dw
    [
        (Delayed(), (E4M3, E5M2), (28.52, 24.61)),
        (Current(), (E4M3, E5M2), (28.52, 24.61)),
        (Delayed(fp8_format="e4m3"), (E4M3, E4M3), (28.52, 28.53)),
        (Block(), (E4M3, E4M3), (28.51, 28.52)),
        (MXFP8(), (MX, MX), (28.51, 28.52)),
        (MXFP8(enable_2d_quantization=True), (MX, MX), (28.51, 28.52)),
        (NEAREST_1D, (FP4, FP4), (17.43, 17.43)),
    ],
    ids=str,
)
def test_products_have_the_formats_signal_to_noise(
    recipe: Any, known: tuple[float, float], measured: tuple[float, float]
) -> None:
    """`measured` is what the same rules in float64, with numpy and ml_dtypes alone, gave for other normal data."""
    x, weight, grad = normal(1024, 1024, 0), normal(1024, 1024, 1), normal(1024, 1024, 2)
    results = three_products(recipe, x, weight, grad)
    x, weight, grad = x.double(), weight.double(), grad.double()
    exact = (x @ weight.T, grad @ weight, grad.T @ x)
    for result, wanted, side in zip(results, exact, (0, 1, 1), strict=True):
        assert decibels(result, wanted) == pytest.approx(known[side], abs=1)
        assert decibels(result, wanted) == pytest.approx(measured[side], abs=0.1)


def test_nvfp4s_square_blocks_and_stochastic_rounding_have_their_price() -> None:
    x, weight, grad = normal(1024, 1024, 0), normal(1024, 1024, 1), normal(1024, 1024, 2)
    torch.manual_seed(0)
    y, of_x, of_weight = three_products(NVFP4(), x, weight, grad)
    x, weight, grad = x.double(), weight.double(), grad.double()
    assert decibels(y, x @ weight.T) == pytest.approx(16.7, abs=0.1)
    assert decibels(of_x, grad @ weight) == pytest.approx(15.1, abs=0.1)
    assert decibels(of_weight, grad.T @ x) == pytest.approx(15.55, abs=0.1)


@pytest.mark.parametrize("recipe", [*map(recipe_from, RECIPES), NEAREST_1D], ids=str)
def test_products_are_those_of_the_operands(recipe: Any) -> None:
    x, weight, grad = normal(48, 80, 0), normal(64, 80, 1), normal(48, 64, 2)
    scales = scales_for(recipe, x, weight, grad)

    def operand(tensor: Tensor, role: Any, transposed: bool = False) -> Tensor:
        scale = None if scales is None else scales.of(role)
        return quantize(tensor, recipe, role, transposed=transposed, scale=scale).dequantize().double()

    torch.manual_seed(0)
    results = three_products(recipe, x, weight, grad)
    torch.manual_seed(0)  # for stochastic rounding, in the same order
    exact = (
        operand(x, "input") @ operand(weight, "weight").T,
        operand(grad, "grad") @ operand(weight, "weight", True).T,
        operand(grad, "grad", True) @ operand(x, "input", True).T,
    )
    for result, wanted in zip(results, exact, strict=True):
        assert (result - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_have_the_inputs_dtype_and_gradients_their_own(name: str, dtype: torch.dtype) -> None:
    recipe = recipe_from(name)
    x = normal(32, 32, 0).to(dtype).requires_grad_()
    weight = normal(32, 32, 1).requires_grad_()
    bias = torch.arange(32.0).requires_grad_()
    scales = scales_for(recipe, x, weight, torch.ones(1))
    y = linear(x, weight, bias, recipe, scales)
    assert y.dtype is dtype
    assert torch.allclose((y - linear(x, weight, None, recipe, scales)).float().mean(0), bias, rtol=0.02, atol=0.1)
    y.backward(torch.ones_like(y))
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype, torch.float32, torch.float32)
    assert torch.equal(bias.grad, torch.full((32,), 32.0))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_only_the_gradients_that_are_needed_are_made(name: str, needed: tuple[bool, bool, bool]) -> None:
    recipe = recipe_from(name)
    tensors = (normal(16, 32, 0), normal(48, 32, 1), normal(1, 48, 2).squeeze(0))
    grad = normal(16, 48, 3)
    torch.manual_seed(0)
    whole = [tensor.clone().requires_grad_() for tensor in tensors]
    linear(*whole, recipe, scales_for(recipe, *tensors[:2], grad)).backward(grad)
    torch.manual_seed(0)
    some = [tensor.clone().requires_grad_(each) for tensor, each in zip(tensors, needed, strict=True)]
    y = linear(*some, recipe, scales_for(recipe, *tensors[:2], grad))
    y.backward(grad)
    for tensor, each, full in zip(some, needed, whole, strict=True):
        assert (tensor.grad is not None) is each
        if each and name != "nvfp4":  # which draws random numbers for each product
            assert torch.equal(tensor.grad, full.grad)


def test_a_second_derivative_is_refused() -> None:
    x = normal(16, 16, 0).requires_grad_()
    y = linear(x, normal(16, 16, 1), None, Current(), None)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_weights_changed_before_backward_are_noticed() -> None:
    x, weight = normal(16, 16, 0).requires_grad_(), normal(16, 16, 1).requires_grad_()
    y = linear(x, weight, None, Current(), None)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", [Current, Block, MXFP8, NVFP4])
@pytest.mark.parametrize("override", ["high_precision", "dequantized"])
def test_backward_override_leaves_gradients_unquantised(kind: Any, override: str) -> None:
    recipe = kind(backward_override=override)
    x, weight, grad = normal(32, 64, 0), normal(48, 64, 1), normal(32, 48, 2)
    y, of_x, of_weight = three_products(recipe, x, weight, grad)
    assert torch.equal(y, three_products(kind(), x, weight, grad)[0])
    if override == "dequantized":
        x, weight = quantize(x, recipe, "input").dequantize(), quantize(weight, recipe, "weight").dequantize()
    assert torch.allclose(of_x, grad @ weight, rtol=1e-5, atol=1e-4)
    assert torch.allclose(of_weight, grad.T @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_an_overflow_reaches_every_gradient(name: str) -> None:
    recipe = recipe_from(name)
    x, weight = normal(16, 32, 0).requires_grad_(), normal(32, 32, 1).requires_grad_()
    grad = normal(16, 32, 2)
    y = linear(x, weight, None, recipe, scales_for(recipe, x, weight, grad))
    y.backward(grad * float("inf"))
    assert not x.grad.isfinite().any() and not weight.grad.isfinite().any()
