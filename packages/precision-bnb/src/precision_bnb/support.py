"""Rows of the support table: on which devices each mode runs, and how well."""

from __future__ import annotations

import torch

from precision_bnb.config import MODES
from precision_core import SupportRow
from precision_core.hardware import FORMATS, Level, is_available

DEVICES = ("cpu", "cuda", "xpu")
"""Device types that bitsandbytes 0.50 has kernels for."""


def rows() -> list[SupportRow]:
    """Returns a row for each mode and kind of device."""
    return [SupportRow(mode, device, *_answer(mode, device)) for mode in MODES for device in FORMATS]


def _answer(mode: str, device: str) -> tuple[Level, str]:
    if device not in DEVICES:
        return "no", f"bitsandbytes is not run on {device} here: use {' or '.join(DEVICES)}"
    if not is_available(device):
        return "no", f"torch finds no {device} device here"
    if device != "cpu":
        return "native", "bitsandbytes has kernels for it; these tests have not been run there"
    if mode in ("int8", "int8-training"):
        what = "inputs quantised in evaluation, weights dequantised in training" if mode == "int8" else "weights"
        if torch.backends.cpu.get_cpu_capability() == "AVX512" and mode == "int8":
            return "native", f"int8 products by this CPU's AVX-512: {what}"
        return "emulated", f"computed in the compute dtype: {what} are rounded to int8"
    return "emulated", "weights are stored in 4 bits and dequantised for each product, in the compute dtype"


def compute_dtype(device_type: str) -> torch.dtype:
    """Returns the first of bfloat16 and float16 that this kind of device computes natively, else float32."""
    if device_type in FORMATS and is_available(device_type):
        for dtype in (torch.bfloat16, torch.float16):
            if FORMATS[device_type][dtype]()[0] == "native":
                return dtype
    return torch.float32
