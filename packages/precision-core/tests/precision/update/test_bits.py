"""Bits: every float32 comes back, and the weight is the nearest bfloat16, ties away from zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from precision_core.precision.update.bits import combine, split


def as_float(bits: Tensor) -> Tensor:
    """Returns the float32 values of bit patterns (int64, 0 to 2**32 - 1)."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def round_trip(value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weight, and the value that comes back."""
    weight, rest = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    split(value.clone(), weight, rest)
    return weight, combine(weight, rest, torch.empty_like(value))


def bits(value: Tensor) -> list[int]:
    return [each & 0xFFFFFFFF for each in value.contiguous().view(torch.int32).flatten().tolist()]


def every_high_half(low: list[int]) -> Tensor:
    """Returns values with each of the 65,536 high halves and these low halves, NaNs left out."""
    patterns = (torch.arange(2**16)[:, None] * 2**16 + torch.tensor(low)).flatten()
    values = as_float(patterns)
    return values[~values.isnan()]


EDGES = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]


def test_every_value_comes_back_bit_for_bit() -> None:
    values = every_high_half([*EDGES, *range(0x1234, 0xFFFF, 0x1111)])
    assert len(values) > 10**6
    assert torch.equal(round_trip(values)[1].view(torch.int32), values.view(torch.int32))


def test_the_weight_is_the_nearest_bfloat16_and_ties_go_away_from_zero() -> None:
    values = every_high_half(EDGES)
    values = values[values.abs() <= torch.finfo(torch.bfloat16).max].double()
    weight = round_trip(values.float())[0].double()
    spacing = torch.where(values.abs() < 2.0**-126, 2.0**-133, torch.exp2(values.abs().log2().floor() - 7))
    near, distance = weight.abs() - values.abs(), (weight - values).abs()
    assert (distance <= spacing / 2).all()
    is_tie = distance == spacing / 2
    assert is_tie.sum() > 60_000 and (near[is_tie] > 0).all()
    assert (torch.signbit(weight) == torch.signbit(values)).all()


@pytest.mark.parametrize(
    ("value", "weight"),
    [
        (0x00000000, 0x0000),  # zero
        (0x80000000, 0x8000),  # minus zero
        (0x00000001, 0x0000),  # the smallest subnormal
        (0x80007FFF, 0x8000),  # a subnormal below half a spacing
        (0x00008000, 0x0001),  # a tie among subnormals
        (0x3F808000, 0x3F81),  # a tie, which rounding to even would take down
        (0xBF808000, 0xBF81),
        (0x3F807FFF, 0x3F80),
        (0x7F7F7FFF, 0x7F7F),
        (0x7F7FFFFF, 0x7F80),  # the largest float32: its nearest bfloat16 is inf, as torch's cast has it
        (0xFF7FFFFF, 0xFF80),
        (0x7F800000, 0x7F80),  # inf
        (0xFF800000, 0xFF80),
        (0x7FC00000, 0x7FC0),  # the NaNs that arithmetic makes
        (0xFFC00000, 0xFFC0),
        (0xFFFF0000, 0xFFFF),  # torch's bfloat16 NaN
    ],
)
def test_at_the_edges(value: int, weight: int) -> None:
    given = as_float(torch.tensor([value]))
    got, back = round_trip(given)
    assert bits(got.float())[0] >> 16 == weight and bits(back) == [value]


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC08000])
def test_a_nan_stays_one_whatever_its_payload(pattern: int) -> None:
    weight, back = round_trip(torch.cat([as_float(torch.tensor([pattern])), torch.ones(3)]))
    assert math.isnan(weight[0]) and math.isnan(back[0]) and back[1:].tolist() == [1, 1, 1]
    assert bits(back)[0] >> 31 == pattern >> 31


def test_without_rest_the_value_is_the_weight() -> None:
    weight = torch.tensor([1.5, -0.0, math.inf]).bfloat16()
    assert bits(combine(weight, None, torch.empty(3))) == bits(weight.float())


def test_a_truncated_weight_would_be_seen() -> None:
    """The negative control: without rounding, half of the weights are a spacing off, and ties go to zero."""
    values = every_high_half([0x8000])
    values = values[values.abs() <= torch.finfo(torch.bfloat16).max]
    truncated = (values.view(torch.int32) & -0x10000).view(torch.float32)
    assert not torch.equal(truncated.bfloat16().view(torch.int16), round_trip(values)[0].view(torch.int16))


def test_values_without_inf_and_nan_are_rounded_alike_the_other_way() -> None:
    """Where all are finite, and so is their sum, the weight is torch's own cast, of a value that is no tie."""
    values = every_high_half([*EDGES, 0x1234, 0x8765])
    values = values[values.abs() < 1e30]
    small, special = round_trip(values), round_trip(torch.cat([values, torch.tensor([math.inf])]))
    assert torch.isfinite(values.sum()) and len(values) > 500_000
    for one, other in zip(small, special, strict=True):
        assert torch.equal(one.view(torch.int16), other[:-1].view(torch.int16))
    is_subnormal = (small[0] != 0) & (small[0].abs() < 2.0**-126)
    assert is_subnormal.any()
    ties = values[(values.view(torch.int32) & 0xFFFF) == 0x8000]
    assert (ties.bfloat16().view(torch.int16) != round_trip(ties)[0].view(torch.int16)).any()  # torch's, to even
