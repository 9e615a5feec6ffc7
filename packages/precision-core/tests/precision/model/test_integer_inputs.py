"""Integers in layers that compute in floating point: the error names model, layer, input and the way out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))

    def forward(self, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(pixels, self.weight)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), layer])

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.layers[1](*inputs)


LONG, BYTE, BOOL = torch.ones(2, 4, dtype=torch.long), torch.ones(1, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 4) > 0
LAYERS: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], str]] = {
    "linear": (nn.Linear(4, 2), (LONG,), r"layers\.1 \(Linear\) was given input in int64"),
    "conv": (nn.Conv2d(3, 2, 1), (BYTE,), r"layers\.1 \(Conv2d\) was given input in uint8"),
    "layer norm": (nn.LayerNorm(4), (LONG.int(),), r"layers\.1 \(LayerNorm\) was given input in int32"),
    "batch norm": (nn.BatchNorm1d(4), (LONG,), r"layers\.1 \(BatchNorm1d\) was given input in int64"),
    "lstm": (nn.LSTM(4, 3), (BOOL,), r"layers\.1 \(LSTM\) was given input in bool"),
    "attention": (nn.MultiheadAttention(4, 2), (LONG,) * 3, "query in int64, key in int64, value in int64"),
    "functional": (Functional(), (BOOL, LONG), r"layers\.1 \(Functional\) was given .*pixels in int64"),
    "deep": (nn.Sequential(nn.Linear(4, 2)), (LONG,), r"layers\.1\.0 \(Linear\) was given input in int64"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_the_layer_and_its_input_are_named(mode: str, layer: str) -> None:
    made, inputs, message = LAYERS[layer]
    module = copy.deepcopy(made)  # which setup casts
    fabric = Fabric(accelerator="cpu", precision=mode)
    model = fabric.setup(Twice(module))
    try:
        with pytest.raises((RuntimeError, ValueError), match=rf"Twice runs in {mode}, and .*{message}") as caught:
            model(*inputs)
        assert "x.float()" in str(caught.value) and caught.value.__cause__ is not None
    finally:
        fabric.teardown()


def test_the_model_itself_is_named_where_it_is_the_layer() -> None:
    model = Fabric(accelerator="cpu", precision="bf16-mixed").setup(nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="Linear runs in bf16-mixed, and it was given input in int64"):
        model(LONG)
    assert model(LONG.float()).dtype is torch.float32


class Wrong(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.embedding = how, nn.Embedding(4, 4)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = self.embedding(ids)
        if self.how == "shapes":
            return values @ torch.ones(3, 3)
        if self.how == "a float target":
            return nn.functional.nll_loss(values, target)
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shapes", "shapes cannot be multiplied|size"),
        ("a float target", "Float|scalar type"),
    ],
)
def test_other_errors_stay_as_they_are(how: str, message: str) -> None:
    model = Fabric(accelerator="cpu", precision="32-true").setup(Wrong(how))
    with pytest.raises(RuntimeError, match=message) as caught:
        model(torch.tensor([0, 1]), torch.ones(2))
    assert caught.value.__cause__ is None
    with pytest.raises(IndexError):
        model(torch.tensor([7]), torch.ones(1))
