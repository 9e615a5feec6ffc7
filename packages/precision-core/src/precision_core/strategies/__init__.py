"""Where the model lives, who runs the step, and how processes start.

Its modules are core's own; others import from here what `__all__` lists.
"""

from precision_core.strategies.base import Strategy as Strategy
from precision_core.strategies.checkpoint_format import CheckpointFormat as CheckpointFormat
from precision_core.strategies.collectives import Group, TorchGroup
from precision_core.strategies.ddp import DDPStrategy as DDPStrategy
from precision_core.strategies.layout import Layout
from precision_core.strategies.processes import Ranks, join
from precision_core.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy

__all__ = [
    "STRATEGIES",
    "CheckpointFormat",
    "DDPStrategy",
    "Group",
    "Layout",
    "Ranks",
    "SingleDeviceStrategy",
    "Strategy",
    "TorchGroup",
    "join",
]

STRATEGIES: dict[str, type[Strategy]] = {"single_device": SingleDeviceStrategy, "ddp": DDPStrategy}
"""Name -> class. Packages add theirs through the entry-point group `precision.strategies`."""
