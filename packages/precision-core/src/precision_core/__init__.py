"""precision-core: any number format for PyTorch training, with one argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from precision_core.checkpoint.error import CheckpointError
from precision_core.fabric import Fabric
from precision_core.policy.policy import ALIASES, MODES, Policy
from precision_core.precision.base import Precision
from precision_core.precision.double import DoublePrecision
from precision_core.precision.half import HalfPrecision
from precision_core.precision.mixed import MixedPrecision
from precision_core.precision.model.report import Report
from precision_core.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

if TYPE_CHECKING:
    from precision_core.support.support import Support, supports
    from precision_core.support.table import SupportRow

__all__ = [
    "ALIASES",
    "MODES",
    "CheckpointError",
    "DDPStrategy",
    "DoublePrecision",
    "Fabric",
    "HalfPrecision",
    "MixedPrecision",
    "Policy",
    "Precision",
    "Report",
    "SingleDeviceStrategy",
    "Strategy",
    "Support",
    "SupportRow",
    "supports",
]

_LATE = ("Support", "SupportRow", "supports")
"""What comes when it is asked for: training needs no support table."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from precision_core import support

    return getattr(support, name)
