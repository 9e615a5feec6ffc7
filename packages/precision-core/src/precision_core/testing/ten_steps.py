"""What the host reads in ten steps of training: one loop for each mode and strategy, so that counts can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from precision_core.fabric import Fabric
from precision_core.scaling.loss_scaler import LossScaler
from precision_core.testing.host_reads import HostReads

STEPS = 10
FIRST = 3
"""Steps before those that count: in them state and buffers are made, and an engine learns the order of a model."""
ROWS, FEATURES = 16, 64
"""Of a batch: sizes that FP8 and packed weights take."""


def small_model(layers: int = 2) -> nn.Sequential:
    """Returns linear layers with norms between them, four parameters each and two of the last, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = [(nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES), nn.ReLU()) for _ in range(layers - 1)]
        return nn.Sequential(*(module for block in inner for module in block), nn.Linear(FEATURES, FEATURES // 2))


def reads_of_ten_steps(
    fabric: Fabric,
    model: nn.Module | None = None,
    *,
    clip: Mapping[str, Any] | None = None,
    fused: bool = True,
    skipped: bool = False,
) -> Counter[str]:
    """Returns how often ten steps ask for a tensor's value, by "folder/file function", as `HostReads` counts on a rank.

    The CPU plays a device: the loss scale and what tells of an overflow stay where they are. No step overflows.

    Args:
        fabric: of a CPU; it is torn down.
        model: takes (16, 64) floats; None is `small_model()`.
        clip: arguments of `fabric.clip_gradients` in each step; None does not clip.
        fused: whether AdamW is the fused one, which can skip a step by a flag on the device.
        skipped: reads `fabric.last_step_skipped` after each step.
    """
    _play_device(fabric)
    model = small_model() if model is None else model
    optimizer = AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=fused)  # torch's eps is 0 in float16
    fabric.setup(model, optimizer)
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(1))
    counted, found = HostReads(optimizer), Counter[str]()
    for number in range(FIRST + STEPS):
        with counted:
            optimizer.zero_grad()
            fabric.backward(model(x).square().mean())
            if clip:
                fabric.clip_gradients(model, optimizer, **clip)
            optimizer.step()
            if skipped and fabric.last_step_skipped:
                raise AssertionError("a step was skipped: its reads are not those of a step")
        if number >= FIRST:
            found.update(_where(line) for line in counted.lines)
        counted.lines.clear()
    fabric.teardown()
    return found


def _where(line: str) -> str:
    path, _, rest = line.partition(":")
    return f"{path} {rest.split()[1].rstrip(':')}"


def _play_device(fabric: Fabric) -> None:
    """Has core's loss scale leave its values where they are, as on every device but a CPU."""
    scaler = fabric.precision_plugin.scaler
    if isinstance(scaler, LossScaler):  # else an engine scales, or nobody
        scaler._scale._avoid_sync = scaler._records._avoid_sync = True
        scaler._scale._is_plain = False
