"""The scale of `16-true`, step by step, by DeepSpeed's rule with the numbers of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy
from precision_deepspeed.scaler import SectionScaler

OVERFLOWS = [False, False, False, True, True, True, True, False, False, False, True]

DYNAMIC = {"initial_scale_power": 8, "loss_scale_window": 2, "min_loss_scale": 64}
SCALES = {
    # doubled two steps after the first one that was good; the first overflow spends the hysteresis, each later one
    # halves, down to the minimum; doubling restores the hysteresis
    "hysteresis 2": (DYNAMIC | {"hysteresis": 2}, [256, 256, 512, 512, 256, 128, 64, 64, 64, 128, 128]),
    "hysteresis 1": (
        DYNAMIC | {"hysteresis": 1, "min_loss_scale": 32},
        [256, 256, 512, 256, 128, 64, 32, 32, 32, 64, 32],
    ),
    "static": ({"loss_scale": 128}, [128] * 11),
}


def scales(stage: int, section: dict[str, Any]) -> list[tuple[float, bool]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage, {"fp16": section}), precision="16-true")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    fabric.setup(model, optimizer)
    found = []
    for overflows in OVERFLOWS:
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 4)).float().mean() * (float("inf") if overflows else 1.0))
        optimizer.step()
        found.append((fabric.precision_plugin.scale, fabric.last_step_skipped))
    fabric.teardown()
    return found


def all_scales(stage: int) -> dict[str, list[tuple[float, bool]]]:
    return {name: scales(stage, section) for name, (section, _) in SCALES.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_scale_follows_window_hysteresis_and_minimum(stage: int, float16_ranks: Callable[..., Any]) -> None:
    (found,) = run_in_ranks(1, float16_ranks, all_scales, stage)
    assert found == {name: list(zip(expected, OVERFLOWS, strict=True)) for name, (_, expected) in SCALES.items()}


@pytest.mark.parametrize("scale", [0, 0.0, -2.0, float("inf"), float("nan"), "256", None])
def test_what_is_no_scale_is_refused_and_the_old_one_stays(scale: Any) -> None:
    scaler = SectionScaler()
    scaler.load_state_dict({"scale": 256.0})
    with pytest.raises(ValueError, match=r"not the state of a loss scaler: scale is "):
        scaler.load_state_dict({"scale": scale})
    assert scaler.factor == 256.0
