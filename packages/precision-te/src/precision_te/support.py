"""Rows of the support table: where Transformer Engine's kernels run, and that the reference runs anywhere."""

from __future__ import annotations

from precision_core import SupportRow
from precision_core.hardware import FORMATS, Level, is_available
from precision_te.plugin import MODES
from precision_te.recipes import Delayed
from precision_te.vendor.engine import TransformerEngine


def rows() -> list[SupportRow]:
    """Returns a row for each mode and kind of device; the vendor itself is asked only where there is an NVIDIA GPU."""
    return [SupportRow(mode, device, *_answer(mode, device)) for mode in MODES for device in FORMATS]


def _answer(mode: str, device: str) -> tuple[Level, str]:
    if not is_available(device):
        return "no", f"torch finds no {device} device here"
    if mode != "transformer-engine":
        seen = "" if device == "cpu" else "; nobody has run its tests there"
        return "slow", f"plain torch computes what FP8 would, to see whether a model trains in it{seen}"
    if device != "cuda":
        return "no", "Transformer Engine computes on NVIDIA GPUs: use a mode that ends in -reference"
    try:
        TransformerEngine().check(Delayed())
    except (ImportError, ValueError) as error:
        return "no", str(error)
    return "native", "Transformer Engine has FP8 kernels for this GPU; nobody has run these tests there"
