"""The reference as an engine: what it takes, what it makes, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precision_te.recipes import MXFP8, RECIPES, Delayed, recipe_from
from precision_te.reference import ReferenceEngine, ReferenceLinear

ENGINE = ReferenceEngine()


def convert(layer: nn.Linear, dtype: torch.dtype | None = None) -> ReferenceLinear:
    new = ENGINE.layers[nn.Linear](layer, recipe=Delayed(), dtype=dtype, name="layer")
    assert isinstance(new, ReferenceLinear)
    return new


def test_there_and_back_with_the_very_parameters() -> None:
    for layer in (nn.Linear(16, 32), nn.Linear(16, 32, bias=False).eval()):
        new = convert(layer)
        assert new.weight is layer.weight and new.bias is layer.bias and new.training is layer.training
        assert ENGINE.is_layer(new) and not ENGINE.is_layer(layer)
        back = ENGINE.restore(new)
        assert type(back) is nn.Linear and back.weight is layer.weight and back.bias is layer.bias
        assert repr(back) == repr(layer) and back.training is layer.training
        assert list(back.state_dict()) == list(layer.state_dict())


def test_a_dtype_casts_the_very_parameters() -> None:
    layer = nn.Linear(16, 32)
    weight = layer.weight
    assert convert(layer, torch.bfloat16).weight is weight and weight.dtype is torch.bfloat16


def test_meta_costs_nothing() -> None:
    new = convert(nn.Linear(2**20, 2**20, device="meta"))
    assert new.weight.is_meta and ENGINE.restore(new).weight.is_meta


@pytest.mark.parametrize(
    ("sizes", "name", "reason"),
    [
        ((32, 64), "mxfp8", None),
        ((48, 64), "mxfp8", "in_features=48 is no multiple of 32"),
        ((48, 64), "delayed", None),
        ((48, 64), "nvfp4", None),
        ((64, 50), "current", "out_features=50 is no multiple of 16"),
        ((64, 8), "block", "out_features=8 is no multiple of 16"),
    ],
)
def test_shapes_that_the_vendors_kernels_cannot_take(sizes: tuple[int, int], name: str, reason: str | None) -> None:
    answer = ENGINE.why_not(nn.Linear(*sizes, device="meta"), recipe_from(name))
    assert answer is None if reason is None else reason in answer


def test_all_recipes_run_and_nothing_else() -> None:
    for name in RECIPES:
        ENGINE.check(recipe_from(name))
    for wrong in ("delayed", None, object()):
        with pytest.raises(ValueError, match="the reference runs delayed, current"):
            ENGINE.check(wrong)  # type: ignore[arg-type]


def test_its_context_is_a_region() -> None:
    layer: Any = convert(nn.Linear(32, 32))
    x = torch.randn(4, 32)
    plain = layer(x)
    with ENGINE.context(MXFP8(), group=None):
        quantised = layer(x)
    with ENGINE.context(MXFP8(), calibrating=True):
        assert torch.equal(layer(x), plain)
    assert 0 < (quantised - plain).norm() < 0.06 * plain.norm()
