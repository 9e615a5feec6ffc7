"""What formats would do to values, against real casts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from precision_lab.watching.shares import FORMATS, Format, shares

WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sample(dtype: torch.dtype, scale: float) -> Tensor:
    """Values over several powers of two, with zeros, and ties at each power."""
    torch.manual_seed(0)
    drawn = torch.randn(3000, dtype=torch.float64).mul(2).exp() * scale
    ties = 2.0 ** torch.arange(-30, 20, dtype=torch.float64) * scale
    return torch.cat([drawn, ties, 1.875 * ties, 0.75 * ties, torch.zeros(50, dtype=torch.float64)]).to(dtype)


def share(mask: Tensor) -> float:
    return round(mask.double().mean().item(), 6)


@pytest.mark.parametrize("scale", [1e-39, 2.0**-22, 2.0**-9, 1.0, 2.0**14, 1e38])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_what_if_is_what_a_cast_does(dtype: torch.dtype, scale: float) -> None:
    values = sample(dtype, scale)
    values = values[values.isfinite()]
    amax = values.max().item()
    found = shares((values if dtype is torch.float64 else values.float()).numpy(), dtype, amax)
    compared = 0
    for form in FORMATS:
        if form.dtype is dtype or form.dtype.itemsize > dtype.itemsize:
            continue
        would = found.get("as", {}).get(str(form.dtype).removeprefix("torch."), {})
        cast, wide = values.to(form.dtype).double(), values.double()
        assert would.get("zero", 0) == pytest.approx(share((cast == 0) & (wide != 0)), abs=2e-6)
        assert would.get("subnormal", 0) == pytest.approx(share((cast != 0) & (cast < form.normal)), abs=2e-6)
        beyond = ~cast.isfinite() if form.dtype is not torch.float8_e4m3fn else wide > 464  # which torch saturates
        assert would.get("overflow", 0) == pytest.approx(share(beyond), abs=2e-6)
        compared += 1
        if amax > 0 and math.isfinite(form.largest / amax):
            scaled = (wide * (form.largest / amax)).to(form.dtype).double()
            zero = share((scaled == 0) & (wide != 0))
            assert would.get("scaled", {}).get("zero", 0) == pytest.approx(zero, abs=1e-3)  # ties, by a rounded scale
    assert compared == (4 if dtype.itemsize > 2 else 3)


def test_shares_of_its_own_dtype() -> None:
    values = torch.tensor([0, 0, 2.0**-24, 1, 65504, math.inf, math.nan, 2.0**-14], dtype=torch.float16)
    found = shares(values.float().numpy(), torch.float16, math.nan)
    assert {key: found[key] for key in ("zero", "subnormal", "saturated", "not_finite")} == {
        "zero": 0.25,
        "subnormal": 0.125,
        "saturated": 0.125,
        "not_finite": 0.25,
    }
    assert found["as"]["float8_e5m2"] == {"zero": 0.125, "overflow": 0.125} and "scaled" not in found["as"]


def test_a_format_that_changes_nothing_is_left_out() -> None:
    assert shares(torch.ones(8).numpy(), torch.float32, 1.0) == {}
    assert shares(torch.zeros(8).numpy(), torch.float32, 0.0) == {"zero": 1.0}


@pytest.mark.parametrize(("name", "largest", "fits"), [("float8_e4m3fn", 448, 464), ("float8_e5m2", 57344, 61440)])
def test_where_formats_end(name: str, largest: float, fits: float) -> None:
    form = Format(getattr(torch, name))
    assert (form.largest, round(form.fits)) == (largest, fits)
