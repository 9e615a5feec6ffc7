"""Gradients that are inf or NaN at random steps of 16-mixed: skipped and counted, and training goes on."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from precision_core import Fabric, MixedPrecision

STEPS = 500
FULL = pytest.mark.full


def put(index: int, value: float, param: nn.Parameter) -> None:
    """Puts a value into the gradient, in backward, as a kernel that overflows would."""
    assert param.grad is not None
    param.grad.view(-1)[index] = value


def inject(optimizer_type: type[SGD | AdamW], where: str, steps: int, seed: int = 0) -> tuple[int, int]:
    """Trains with inf or NaN in a tenth of the steps; returns how many those were, and how many were skipped."""
    torch.manual_seed(0)
    dice = random.Random(seed)
    plugin = MixedPrecision("16-mixed", "cpu", {"init_scale": 2.0**24, "growth_interval": 5})
    fabric = Fabric(accelerator="cpu", precision=plugin)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = optimizer_type(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    x = torch.randn(64, 8)
    target = x.sum(dim=1, keepdim=True).tanh()
    injected = grown = overflowed = 0
    losses = []
    for _ in range(steps):
        before = [param.detach().clone() for param in model.parameters()]
        scale, skipped = plugin.scale, plugin.skipped_steps
        bad = dice.choice([math.inf, -math.inf, math.nan]) if dice.random() < 0.1 else None
        optimizer.zero_grad()
        loss = (model(x) - target).pow(2).mean()
        losses.append(loss.item())
        if bad is not None and where == "gradient":
            param = dice.choice(list(model.parameters()))
            index = dice.randrange(param.numel())
            hook = param.register_post_accumulate_grad_hook(functools.partial(put, index, bad))
            fabric.backward(loss)
            hook.remove()
        else:
            fabric.backward(loss * bad if bad is not None else loss)
        optimizer.step()
        injected += bad is not None
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert fabric.last_step_skipped == unchanged == (plugin.skipped_steps > skipped)
        assert bad is None or unchanged
        assert all(param.isfinite().all() for param in model.parameters())
        grown += plugin.scale > scale
        overflowed += bad is None and unchanged
    assert plugin.skipped_steps == injected + overflowed and plugin.steps == steps - plugin.skipped_steps
    assert 0 < overflowed <= 24 + grown  # the scale starts too large, and grows too far now and then
    assert losses[-1] < losses[0] / 5
    return injected, plugin.skipped_steps


@pytest.mark.parametrize(
    ("optimizer_type", "where"),
    [
        (AdamW, "gradient"),
        (SGD, "loss"),
        pytest.param(SGD, "gradient", marks=FULL),
        pytest.param(AdamW, "loss", marks=FULL),
    ],
)
def test_parameters_stay_finite_and_the_counts_are_those_of_what_was_injected(
    optimizer_type: type[SGD | AdamW], where: str
) -> None:
    injected, skipped = inject(optimizer_type, where, STEPS)
    print(f"{STEPS} steps, injected {injected}, skipped {skipped}")
    assert injected > 30
