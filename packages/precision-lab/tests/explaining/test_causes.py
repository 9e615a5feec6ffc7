"""The class of each cause, by the operation and its operands in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import precision_lab
from precision_lab.explaining.explanation import Explanation


def explained(of: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Explanation:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return of(x)

    x = torch.linspace(-2, 2, 16, dtype=dtype).view(4, 4).requires_grad_()
    return precision_lab.explain(Model(), x, remedies=False)


@pytest.mark.parametrize(
    "of, dtype, kind, operation",
    [
        (lambda x: x @ (x * 2e4).T, torch.float16, "overflow in a product", "mm"),
        (
            lambda x: functional.conv1d(x[None], x[None, :, :2] * 3e4),
            torch.float16,
            None,
            "convolution",
        ),
        (lambda x: (x * 200).pow(2), torch.float16, "overflow in a square", "pow"),
        (lambda x: (x * 200) * (x * 200), torch.float16, "overflow", "mul"),
        (lambda x: (x.abs() * 2e4).sum(), torch.float16, "overflow in a sum", "sum"),
        (lambda x: (x * 1e30).half(), torch.float32, "overflow in a cast", "_to_copy"),
        (lambda x: torch.cosh(x * 9), torch.float16, "overflow in exp", "cosh"),
        (lambda x: x.relu().rsqrt(), torch.float32, "division by zero", "rsqrt"),
        (lambda x: x.rsqrt(), torch.float32, "root of a negative number", "rsqrt"),
        (lambda x: x.relu().pow(-1), torch.float32, "division by zero", "pow"),
        (lambda x: x.relu().pow(-3), torch.float32, "division by zero", "pow"),
        (lambda x: x.log(), torch.float32, "log of a negative number", "log"),
        (lambda x: x.relu() * torch.inf, torch.float32, "NaN from inf", "mul"),
        (lambda x: x / 1e-7, torch.float16, "division by a small number", "div"),
        (lambda x: (x * 1e20).cumprod(-1), torch.float32, "overflow in a product", "cumprod"),
        (lambda x: x[:, :1].std(-1), torch.float32, "division by zero", "std"),
        (lambda x: x * torch.tensor(torch.nan), torch.float32, "not finite before", "lift_fresh"),
    ],
)
def test_kinds(of: Callable[[Tensor], Tensor], dtype: torch.dtype, kind: str | None, operation: str) -> None:
    found = explained(of, dtype)
    assert found.operation == operation
    assert found.kind == (kind or "overflow in a product")
    assert found.phase == "forward" and found.line is not None


def tried(of: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Explanation:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            return of(x * self.scale)

    x = torch.linspace(-2, 2, 16, dtype=dtype).view(4, 4)
    return precision_lab.explain(Model(), x, loss=lambda output: output.float().square().mean())


def test_what_mends_them() -> None:
    """Each remedy was tried, forward and backward."""
    found = tried(lambda x: torch.acos(x / x.detach()))
    assert (found.kind, found.forward) == ("infinite slope", "acos") and "at 1 and -1" in found.what
    assert found.remedy is not None and found.remedy.ours == "x.clamp(-1 + eps, 1 - eps)"
    found = tried(lambda x: torch.cosh(x * 1e4))  # beyond the end on either side
    assert found.remedy is not None and found.remedy.ours.startswith("exp of differences")
    found = tried(lambda x: x + x[:, :1].std(-1, keepdim=True).detach())
    assert found.remedy is not None and "correction=0" in found.remedy.ours
    found = tried(lambda x: x + torch.exp(-torch.exp(x * 0 + 100.0)))  # 0 x inf in backward, of an overflow in forward
    assert (found.kind, found.phase) == ("overflow in exp", "forward") and found.remedy is not None


def test_a_zero_that_float32_has_not() -> None:
    found = tried(lambda x: functional.normalize(x * 0, dim=-1) + x, torch.float16)  # whose eps of 1e-12 is zero
    assert found.kind == "division by zero" and found.remedy is not None
    assert found.remedy.ours == 'precision="32-true"'


def test_a_cast_that_is_spelled_out_is_none_of_a_policys() -> None:
    found = tried(lambda x: (x.abs() * 3e4).half().sum() / 1e4 + x.sum())
    assert found.remedy is not None and found.remedy.kind == "code"
    assert found.line is not None and found.remedy.ours == f"float32 in place of the cast in {found.line}"
    found = tried(lambda x: (x.abs() * 3e4).half().sum() / 1e4 + x.sum(), torch.bfloat16)
    assert found.remedy is not None and found.remedy.ours.startswith('precision="32-true", and float32 in place of')
