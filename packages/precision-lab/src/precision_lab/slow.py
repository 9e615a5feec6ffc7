"""Modes that a device runs correctly but very slowly.

One case is known: float16 products on a CPU without float16 units, which torch then computes one by one. Training takes
9 to 26 times as long as in float32 (GPTs of one to two million parameters on an AVX-512 CPU without AVX512-FP16).
bfloat16 was only measured on a CPU that has units for it.
"""

from __future__ import annotations

import platform

import torch

from precision_core import Policy


def slow_reason(policy: Policy, device_type: str) -> str | None:
    """Returns why training under `policy` is slow on that type of device; None: it is not."""
    if device_type != "cpu" or not _uses_float16(policy) or cpu_has_float16():
        return None
    return "float16 has no units on this CPU, 9 to 26 times slower"


def _uses_float16(policy: Policy) -> bool:
    parts = [policy, *(exception for _, exception in policy.exceptions)]
    return any(torch.float16 in (part.params, part.compute) for part in parts)


def cpu_has_float16() -> bool:
    """Whether torch multiplies float16 matrices with instructions of this CPU."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN, as on macOS: all ARM CPUs it runs on have units
        return platform.machine().lower() in ("arm64", "aarch64")
