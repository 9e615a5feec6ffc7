"""Operands: every one of the three products multiplies values of the right format, with scales along the right axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_te.recipes import MXFP8, NVFP4, Block, Current, Delayed, recipe_from
from precision_te.reference import ReferenceLinear, products, scaling
from precision_te.reference.formats import FORMATS
from precision_te.reference.operands import quantize
from precision_te.reference.region import region
from precision_te.reference.scaling import Quantized

# the recipe, and the formats of what the forward quantises and of gradients
TRIED: list[tuple[Any, str, str]] = [
    ("delayed", "e4m3", "e5m2"),
    ("current", "e4m3", "e5m2"),
    ("block", "e4m3", "e4m3"),
    ("mxfp8", "e4m3", "e4m3"),
    ("nvfp4", "e2m1", "e2m1"),
    ({"recipe": "mxfp8", "fp8_format": "hybrid"}, "e4m3", "e5m2"),
    ({"recipe": "delayed", "fp8_format": "e5m2"}, "e5m2", "e5m2"),
]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, Quantized]]:
    """The operands that products are made of: (role, transposed, quantised)."""
    operands: list[tuple[str, bool, Quantized]] = []

    def spy(x: Tensor, recipe: Any, role: Any, *, transposed: bool = False, scale: Tensor | None = None) -> Quantized:
        quantized = quantize(x, recipe, role, transposed=transposed, scale=scale)
        operands.append((role, transposed, quantized))
        return quantized

    monkeypatch.setattr(products.operands, "quantize", spy)
    return operands


@pytest.mark.parametrize(("given", "forward", "grad"), TRIED, ids=str)
def test_all_six_operands_lie_on_the_formats_grid(
    given: Any, forward: str, grad: str, seen: list[tuple[str, bool, Quantized]]
) -> None:
    recipe = recipe_from(given)
    layer = ReferenceLinear(nn.Parameter(normal(64, 96)), None)
    x = normal(32, 96, 1).requires_grad_()
    for _ in range(2):  # delayed scaling has its scales in the second
        seen.clear()
        with region(recipe):
            y = layer(x)
        y.backward(normal(32, 64, 2))
    assert [(role, transposed) for role, transposed, _ in seen] == [
        ("input", False),
        ("weight", False),
        ("grad", False),
        ("weight", True),
        ("grad", True),
        ("input", True),
    ]
    shapes = [(32, 96), (64, 96), (32, 64), (96, 64), (64, 32), (96, 32)]
    for (role, _, quantized), shape in zip(seen, shapes, strict=True):
        format = FORMATS[grad if role == "grad" else forward]
        values = quantized.values
        assert values.shape == shape and torch.equal(format.round(values), values)
        assert 0.4 * format.max < values.abs().max() <= format.max or isinstance(recipe, Delayed)
        assert len(values.unique()) > (10 if format.name == "e2m1" else 60)
        scales = quantized.scales.unique()
        if isinstance(recipe, (MXFP8, Block)):
            assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
        if isinstance(recipe, NVFP4):
            assert torch.equal(FORMATS["e4m3"].round(scales), scales)
        if isinstance(recipe, (Delayed, Current)):
            assert scales.tolist() == [1]
            largest = {"input": x, "weight": layer.weight, "grad": normal(32, 64, 2)}[role].abs().max()
            assert torch.allclose(quantized.outer, largest / format.max)


@pytest.mark.parametrize(("recipe", "size"), [(MXFP8(), 32), (Block(), 128), (NVFP4(disable_rht=True), 16)])
@pytest.mark.parametrize("role", ["input", "grad"])
def test_scales_lie_along_the_axis_that_is_summed_over(recipe: Any, size: int, role: Any) -> None:
    """Rows of very different size: quantised by row nothing is lost, quantised by column small rows are."""
    x = normal(256, 256) * torch.logspace(-12, 0, 256).unsqueeze(1)
    by_row, by_column = quantize(x, recipe, role), quantize(x, recipe, role, transposed=True)
    assert torch.equal(by_row.scales[:, 0], by_row.scales[:, size - 1])
    assert (by_row.scales[5] != by_row.scales[250]).any()
    if not isinstance(recipe, NVFP4):  # whose range over all blocks is E4M3's
        error = (by_row.dequantize() - x).norm(dim=1) / x.norm(dim=1)
        assert error.max() < 0.04
    first = by_column.scales.T[:size]
    assert torch.equal(first, first[:1].expand_as(first))


@pytest.mark.parametrize("recipe", [Block(), MXFP8(enable_2d_quantization=True), NVFP4()])
def test_square_blocks_of_weights_are_the_same_both_ways(recipe: Any) -> None:
    weight = normal(256, 128) * torch.logspace(-2, 0, 128)
    assert torch.equal(
        quantize(weight, recipe, "weight").dequantize(),
        quantize(weight, recipe, "weight", transposed=True).dequantize().T,
    )
    inputs = [quantize(weight, recipe, "input", transposed=way).dequantize() for way in (False, True)]
    assert not torch.equal(inputs[0], inputs[1].T)


def test_nvfp4_turns_and_rounds_what_its_recipe_says() -> None:
    x = normal(64, 64)
    plain = NVFP4(disable_rht=True, disable_stochastic_rounding=True)
    nearest = NVFP4(disable_stochastic_rounding=True)

    def equal(a: Quantized, b: Quantized) -> bool:
        return torch.equal(a.dequantize(), b.dequantize())

    for role in ("input", "grad"):  # turned for the weight gradient only
        assert equal(quantize(x, nearest, role), quantize(x, plain, role))
        turned = quantize(x, nearest, role, transposed=True)
        assert equal(turned, scaling.nvfp4(scaling.hadamard(x.T), (1, 16)))
        assert not equal(turned, quantize(x, plain, role, transposed=True))
    assert equal(quantize(x, nearest, "weight", transposed=True), quantize(x, plain, "weight", transposed=True))
    for role in ("input", "weight"):
        assert equal(quantize(x, NVFP4(), role), quantize(x, NVFP4(), role))
    draws = torch.stack([quantize(x, NVFP4(), "grad").dequantize() for _ in range(400)])
    moves = draws.std(0) > 1e-3
    assert moves.float().mean() > 0.9
    error = (draws.mean(0) - x).abs() / (draws.std(0) / 20)
    assert error[moves].quantile(0.99) < 4  # unbiased
    assert (quantize(x, plain, "grad").dequantize() - x).abs().mean() > 2 * (draws.mean(0) - x).abs().mean()


def test_current_scaling_by_powers_of_2() -> None:
    x = normal(16, 32)
    quantized = quantize(x, Current(use_power_2_scales=True), "input")
    assert torch.frexp(quantized.outer).mantissa == 0.5
    assert 224 <= quantized.values.abs().max() <= 448
