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
    ],
)
def test_kinds(of: Callable[[Tensor], Tensor], dtype: torch.dtype, kind: str | None, operation: str) -> None:
    found = explained(of, dtype)
    assert found.operation == operation
    assert found.kind == (kind or "overflow in a product")
    assert found.phase == "forward" and found.line is not None
