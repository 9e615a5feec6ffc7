"""Norms and softmaxes are followed from one operation to the next, through what does not change what a tensor is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.recorder import Recorder

ROWS = torch.rand(4, 8).bfloat16() + 1


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def seen(function: Callable[[Tensor], Tensor], rows: Tensor = ROWS) -> set[tuple[str, str]]:
    recorder = Recorder()
    with recorder:
        Apply(function)(rows.clone().requires_grad_())
    return {(op.name, op.by_hand) for op in recorder.record.ops if op.by_hand}


def masked(x: Tensor) -> Tensor:
    e = x.exp().masked_fill(x > 1.5, 0.0)
    return e / (e.sum(-1, keepdim=True).clamp(min=1e-6) + 1e-6)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (masked, ("exp", "softmax")),
        (lambda x: x.exp() * x.exp().sum(-1, keepdim=True).reciprocal(), ("exp", "softmax")),
        (lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6), ("mul", "norm")),
        (lambda x: x * (x.square().mean(-1).unsqueeze(-1) + 1e-6).rsqrt(), ("pow", "norm")),
        (lambda x: x * ((x**2).mean(-1, keepdim=True) + 1e-6) ** -0.5, ("pow", "norm")),
        (lambda x: (x - 1) / (x.std(0) + 1e-6), ("std", "norm")),
        (lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-6), ("linalg_vector_norm", "norm")),
        (lambda x: x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).reciprocal(), ("linalg_vector_norm", "norm")),
        (nn.functional.normalize, ("linalg_vector_norm", "norm")),
    ],
)
def test_half(function: Callable[[Tensor], Tensor], expected: tuple[str, str]) -> None:
    assert seen(function) == {expected}
    assert seen(function, ROWS.float()) == set()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp() / x.sum(-1, keepdim=True),
        lambda x: (x * x + 1).sqrt(),
        lambda x: x.mean(-1).sqrt(),
        lambda x: x.square().mean() / 2,
        lambda x: torch.log(x.exp() + 1),
        lambda x: x.norm(dim=-1).mean() + x.norm() / 8,
    ],
)
def test_others(function: Callable[[Tensor], Tensor]) -> None:
    assert seen(function) == set()
