"""Bits: a float32 value as the nearest bfloat16 and the 16 bits that say the rest, exactly.

    value (32 bits, as an integer) = (weight << 16) + rest,   rest: int16, -32768 to 32767

So `weight` is `value + 0x8000` without its low half: the nearest bfloat16, and of two that are equally near the one
farther from zero. A tie to even would need a seventeenth bit, to say whether it was rounded up. Beyond the largest
bfloat16 the weight is inf, as in torch's cast, and the value is kept. NaN stays NaN; of its payload 16 bits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from precision_core.precision.update.rows import Row, copy_all, row_of


def combine(weight: Tensor, rest: Tensor | None, out: Tensor) -> Tensor:
    """Writes the float32 values that `weight` (bfloat16) and `rest` (int16; None: zeros) say into `out`; returns it."""
    out.copy_(weight)  # a bfloat16 is the high half of its float32
    if rest is not None:
        out.view(torch.int32).add_(rest)
    return out


def combine_all(weights: Sequence[Tensor], rests: Sequence[Tensor], values: Row, scratch: Row) -> None:
    """Writes into the parts of `values` what `combine` writes of each weight and its rest."""
    copy_all(values.words, rests)
    copy_all(scratch.parts, weights)
    values.flat.view(torch.int32).add_(scratch.flat.view(torch.int32))


def split(value: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Writes `value` (float32, dense) into `weight` (bfloat16) and `rest` (int16), in place; `value` is used up."""
    split_all(row_of(value), [weight], [rest])


def split_all(values: Row, weights: Sequence[Tensor], rests: Sequence[Tensor]) -> None:
    """Writes each part of `values` into its weight and its rest; `values` are used up."""
    bits = values.flat.view(torch.int32)
    may_be_special = may_hold_nan(values.flat)
    if may_be_special:
        # A NaN whose payload is in the low half alone would be rounded to inf, and another to -0.
        bits.copy_(torch.where(values.flat.isnan(), (bits & -0x10000) | 0x400000, bits))
    copy_all(rests, values.words)  # the low half
    if may_be_special:
        bits.add_(0x8000).bitwise_right_shift_(16)
        copy_all([weight.view(torch.int16) for weight in weights], values.words)
    else:
        bits.bitwise_or_(
            1
        )  # just above a tie: torch's cast, which rounds ties to even, finds none, and is one pass less
        copy_all(weights, values.parts)


def may_hold_nan(value: Tensor) -> bool:
    """Whether to look at each element: on a CPU the sum tells, much faster; elsewhere reading it would be a sync."""
    return not value.is_cpu or not math.isfinite(value.sum().item())
