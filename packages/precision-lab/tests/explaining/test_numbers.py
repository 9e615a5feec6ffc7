"""What the values of a tensor are like."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precision_lab.explaining.numbers import end_of, is_finite, numbers_of, percent, tensors


def test_numbers_of_a_tensor() -> None:
    numbers = numbers_of(torch.tensor([[0.0, -3.0], [torch.inf, torch.nan]], dtype=torch.float16))
    assert (numbers.smallest, numbers.largest) == (3.0, 3.0)
    assert (numbers.zeros, numbers.infs, numbers.nans, numbers.finite) == (0.25, 0.25, 0.25, False)
    assert str(numbers) == "float16 2x2, |x| 3 to 3, 25 % zero, 25 % inf, 25 % NaN"
    assert numbers_of(torch.empty(0)).finite and str(numbers_of(torch.tensor(0.0))) == "float32 one value, 100 % zero"


def test_what_is_finite() -> None:
    assert is_finite(torch.tensor([1])) and is_finite(torch.tensor(2.0))
    assert not is_finite(torch.tensor([1.0, torch.nan]))
    assert not is_finite(torch.tensor([1.0, torch.nan]).to(torch.float8_e5m2))
    assert end_of("float16") == 65504 and end_of("int64") == float("inf")


def test_tensors_in_anything() -> None:
    @dataclass
    class Output:
        logits: torch.Tensor
        more: tuple[torch.Tensor, dict[str, torch.Tensor]]

    made = [torch.tensor(float(number)) for number in range(3)]
    assert [int(each) for each in tensors(Output(made[0], (made[1], {"a": made[2]})))] == [0, 1, 2]


def test_shares_are_not_rounded_to_none_or_all() -> None:
    assert [percent(each) for each in (0.0, 1e-6, 0.125, 0.9999, 1.0)] == [
        "0 %",
        "under 0.1 %",
        "12.5 %",
        "over 99.9 %",
        "100 %",
    ]
