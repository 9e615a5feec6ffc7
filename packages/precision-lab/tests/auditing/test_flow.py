"""Where float32 results come from: a constant, a cast, or what was float32 all along."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.recorder import Recorder

HALF = torch.bfloat16


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.table = function, nn.Buffer(torch.rand(8))
        self.small = nn.Buffer(torch.ones(8, 8, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def promoted(function: Callable[..., Tensor]) -> set[tuple[str, str]]:
    recorder = Recorder()
    with recorder:
        Apply(function)(torch.rand(4, 8, dtype=HALF, requires_grad=True) * 1)
    return {(op.name, op.promoted) for op in recorder.record.ops if op.promoted}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x: x * self.table, {("mul", "constant")}),
        (lambda self, x: x + torch.ones(8), {("add", "constant")}),
        (lambda self, x: x.float() * 2, {("_to_copy", "cast")}),
        (lambda self, x: self.small.to(HALF) @ x.t(), {("_to_copy", "quantised")}),
        (lambda self, x: x * self.table.to(x.dtype), set()),
        (lambda self, x: x * torch.tensor(2.0), set()),  # a number does not promote
        (lambda self, x: x.float().softmax(-1), set()),
    ],
)
def test_promotions(function: Callable[..., Tensor], expected: set[tuple[str, str]]) -> None:
    assert promoted(function) == expected
