"""Controls: each is beyond its mode's bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from precision_core import MODES, Fabric
from precision_core.testing.controls import LOWER, Permuted, SimulatedRanks, controls, round_parameters
from precision_core.testing.loss_bound import curve_distance, loss_bound
from precision_core.testing.problem import Problem, train

PROBLEM = Problem(seed=11)  # not one of the seeds of the calibration
NAMES = ["one dtype lower", "gradients left scaled", "two ranks summed", "two ranks not reduced"]
FULL = pytest.mark.full


def fabric(mode: str) -> Fabric:
    return Fabric(accelerator="cpu", precision=mode)


@cache
def reference(mode: str, steps: int) -> list[float]:
    return train(fabric(mode), PROBLEM, steps=steps)


@pytest.mark.parametrize("steps", [20, pytest.param(100, marks=FULL)])
@pytest.mark.parametrize(  # a factor of 2 is closer to the bound than the loss scale is
    "name", [pytest.param(name, marks=[FULL] if name == "gradients left scaled" else []) for name in NAMES]
)
@pytest.mark.parametrize("mode", list(MODES))
def test_a_control_is_beyond_the_bound(mode: str, name: str, steps: int) -> None:
    curve = controls(mode)[name].run(fabric, PROBLEM, steps)
    assert curve_distance(curve, reference(mode, steps)) > 1.4 * loss_bound(mode, steps)


def test_every_mode_has_all_controls() -> None:
    assert list(LOWER) and set(LOWER) == set(MODES)
    for mode in MODES:
        assert list(controls(mode)) == NAMES
    assert controls(16) == controls("16-mixed") == controls(MODES["16-mixed"])


def test_a_policy_without_a_lower_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there are controls for 64-true, .* not for params=float32"):
        controls("params=float32,output=bfloat16")


def test_parameters_are_rounded_in_place() -> None:
    model = nn.Linear(5, 5, dtype=torch.bfloat16)
    before, weight = model.weight.detach().clone(), model.weight
    round_parameters(model)
    assert model.weight is weight and weight.dtype is torch.bfloat16
    assert torch.equal(weight, before.to(torch.float8_e4m3fn).bfloat16()) and not torch.equal(weight, before)


def test_permuted_rows_are_the_same_rows() -> None:
    rows, permuted = Problem(1).batch(2), Permuted(1).batch(2)
    assert not torch.equal(rows, permuted)
    assert sorted(rows.tolist()) == sorted(permuted.tolist())


@pytest.mark.parametrize(
    ("reduce", "rounded"), [("float32", lambda grad: grad), ("bfloat16", lambda grad: grad.bfloat16().float())]
)
def test_simulated_ranks_average_in_the_reduce_dtype(
    reduce: str, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def gradients(model: nn.Module) -> None:
        found.append([param.grad.clone() for param in model.parameters() if param.grad is not None])

    found: list[list[torch.Tensor]] = []
    policy = f"params=float32,reduce={reduce}"
    simulated = Fabric(strategy=SimulatedRanks(ranks=2), precision=policy)
    train(simulated, steps=1, accumulate=2, after_step=gradients)
    for rank in range(2):
        train(fabric("32-true"), steps=1, rank=rank, world_size=2, after_step=gradients)
    for mean, first, second in zip(*found, strict=True):
        torch.testing.assert_close(mean, rounded((rounded(first) + rounded(second)) / 2), rtol=2e-2, atol=1e-7)
        assert reduce == "float32" or torch.equal(mean, mean.bfloat16().float())
