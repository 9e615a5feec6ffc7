"""Names are the user's, whatever wraps the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_lab.auditing.names import Names, clean


@pytest.mark.parametrize(
    ("path", "expected"),
    [("module.layers.0", "layers.0"), ("_orig_mod.module.head", "head"), ("", ""), ("a._forward_module.b", "a.b")],
)
def test_wrappers_are_left_out(path: str, expected: str) -> None:
    assert clean(path) == expected


def test_a_model_contains_what_was_seen_before() -> None:
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(inner, nn.Linear(2, 2))
    names = Names()
    names.add(inner)
    assert names.param(inner.weight) == "weight"
    names.add(outer)
    assert names.roots == [outer] and names.param(inner.weight) == "0.weight" and names.path(inner) == "0"
    names.add(inner)
    assert names.roots == [outer]


def test_two_models_are_told_apart() -> None:
    first, second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    names = Names()
    names.add(first)
    names.add(second)
    assert (names.param(first.weight), names.param(second[0].weight)) == ("Linear.weight", "Sequential.0.weight")


def test_a_parameter_that_was_replaced_is_found() -> None:
    model = nn.Linear(2, 2)
    names = Names()
    names.add(model)
    model.weight = nn.Parameter(torch.ones(2, 2))
    assert names.param(model.weight) == "weight"
    assert names.param(torch.ones(1)) is None
