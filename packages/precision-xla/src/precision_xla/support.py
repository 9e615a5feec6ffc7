"""Rows of the support table: core's modes under XLA, on a TPU and on PJRT's CPU client."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from precision_core import MODES, SupportRow
from precision_core.policy import stores_as_torch
from precision_xla.hardware import answer

RUNS = {mode: policy for mode, policy in MODES.items() if stores_as_torch(policy)}
"""Core's modes that run here."""
NO_STORAGE = (
    "on XLA devices half parameters, gradients and state are stored as torch stores them; core's update in pieces was "
    "not tried in XLA's graph: use bf16-mixed, or another strategy"
)
_NO_TPU = "there is no TPU here (neither /dev/accel* nor /dev/vfio/*)"


def rows() -> list[SupportRow]:
    """Returns two rows for each of core's modes; imports no torch_xla and starts nothing."""
    missing = "" if find_spec("torch_xla") else 'torch_xla is not installed: pip install "torch_xla==2.9.0"'
    found = []
    for mode, policy in MODES.items():
        for device, hardware, reason in (
            ("xla", "TPU", missing or ("" if find_tpus() else _NO_TPU)),
            ("cpu", "CPU", missing),
        ):
            reason = reason or ("" if mode in RUNS else NO_STORAGE)
            found.append(SupportRow(mode, device, *(("no", reason) if reason else answer(policy, hardware)), "xla"))
    return found + [SupportRow(row.mode, row.device, row.level, row.reason) for row in found if row.device == "xla"]


def find_tpus() -> list[Path]:
    """Returns the device files of this machine's TPUs; imports no torch_xla, which takes seconds."""
    return [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
