"""Rows of the support table: bf16-kahan runs where bf16-true does, on one device."""

from __future__ import annotations

from precision_core import MODES, SupportRow
from precision_core.hardware import FORMATS, by_dtypes
from precision_core.strategies import STRATEGIES
from precision_core.support import discovery

MODE = "bf16-kahan"
ONE_DEVICE = "bf16-kahan runs on one device: every process would keep a compensation of its own; use bf16-mixed there"


def rows() -> list[SupportRow]:
    """Returns bf16-true's rows for one device, and a "no" for every other strategy that is known here."""
    one_device = [SupportRow(MODE, device, *by_dtypes(MODES["bf16-true"], device)) for device in FORMATS]
    others = sorted({*STRATEGIES, *discovery.names(discovery.STRATEGIES)} - {"single_device"})
    return one_device + [SupportRow(MODE, device, "no", ONE_DEVICE, name) for device in FORMATS for name in others]
