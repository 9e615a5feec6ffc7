"""Modules in a wider dtype, as an exception of a policy would have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from precision_lab.explaining.watched import Modules
from precision_lab.explaining.wide import Wide


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.seen.append(x.dtype)
        return self.second(x)


def dtypes(model: Model, paths: list[str], dtype: torch.dtype, autocast: bool) -> list[torch.dtype]:
    modules = Modules(model)
    x = torch.ones(2, 4, dtype=model.first.weight.dtype)
    with modules.followed(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), Wide(modules, paths, dtype):
        output = model(x)
    return [model.seen.pop(), output.dtype]


def test_a_module_gives_the_wider_dtype_and_those_around_it_do_not() -> None:
    half, bf16, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    assert dtypes(Model(), [], single, True) == [bf16, bf16]
    assert dtypes(Model(), ["first"], single, True) == [single, bf16]
    assert dtypes(Model(), [""], single, True) == [single, single]
    assert dtypes(Model().half(), ["first"], single, False) == [single, half]
    assert dtypes(Model(), ["first"], double, False) == [double, single]
    assert dtypes(Model().half(), [""], double, False) == [double, double]


def test_gradients_of_leaves_are_not_rounded() -> None:
    model = Model().half()
    modules = Modules(model)
    with modules.followed(), Wide(modules, [""], torch.float64, leaves=True) as wide:
        output = model(torch.ones(2, 4).half() * 1e-4).sum() * 1e-6
        leaf = wide.leaf(model.first.weight)
        (gradient,) = torch.autograd.grad(output, leaf)
    assert leaf.dtype == gradient.dtype == torch.float64 and 0 < gradient.abs().max() < 6e-8
    assert model.first.weight.grad is None and model.first.weight.dtype == torch.float16
