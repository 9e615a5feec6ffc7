"""Scaling: block by block against loops, the ends of the range, and what must not change a scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from precision_te.reference import scaling
from precision_te.reference.formats import FORMATS
from precision_te.reference.scaling import Quantized

E4M3 = FORMATS["e4m3"]
KINDS: dict[str, Callable[[Tensor], Quantized]] = {
    "per tensor": lambda x: scaling.per_tensor(x, E4M3, scaling.scale_of(scaling.amax(x), E4M3)),
    "1x128": lambda x: scaling.blocks(x, E4M3, (1, 128), power_of_2=True),
    "128x128": lambda x: scaling.blocks(x, E4M3, (128, 128), power_of_2=False),
    "1x32": lambda x: scaling.mxfp8(x, E4M3, (1, 32)),
    "32x32": lambda x: scaling.mxfp8(x, E4M3, (32, 32)),
    "1x16": lambda x: scaling.nvfp4(x, (1, 16)),
    "16x16": lambda x: scaling.nvfp4(x, (16, 16)),
}
BLOCKS = {
    "1x128": (1, 128),
    "128x128": (128, 128),
    "1x32": (1, 32),
    "32x32": (32, 32),
    "1x16": (1, 16),
    "16x16": (16, 16),
}


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_block_has_the_scale_of_its_largest_value(kind: str) -> None:
    rows, columns = BLOCKS[kind]
    x = normal(256, 256) * torch.logspace(-3, 3, 256)
    quantized = KINDS[kind](x)
    largest = scaling.amax(x).item()
    for top in range(0, 256, rows):
        for left in range(0, 256, columns):
            part = (slice(top, top + rows), slice(left, left + columns))
            amax = x[part].abs().max().item()
            (scale,) = set(quantized.scales[part].flatten().tolist())
            if kind.endswith("16"):
                wanted = E4M3.round(torch.tensor(amax / 6 * (448 * 6 / largest))).item()
                assert scale == pytest.approx(wanted, rel=0.07)  # a neighbour, where it is a tie but for float32
            elif kind == "128x128":
                assert scale == pytest.approx(amax / 448, rel=1e-6)
            else:
                assert scale == 2.0 ** math.ceil(math.log2(amax / 448))
        if rows == 1 and top > 8:
            break


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_the_grid(kind: str) -> None:
    x = normal(128, 256)
    error = (KINDS[kind](x).dequantize() - x).abs()
    step = 2.0**-4 if kind not in ("1x16", "16x16") else 0.25  # half a step at a mantissa of 1, relative
    assert (error <= step * x.abs() * 1.0001 + x.abs().max() * (2e-6 if step < 0.1 else 0.05)).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_do_no_harm(kind: str) -> None:
    quantized = KINDS[kind](torch.zeros(32, 256))
    assert torch.equal(quantized.dequantize(), torch.zeros(32, 256))
    x = normal(32, 256)
    x[:, :128] = 0
    assert torch.equal(KINDS[kind](x).dequantize()[:, :128], torch.zeros(32, 128))
    assert KINDS[kind](x).dequantize().isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (17, 130), (0, 16), (3, 0)])
def test_blocks_that_are_not_full_are_those_with_zeros_in_them(kind: str, shape: tuple[int, int]) -> None:
    x = normal(*shape)
    filled = torch.zeros(256, 256)
    filled[: shape[0], : shape[1]] = x
    quantized = KINDS[kind](x)
    assert quantized.values.shape == shape
    assert torch.equal(quantized.dequantize(), KINDS[kind](filled).dequantize()[: shape[0], : shape[1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_does_not_become_a_number(kind: str, bad: float) -> None:
    x = normal(32, 256)
    x[3, 5] = bad
    quantized = KINDS[kind](x)
    assert not quantized.dequantize()[3, 5].isfinite()
    assert not quantized.product(KINDS[kind](normal(8, 256, 1)))[3].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e30])
def test_scales_follow_the_magnitude(kind: str, magnitude: float) -> None:
    x = normal(32, 256)
    error = KINDS[kind](x * magnitude).dequantize() / magnitude - KINDS[kind](x).dequantize()
    original = KINDS[kind](x).dequantize() - x
    assert error.norm() <= 1.5 * original.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantised_by_value(dtype: torch.dtype) -> None:
    x = normal(32, 256).to(torch.bfloat16).clamp(-8, 8)
    for kind in KINDS:
        assert torch.equal(KINDS[kind](x.to(dtype)).dequantize(), KINDS[kind](x.float()).dequantize())


def test_a_scale_that_would_overflow_is_the_largest_of_the_dtype() -> None:
    tiny = torch.tensor(1e-40)
    assert scaling.scale_of(tiny, E4M3) == torch.finfo(torch.float32).max
    assert scaling.scale_of(tiny, E4M3, power_of_2=True) == 2.0**127
    assert scaling.scale_of(torch.tensor([0.0, math.inf]), E4M3).tolist() == [1, 1]


def test_quotients_are_rounded_once() -> None:
    x = normal(1, 10_000).abs().squeeze()
    exact = (448.0 / x.double()).float()
    assert torch.equal(scaling.quotient(448.0, x), exact)
    assert not torch.equal(448.0 / x, exact)  # torch's own


def test_hadamard_keeps_products_and_spreads_outliers() -> None:
    a, b = normal(8, 64).double(), normal(8, 64, 1).double()
    turned = scaling.hadamard(a)
    assert torch.allclose(turned @ scaling.hadamard(b).T, a @ b.T, atol=1e-6)
    assert torch.allclose(turned.norm(dim=1), a.norm(dim=1))
    assert not torch.allclose(turned, a)
    outlier = torch.zeros(1, 16)
    outlier[0, 3] = 4.0
    assert torch.equal(scaling.hadamard(outlier).abs(), torch.ones(1, 16))
    assert scaling.hadamard(normal(3, 20)).shape == (3, 32)
    assert scaling.hadamard(a.bfloat16()).dtype is torch.bfloat16


def test_a_product_within_float32s_range_is_finite_whatever_the_scales() -> None:
    x, weight = torch.full((2, 16), 3e38), torch.full((16, 16), 2.0**-10)
    for one, other in ((x, weight), (weight, x)):
        scaled = [KINDS["per tensor"](each) for each in (one, other)]
        y = scaled[0].product(scaled[1])
        assert torch.allclose(y, torch.full_like(y, 16 * 3e38 * 2.0**-10), rtol=1e-5)
    large = KINDS["per tensor"](x)
    assert large.product(large).isinf().all()  # what is beyond it is not
