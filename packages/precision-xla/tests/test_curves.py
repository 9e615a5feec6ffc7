"""Training curves beside torch on the CPU in the same mode, over 100 steps, and runs with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.testing import (
    LEFT_SCALED,
    LOWER,
    Problem,
    curve_distance,
    loss_bound,
    mean_curve,
    round_parameters,
    train,
)
from precision_xla.support import RUNS as MODES

STEPS = 100


@cache
def alone(mode: str) -> list[float]:
    return train(Fabric(accelerator="cpu", precision=mode), PROBLEMS[mode], steps=STEPS)


@cache
def on_xla(mode: str, **options: Any) -> list[float]:
    return train(Fabric(accelerator="cpu", strategy="xla", precision=mode), PROBLEMS[mode], steps=STEPS, **options)


PROBLEMS: dict[str, Problem] = {}


@pytest.fixture(autouse=True)
def _set_problems(problem_of: Callable[[str], Problem]) -> None:
    PROBLEMS.update({mode: problem_of(mode) for mode in MODES})


@pytest.mark.parametrize("mode", MODES)
def test_curves_are_those_of_torch(mode: str) -> None:
    assert curve_distance(on_xla(mode), alone(mode)) <= loss_bound(mode, STEPS)


def test_the_vendors_own_gelu_is_right_to_eight_digits() -> None:
    """With it a 64-true curve lies 1.1e-11 away, and the bound is 1e-14; once it is mended, `problem_of` may go."""
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    device = Fabric(accelerator="cpu", strategy="xla").device
    error = (nn.functional.gelu(x.to(device)).cpu() - nn.functional.gelu(x)).abs().max()
    of_erf = (torch.erf(x.to(device)).cpu() - torch.erf(x)).abs().max()
    assert of_erf < 1e-15 and 1e-9 < error < 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_one_dtype_lower_is_beyond_the_bound(mode: str) -> None:
    lower = LOWER[mode]
    curve = on_xla(lower) if lower else on_xla(mode, after_step=round_parameters)
    assert curve_distance(curve, alone(mode)) > loss_bound(mode, STEPS)


@pytest.mark.parametrize("factor", [2.0, LEFT_SCALED], ids=["summed", "left scaled"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_another_size_are_beyond_the_bound(mode: str, factor: float) -> None:
    assert curve_distance(on_xla(mode, gradient_factor=factor), alone(mode)) > loss_bound(mode, STEPS)


@pytest.mark.parametrize("mode", MODES)
def test_halves_of_the_batch_that_are_not_reduced_are_beyond_the_bound(mode: str) -> None:
    curve = mean_curve([on_xla(mode, rank=rank, world_size=2) for rank in range(2)])
    assert curve_distance(curve, alone(mode)) > loss_bound(mode, STEPS)
