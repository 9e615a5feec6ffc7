"""Formats: against torch's own casts, `ml_dtypes`, and arithmetic that anybody can check."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_te.reference.formats import FORMATS, power_of_2_above, power_of_2_below

WITNESSES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
EVERY_BFLOAT16 = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_ml_dtypes_for_every_bfloat16(name: str) -> None:
    format = FORMATS[name]
    finite = EVERY_BFLOAT16[EVERY_BFLOAT16.isfinite()]
    clipped = finite.clamp(-format.max, format.max)
    witness = torch.from_numpy(clipped.numpy().astype(WITNESSES[name]).astype(np.float32))
    assert torch.equal(format.round(finite), witness)


@pytest.mark.parametrize("name", FORMATS)
def test_the_grid_is_the_formats(name: str) -> None:
    format = FORMATS[name]
    bits = 4 if name == "e2m1" else 8
    grid = np.arange(2**bits, dtype=np.uint8).view(WITNESSES[name]).astype(np.float32)
    grid = torch.from_numpy(grid[np.isfinite(grid)])
    assert grid.max() == format.max
    assert torch.equal(format.round(grid), grid)
    assert set(format.round(EVERY_BFLOAT16[EVERY_BFLOAT16.isfinite()]).tolist()) == set(grid.tolist())


@pytest.mark.parametrize("name", FORMATS)
def test_values_beyond_the_range_saturate_and_what_is_no_number_stays(name: str) -> None:
    format = FORMATS[name]
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan])
    rounded = format.round(x)
    assert rounded[:4].tolist() == [format.max, -format.max, math.inf, -math.inf] and rounded[4].isnan()


def test_ties_go_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert FORMATS["e2m1"].round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert FORMATS["e2m1"].round(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_stochastic_rounding_hits_neighbours_with_the_right_mean() -> None:
    torch.manual_seed(0)
    for value, below, above in (
        (0.1, 0, 0.5),
        (-0.7, -1, -0.5),
        (1.9, 1.5, 2),
        (2.25, 2, 3),
        (-5.5, -6, -4),
        (7, 6, 6),
    ):
        rounded = FORMATS["e2m1"].round(torch.full((40_000,), float(value)), stochastic=True)
        assert set(rounded.tolist()) == {below, above}
        share = (min(max(value, -6), 6) - below) / (above - below) if above > below else 0
        error = 5 * math.sqrt(share * (1 - share) / 40_000) * (above - below)
        assert rounded.mean().item() == pytest.approx(min(max(value, -6), 6), abs=error + 1e-4)


@pytest.mark.parametrize("drawn", [0.0, 0.5, 1 - 2.0**-24])
def test_stochastic_rounding_leaves_the_grid_as_it_is(drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda x, **_: torch.full_like(x, drawn))
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for x in (grid, -grid):
        assert torch.equal(FORMATS["e2m1"].round(x, stochastic=True), x)
    assert FORMATS["e2m1"].round(torch.tensor([9.0, -1e30]), stochastic=True).tolist() == [6, -6]


@given(st.floats(2.0**-120, 2.0**120, width=32))
@settings(deadline=None)
def test_powers_of_2_enclose(x: float) -> None:
    above, below = (f(torch.tensor(x)).item() for f in (power_of_2_above, power_of_2_below))
    assert above / 2 < x <= above and below <= x < 2 * below
    assert math.frexp(above)[0] == math.frexp(below)[0] == 0.5


def test_powers_of_2_at_the_ends() -> None:
    x = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**127, 3e38, math.inf])
    assert power_of_2_above(x).tolist() == [2.0**-127, 2.0**-127, 2.0**-127, 2.0**127, 2.0**127, 2.0**127]
