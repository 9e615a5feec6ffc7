"""Scaled steps through torch's optimizers: for-loop, foreach, fused, on a CPU and on a device that blocks on reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from precision_core import MixedPrecision
from precision_core.scaling.loss_scaler import LossScaler

BAD_STEPS = (0, 3)
IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


def make(avoid_sync: bool, max_skips: int = 50) -> MixedPrecision:
    """A plugin on the CPU; with `avoid_sync` the CPU plays a device whose values are slow to read."""
    plugin = MixedPrecision("16-mixed", device="cpu")
    plugin.scaler = LossScaler(plugin.setup_scaler(), min_scale=2.0**-14, max_skips=max_skips, avoid_sync=avoid_sync)
    return plugin


def train(optimizer: Optimizer, model: nn.Module, plugin: MixedPrecision | None, clip: bool) -> list[float]:
    """Trains 8 steps, the bad ones on a loss that overflows; without a plugin they are left out by hand."""
    skipped = []
    for index in range(8):
        data = torch.randn(4, 6, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        loss = model(data).pow(2).sum()
        if plugin is None:
            if index not in BAD_STEPS:
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            continue
        plugin.pre_backward(loss * (float("inf") if index in BAD_STEPS else 1.0), model).backward()
        if clip:
            plugin.clip_gradients(model, optimizer, max_norm=0.5)
        plugin.optimizer_step(optimizer, model, None)
        skipped.append(plugin.last_step_skipped)
    return skipped


@pytest.mark.parametrize("avoid_sync", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [(SGD, {"lr": 0.01, "momentum": 0.9}), (AdamW, {"lr": 0.01}), (Adam, {"lr": 0.01, "amsgrad": True})],
)
def test_like_training_without_the_bad_steps(
    kind: type[Optimizer], options: dict[str, Any], implementation: dict[str, Any], clip: bool, avoid_sync: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    plugin = make(avoid_sync)
    skipped = train(kind(model.parameters(), **options, **implementation), model, plugin, clip)
    train(kind(twin.parameters(), **options, **implementation), twin, None, clip)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.isfinite(mine).all()
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert [index for index, flag in enumerate(skipped) if flag] == list(BAD_STEPS)
    assert (plugin.steps, plugin.skipped_steps, plugin.scale) == (6, 2, 2.0**14)


def test_flags_stay_on_the_device_with_a_fused_optimizer() -> None:
    plugin = make(avoid_sync=True)
    param = nn.Parameter(torch.ones(1))
    optimizer = AdamW([param], lr=0.1, fused=True)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        plugin.pre_backward((param * factor).sum(), None).backward()
        plugin.optimizer_step(optimizer, None, None)
    counter = plugin.scaler.counter
    assert (counter.steps, counter.skipped) == (0, 0)  # nothing has been read yet
    assert (plugin.steps, plugin.skipped_steps) == (2, 1)
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    assert optimizer.state[param]["step"].item() == 2.0


def test_gradients_are_true_after_the_step() -> None:
    for avoid_sync in (False, True):
        plugin = make(avoid_sync)
        param = nn.Parameter(torch.ones(1))
        optimizer = AdamW([param], lr=0.1, fused=True)
        plugin.pre_backward((param * 3.0).sum(), None).backward()
        plugin.optimizer_step(optimizer, None, None)
        assert param.grad is not None and param.grad.item() == 3.0


def test_the_limit_of_skips_is_checked_when_flags_are_read() -> None:
    plugin = make(avoid_sync=True, max_skips=3)
    param = nn.Parameter(torch.ones(1))
    optimizer = AdamW([param], lr=0.1, fused=True)
    for _ in range(4):
        optimizer.zero_grad()
        plugin.pre_backward((param * float("nan")).sum(), None).backward()
        plugin.optimizer_step(optimizer, None, None)
    with pytest.raises(FloatingPointError, match="4 optimizer steps in a row"):
        _ = plugin.skipped_steps


class TakesFlag(SGD):
    """Skips by a flag that its step takes, as torch_xla's sync-free optimizers do."""

    def step(self, closure: Any = None, found_inf: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        if found_inf is None or not found_inf:
            return super().step(closure)
        return None


def test_an_optimizer_whose_step_takes_the_flag_is_given_it() -> None:
    for avoid_sync in (False, True):
        plugin, param = make(avoid_sync), nn.Parameter(torch.ones(1))
        optimizer = TakesFlag([param], lr=0.5)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            plugin.pre_backward((param * factor).sum(), None).backward()
            plugin.optimizer_step(optimizer, None, None)
        assert plugin.scaler.counter.steps == (0 if avoid_sync else 2)  # the host has not asked yet
        assert (param.item(), plugin.steps, plugin.skipped_steps) == (0.0, 2, 1)
