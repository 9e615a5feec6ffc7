"""The number formats: rounding float32 values to the grid of an 8- or 4-bit float.

E4M3 and E5M2: Micikevicius et al. 2022, arXiv:2209.05433, table 1. E2M1, and the E8M0 of scales: OCP Microscaling
Formats v1.0 (Rouhani et al. 2023, arXiv:2310.10537).

Finite values beyond the largest one saturate, as in the vendor's kernels. Infinities and NaN stay what they are, though
E4M3 and E2M1 have no infinity and E2M1 no NaN: the vendor saturates an infinity, and the overflow is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A float with a sign; `dtype` is torch's, where torch casts to it."""

    name: str
    max: float
    """The largest value."""
    dtype: torch.dtype | None = None

    def round(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        """Returns float32 `x` rounded to the grid, as float32: to nearest, ties to even, or stochastically."""
        clipped = x.clamp(-self.max, self.max)
        if stochastic:
            rounded = _stochastic_e2m1(clipped)
        elif self.dtype is not None:
            rounded = clipped.to(self.dtype).float()
        else:
            step = _step_e2m1(clipped)
            rounded = torch.round(clipped / step) * step  # torch.round: ties to even
        return torch.where(x.isfinite(), rounded, x)


def _step_e2m1(x: Tensor) -> Tensor:
    """The distance of neighbours on E2M1's grid, 0 0.5 1 1.5 2 3 4 6, above |x|."""
    size = x.abs()
    return torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)


def _stochastic_e2m1(x: Tensor) -> Tensor:
    """Up or down with the probabilities that make x the mean; draws from torch's generator of the device."""
    step = _step_e2m1(x)
    steps = x.abs() / step
    low = steps.floor()
    up = torch.rand_like(x, dtype=x.dtype) < steps - low  # a sum of both could be rounded to the next step
    return (low + up) * step * x.sign()


FORMATS = {
    "e4m3": Format("e4m3", 448.0, torch.float8_e4m3fn),
    "e5m2": Format("e5m2", 57344.0, torch.float8_e5m2),
    "e2m1": Format("e2m1", 6.0),
}


def power_of_2_above(x: Tensor) -> Tensor:
    """Returns the least power of 2 that is not below `x` > 0, in E8M0's range of 2**-127 to 2**127.

    That rounding up is the vendor's; OCP's own rule rounds the exponent of the largest value down, and saturates.
    Infinities give 2**127, 0 gives 2**-127.
    """
    mantissa, exponent = torch.frexp(x)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(x == 0, -127, torch.where(x.isinf(), 127, exponent))
    return torch.ldexp(torch.ones_like(x, dtype=x.dtype), exponent.clamp(-127, 127))


def power_of_2_below(x: Tensor) -> Tensor:
    """Returns the greatest power of 2 that is not above `x` > 0."""
    _, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x, dtype=x.dtype), exponent - 1)
