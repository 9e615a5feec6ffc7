"""What a sample of a tensor's values says: zeros, subnormals, values that are not finite, and what formats would do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from precision_lab.auditing.ledger import short

Sizes = npt.NDArray[np.float32] | npt.NDArray[np.float64]
"""Absolute values."""


@dataclass(frozen=True)
class Format:
    """A dtype as its finite numbers lie."""

    dtype: torch.dtype

    @cached_property
    def largest(self) -> float:
        """Of its numbers."""
        return torch.finfo(self.dtype).max

    @cached_property
    def normal(self) -> float:
        """The smallest number of full precision."""
        return torch.finfo(self.dtype).tiny

    @cached_property
    def to_zero(self) -> float:
        """The largest value that is rounded to zero: half of the smallest number, for a tie goes to the even one."""
        return torch.finfo(self.dtype).tiny * torch.finfo(self.dtype).eps / 2

    @cached_property
    def fits(self) -> float:
        """The largest value that is not rounded beyond the largest number."""
        spacing = 2.0 ** math.floor(math.log2(self.largest)) * torch.finfo(self.dtype).eps
        tie = self.largest + spacing / 2
        odd = (self.largest / spacing) % 2 == 1  # a tie goes to the even one: up, unless the largest is even
        return math.nextafter(tie, 0) if odd else tie

    @cached_property
    def below_normal(self) -> float:
        """The largest value that is rounded to a subnormal number: those closest to `normal` are rounded up to it."""
        return math.nextafter(self.normal - self.to_zero, 0)


FORMATS = tuple(
    Format(getattr(torch, name))
    for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
)
"""That of every value it is said what they would do to it."""


def shares(values: Sizes, dtype: torch.dtype, amax: float) -> dict[str, Any]:
    """Returns shares of a sample of absolute values, of a tensor of `dtype` whose largest absolute value is `amax`.

    zero, subnormal (of its own dtype), saturated (at its largest number), not_finite: shares of all values, left out
    where they are 0. `as`: for each other format that is not wider the shares of values that it would make zero or
    subnormal, or that are beyond it; `scaled`: the same after a scale that brings the largest value to its largest
    number. A format that changes nothing is left out.
    """
    own = Format(dtype)
    others = [each for each in FORMATS if each.dtype is not dtype and each.dtype.itemsize <= dtype.itemsize]
    scales = [each.largest / amax if 0 < amax < math.inf else 0.0 for each in others]
    limits = [0.0, math.nextafter(own.normal, 0), math.inf, math.nextafter(own.largest, 0)]
    for each, scale in zip(others, scales, strict=True):
        limits += [each.to_zero, each.below_normal, each.fits]
        limits += [each.to_zero / scale, each.below_normal / scale] if scale else [0.0, 0.0]
    up_to = _counts(values, limits) / len(values)
    zero, below, finite, saturated = up_to[0], up_to[1], up_to[2], up_to[3]
    found: dict[str, Any] = _without_zeros(
        zero=zero, subnormal=below - zero, saturated=finite - saturated, not_finite=1 - finite
    )
    what_if = {}
    for number, each in enumerate(others):
        to_zero, small, fits, to_zero_scaled, small_scaled = up_to[4 + 5 * number : 9 + 5 * number]
        would = _without_zeros(zero=to_zero - zero, subnormal=small - to_zero, overflow=finite - fits)
        scaled = _without_zeros(zero=to_zero_scaled - zero, subnormal=small_scaled - to_zero_scaled)
        if scales[number] and scaled:
            would["scaled"] = scaled
        if would:
            what_if[short(each.dtype)] = would
    if what_if:
        found["as"] = what_if
    return found


def _without_zeros(**shares: float) -> dict[str, Any]:
    return {key: round(float(share), 6) for key, share in shares.items() if share > 0}


def _counts(values: Sizes, limits: list[float]) -> npt.NDArray[np.float64]:
    """Returns how many values are not above each limit, below infinity for that one; NaN is above all."""
    exact = np.array(limits, np.float64)
    kept: npt.NDArray[Any] = exact.astype(values.dtype)
    down = (kept.astype(np.float64) > exact) | np.isinf(exact)
    kept = np.where(down, np.nextafter(kept, values.dtype.type(0)), kept)
    return np.array([np.count_nonzero(values <= limit) for limit in kept], np.float64)
