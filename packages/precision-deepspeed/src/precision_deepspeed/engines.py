"""Chooses the engine for a stage and a dtype."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from precision_deepspeed.engine import Engine
from precision_deepspeed.plain_engine import HalfEngine, PlainEngine
from precision_deepspeed.zero3_engine import Zero3Engine
from precision_deepspeed.zero_engine import ZeroEngine


def make_engine(vendor: Any, module: nn.Module, optimizer: Optimizer, stage: int, scaled_here: bool) -> Engine:
    """Returns the engine for the stage and dtype; with `scaled_here` the loss scale is DynamicScaler's."""
    if stage == 0:
        vendor.torch_autocast_z0_gradscaler = None
        return (HalfEngine if vendor.bfloat16_enabled() else PlainEngine)(vendor, module, optimizer)
    vendor.optimizer.torch_autocast_gradscaler = None
    if scaled_here:
        vendor.optimizer.override_loss_scale(1.0)
    return (Zero3Engine if stage == 3 else ZeroEngine)(vendor, module, optimizer)
