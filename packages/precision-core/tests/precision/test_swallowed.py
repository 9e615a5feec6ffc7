"""Swallowed updates: the share of steps that change nothing is right, and is told once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from precision_core import Fabric, HalfPrecision

WARNING = (
    r"bf16-true: 75% of the updates in a sample changed nothing.*, most in 1\.weight \(100%\), 2\.weight \(100%\), "
)


def setup(mode: str) -> tuple[HalfPrecision, nn.Module, Optimizer]:
    """Returns four matrices of ones; a gradient of 1 moves the first by half a spacing below 1, the others by less."""
    fabric = Fabric("cpu", precision=mode)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
    optimizer = SGD([{"params": model[0].parameters(), "lr": 2.0**-8}, {"params": model[1:].parameters()}], lr=2.0**-12)
    fabric.setup(model, optimizer)
    return fabric.precision_plugin, model, optimizer  # type: ignore[return-value]


def step(model: nn.Module, optimizer: Optimizer, count: int, gradient: float = 1.0) -> None:
    for _ in range(count):
        for param in model.parameters():
            nn.init.ones_(param)
            param.grad = torch.full_like(param, gradient)
        optimizer.step()


def test_the_share_is_measured_and_told_once() -> None:
    precision, model, optimizer = setup("bf16-true")
    step(model, optimizer, 99)
    assert precision.swallowed_updates is None
    with pytest.warns(UserWarning, match=WARNING) as caught:
        step(model, optimizer, 1)
    assert 'precision="bf16-master"' in str(caught[0].message) and '"bf16-stochastic"' in str(caught[0].message)
    assert precision.swallowed_updates == 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, 202)
    assert precision.swallowed_updates == 0.75


@pytest.mark.parametrize("case", ["zero gradients", "a rate of zero", "large steps"])
def test_what_is_no_swallowed_update(case: str) -> None:
    precision, model, optimizer = setup("bf16-true")
    if case != "zero gradients":
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if case == "a rate of zero" else 1.0
    step(model, optimizer, 100, 0.0 if case == "zero gradients" else 1.0)
    assert precision.swallowed_updates == (0.0 if case == "large steps" else None)


def test_modes_that_lose_none_sample_none() -> None:
    for mode in ("bf16-master", "bf16-stochastic", "bf16-mixed"):
        precision, model, optimizer = setup(mode)
        step(model, optimizer, 101)
        assert precision.swallowed_updates is None


def test_every_parameter_has_its_turn() -> None:
    fabric = Fabric("cpu", precision="bf16-true")
    model = nn.ModuleList(nn.Linear(1, 2, bias=False) for _ in range(100))
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    swallowed = fabric.precision_plugin._swallowed  # type: ignore[attr-defined]
    for sample in range(4):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        with swallowed.sampling(optimizer):
            optimizer.step()
        assert len(swallowed._counts) == min(32 * (sample + 1), 100)
