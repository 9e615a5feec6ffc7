"""Strategies that core brings."""

from precision_core.strategies.base import Strategy as Strategy
from precision_core.strategies.ddp import DDPStrategy as DDPStrategy
from precision_core.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy

STRATEGIES: dict[str, type[Strategy]] = {"single_device": SingleDeviceStrategy, "ddp": DDPStrategy}
"""Name -> class. Packages add theirs through the entry-point group `precision.strategies`."""
