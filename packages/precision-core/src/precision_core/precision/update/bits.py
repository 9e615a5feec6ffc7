"""Bits: a float32 value as the nearest bfloat16 and the 16 bits that say the rest, exactly.

    value (32 bits, as an integer) = (weight << 16) + rest,   rest: int16, -32768 to 32767

So `weight` is `value + 0x8000` without its low half: the nearest bfloat16, and of two that are equally near the one
farther from zero. A tie to even would need a seventeenth bit, to say whether it was rounded up. Beyond the largest
bfloat16 the weight is inf, as in torch's cast, and the value is kept. NaN stays NaN; of its payload 16 bits are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def combine(weight: Tensor, rest: Tensor | None, out: Tensor) -> Tensor:
    """Writes the float32 values that `weight` (bfloat16) and `rest` (int16; None: zeros) say into `out`; returns it."""
    out.copy_(weight)  # a bfloat16 is the high half of its float32
    if rest is not None:
        out.view(torch.int32).add_(rest)
    return out


def split(value: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Writes `value` (float32, dense) into `weight` (bfloat16) and `rest` (int16), in place; `value` is used up."""
    bits = value.view(torch.int32)
    if may_hold_nan(value):
        # One whose payload is in the low half alone would be rounded to inf, and another to -0.
        bits.copy_(torch.where(value.isnan(), (bits & -0x10000) | 0x400000, bits))
    rest.copy_(bits)  # the low half
    bits.add_(0x8000).bitwise_right_shift_(16)
    weight.view(torch.int16).copy_(bits)


def may_hold_nan(value: Tensor) -> bool:
    """Whether to look at each element: on a CPU the sum tells, much faster; elsewhere reading it would be a sync."""
    return not value.is_cpu or not math.isfinite(value.sum().item())
