"""Noise: rounding by chance is right on average, and depends on where a number is, not on pieces, ranks or resuming."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from precision_core import Fabric
from precision_core.precision.update.noise import Noise, Place, round_stochastically
from precision_core.testing.stored import Model, equal, give_gradients

CPU = torch.device("cpu")


def noise(seed: int = 0, step: int = 0) -> Noise:
    made = Noise()
    made.seed, made.step = seed, step
    return made


def roundings(value: float, count: int = 10_000, step: int = 0) -> Tensor:
    """Returns `count` roundings of one value, in float64."""
    out = torch.empty(count, dtype=torch.bfloat16)
    round_stochastically(torch.full((count,), value), noise(step=step).bits(Place(0, 0), count, "", CPU), out)
    return out.double()


def is_unbiased(drawn: Tensor, value: float) -> bool:
    """Whether the mean is within four standard errors of the value, as 10,000 draws of two neighbours have them."""
    exact = float(torch.tensor(value))
    below, above = drawn.min().item(), drawn.max().item()
    share = (exact - below) / (above - below)
    error = (above - below) * math.sqrt(share * (1 - share) / len(drawn))
    return abs(drawn.mean().item() - exact) < 4 * error


VALUES = [1.0 + share / 128 for share in (1e-3, 0.1, 0.25, 0.5, 0.9)] + [-3.3, 1e-30, -7e-40, 3e38]


def test_the_mean_of_ten_thousand_roundings_is_the_value() -> None:
    for step, value in enumerate(VALUES):
        drawn = roundings(value, step=step)
        assert len(drawn.unique()) == 2 and is_unbiased(drawn, value)


def test_a_biased_rounding_would_be_seen() -> None:
    """The negative control: bits that are never in the upper eighth round down too often; nearest does always."""
    value = 1.0 + 0.5 / 128
    out = torch.empty(10_000, dtype=torch.bfloat16)
    bits = (noise().bits(Place(0, 0), 10_000, "", CPU).float() * 0.875).int()
    round_stochastically(torch.full((10_000,), value), bits, out)
    assert not is_unbiased(out.double(), value)


def test_what_bfloat16_has_stays() -> None:
    given = torch.tensor([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan, 2.0**-133]).repeat(500)
    out = torch.empty(4000, dtype=torch.bfloat16)
    round_stochastically(given.clone(), noise().bits(Place(0, 0), 4000, "", CPU), out)
    assert torch.equal(out.float().nan_to_num(7.0), given.nan_to_num(7.0))
    assert torch.equal(out.signbit()[1::8], given.signbit()[1::8])


def test_bits_depend_on_the_place_alone() -> None:
    drawn = noise().bits(Place(3, 0), 1000, "exp_avg", CPU)
    pieces = [noise().bits(Place(3, start), 250, "exp_avg", CPU) for start in range(0, 1000, 250)]
    assert torch.equal(torch.cat(pieces), drawn)
    index = torch.arange(0, 1000, 3, dtype=torch.int32)
    assert torch.equal(noise().bits(Place(3, 0, index), len(index), "exp_avg", CPU), drawn[::3])
    others = [
        noise().bits(Place(4, 0), 1000, "exp_avg", CPU),
        noise().bits(Place(3, 0), 1000, "", CPU),
        noise(step=1).bits(Place(3, 0), 1000, "exp_avg", CPU),
        noise(seed=1).bits(Place(3, 0), 1000, "exp_avg", CPU),
        noise().bits(Place(3, 1), 1000, "exp_avg", CPU),
        noise().bits(Place(3, 2**32), 1000, "exp_avg", CPU),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([other, drawn]).double())[0, 1]) < 0.15
    assert drawn.min() >= 0 and drawn.max() < 2**16 and abs(drawn.double().mean() / 32767.5 - 1) < 0.1


def run(tmp_path: Any, stop: bool, steps: int = 4, loses: str = "") -> list[Tensor]:
    """Returns the parameters after some steps; with `stop` the last half is another process's, from a checkpoint.

    `loses` names what of the generator's state is not loaded.
    """
    torch.manual_seed(0)
    fabric, model = Fabric("cpu", precision="bf16-stochastic"), Model()
    optimizer = AdamW(model.values, lr=1e-4)
    fabric.setup(model, optimizer)
    for step in range(steps):
        if stop and step == steps // 2:
            fabric.save(tmp_path / "half", {"model": model, "optimizer": optimizer})
            torch.manual_seed(99)
            fabric, model = Fabric("cpu", precision="bf16-stochastic"), Model(1)
            optimizer = AdamW(model.values, lr=1e-4)
            fabric.setup(model, optimizer)
            fabric.load(tmp_path / "half", {"model": model, "optimizer": optimizer})
            state = fabric.precision_plugin.masters.state_dict()["rounding"]
            lost = {"seed": {"seed": 99}, "steps": {"steps": [0]}}.get(loses, {})
            fabric.precision_plugin.masters.load_state_dict({"rounding": state | lost})
        give_gradients(model.values, step)
        optimizer.step()
    assert {value.dtype for state in optimizer.state.values() for key, value in state.items() if key != "step"} == {
        torch.bfloat16
    }
    return [param.detach() for param in model.values]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Any) -> None:
    assert equal(run(tmp_path, stop=False), run(tmp_path, stop=True))


@pytest.mark.parametrize("loses", ["seed", "steps"])
def test_a_generator_that_is_not_resumed_would_be_seen(tmp_path: Any, loses: str) -> None:
    """The negative control of the test above."""
    assert not equal(run(tmp_path, stop=False), run(tmp_path, stop=True, loses=loses))


def arrived(mode: str, bias: float = 1.0) -> float:
    """Returns what arrives of 50 updates of 2**-14, each a hundredth of the spacing, in standard errors off their sum.

    `bias` multiplies the random bits.
    """
    model = nn.Linear(100, 100, bias=False)
    nn.init.ones_(model.weight)
    fabric = Fabric("cpu", precision=mode)
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    if bias != 1:
        drawn = fabric.precision_plugin._updates.storage.noise  # type: ignore[attr-defined]
        fair = drawn.bits
        drawn.bits = lambda *place: (fair(*place).float() * bias).int()
    for _ in range(50):
        model.weight.grad = torch.full_like(model.weight, -(2.0**-14))
        optimizer.step()
    moved, error = model.weight.double().mean().item() - 1, 2**-7 * math.sqrt(50 * 2**-7 / 10_000)
    return (moved - 50 * 2**-14) / error


def test_small_updates_arrive_on_average() -> None:
    assert abs(arrived("bf16-stochastic")) < 4


@pytest.mark.parametrize("bias", [0.0, 0.999])
def test_updates_that_are_rounded_with_a_bias_would_be_seen(bias: float) -> None:
    """The negative control of the test above: bits that are a thousandth too small, and none, as in bf16-true."""
    assert arrived("bf16-stochastic", bias) < -4
    if not bias:
        assert arrived("bf16-true") == arrived("bf16-stochastic", bias)
