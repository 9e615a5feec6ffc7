"""Rows of the support table: under FSDP, core's modes run where their dtypes do."""

from __future__ import annotations

from precision_core import MODES, SupportRow
from precision_core.hardware import FORMATS, by_dtypes

_NO_MPS = "torch.distributed has no collectives on mps: use one device, or the CPU"


def rows() -> list[SupportRow]:
    """Returns a row for each of core's modes and kinds of device."""
    return [
        SupportRow(mode, device, *(("no", _NO_MPS) if device == "mps" else by_dtypes(policy, device)), strategy="fsdp")
        for mode, policy in MODES.items()
        for device in FORMATS
    ]
