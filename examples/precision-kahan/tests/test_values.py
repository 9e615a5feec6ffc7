"""What compensation is for: small updates arrive. Everything is compared with float64 or float32."""

from collections.abc import Callable, Iterable

import pytest
import torch
from precision_kahan import KahanPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from precision_core import HalfPrecision, Precision

Make = Callable[[Iterable[nn.Parameter], float], Optimizer]

SPACING = 2.0**-7
"""Of bfloat16 from 1 to 2."""


class Weights(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.clone())


def moved_by(plugin: Precision, update: float, steps: int = 1000) -> float:
    """Returns by how much so many equal updates move a weight of 1 on average, and what they lost counts."""
    model = plugin.convert_module(Weights(torch.linspace(1, 1.4, 64)))
    optimizer = SGD(model.parameters(), lr=1.0)
    start = value_of(plugin, model)
    for _ in range(steps):
        model.weight.grad = torch.full_like(model.weight, -update)
        plugin.optimizer_step(optimizer, model, None)
    return (value_of(plugin, model) - start).mean().item()


def value_of(plugin: Precision, model: Weights) -> Tensor:
    """Returns the weight with its compensation, in float64."""
    lost = plugin.state_dict().get("compensation", {}).get("0.weight", torch.zeros(()))
    return model.weight.detach().double() + lost.double()


@pytest.mark.parametrize("share", [2**-2, 2**-4, 2**-6])
def test_updates_below_half_a_spacing_add_up(share: float) -> None:
    true = 1000 * share * SPACING
    assert moved_by(HalfPrecision("bf16-true"), share * SPACING) == 0
    assert moved_by(KahanPrecision(), share * SPACING) == pytest.approx(true, rel=1e-3)


def test_random_updates_add_up() -> None:
    torch.manual_seed(0)
    plugin = KahanPrecision()
    model = plugin.convert_module(Weights(torch.rand(1000) + 1))
    optimizer = SGD(model.parameters(), lr=1.0)
    true = value_of(plugin, model)
    for _ in range(1000):
        update = (torch.rand(1000) * 0.05 * SPACING).bfloat16()
        model.weight.grad = -update
        plugin.optimizer_step(optimizer, model, None)
        true += update.double()
    error = value_of(plugin, model) / true - 1
    assert error.square().mean().sqrt() < 2**-13 and error.abs().max() < 2**-11  # of 1000 roundings, each up to 2^-17


def test_compensation_has_a_spacing_of_its_own() -> None:
    """16 bits are not 24: updates below a 1024th of the spacing stop arriving once the compensation has grown."""
    assert 0 < moved_by(KahanPrecision(), 1e-4 * SPACING) < 0.5 * 1000 * 1e-4 * SPACING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_checkpoint_keeps_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = (torch.randn(100_000, dtype=torch.float64) * torch.logspace(-30, 30, 100_000)).to(dtype)
    plugin = KahanPrecision()
    model = plugin.convert_module(Weights(values))
    assert torch.equal(model.weight, values.bfloat16())
    assert ((value_of(plugin, model) - values.double()) / values.double()).abs().max() <= 2**-16


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "make",
    [
        lambda params, decay: SGD(params, 2e-4, 0.9, weight_decay=decay),
        lambda params, decay: AdamW(params, 2e-4, (0.9, 0.99), weight_decay=decay),
    ],
    ids=["sgd", "adamw"],
)
def test_a_quadratic_is_descended_as_in_float32(make: Make, weight_decay: float) -> None:
    def trained(plugin: Precision) -> Tensor:
        torch.manual_seed(0)
        model = plugin.convert_module(Weights(torch.randn(256) * 0.5 + 1))
        goal = torch.randn(256) * 0.1 + 1
        optimizer = make(model.parameters(), weight_decay)
        for _ in range(500):
            optimizer.zero_grad()
            (0.5 * (model.weight.float() - goal) ** 2).sum().backward()
            plugin.optimizer_step(optimizer, model, None)
        return model.weight.detach().double()

    exact, true, kahan = (trained(plugin) for plugin in (Precision(), HalfPrecision("bf16-true"), KahanPrecision()))
    best = (exact.bfloat16().double() - exact).norm()  # what no bfloat16 parameter can beat
    assert (kahan - exact).norm() < 3 * best
    assert (true - exact).norm() > 20 * (kahan - exact).norm()


@pytest.mark.parametrize(("beta2", "falls"), [(0.999, False), (0.99, True)])
def test_a_second_moment_falls_only_where_bfloat16_lets_it(beta2: float, falls: bool) -> None:
    """Optimizer state is bfloat16, as in bf16-true: a change by a thousandth is below half its spacing."""
    plugin = KahanPrecision()
    model = plugin.convert_module(Weights(torch.ones(4)))
    optimizer = AdamW(model.parameters(), betas=(0.9, beta2))
    for step in range(200):
        model.weight.grad = torch.full_like(model.weight, float(step == 0))
        plugin.optimizer_step(optimizer, model, None)
        if step == 0:
            first = optimizer.state[model.weight]["exp_avg_sq"].clone()
    assert bool((optimizer.state[model.weight]["exp_avg_sq"] < first / 2).all()) is falls
