"""Hardware that a test needs: `@needs("cuda")` skips it where that is missing, and says so."""

from __future__ import annotations

from typing import Any

import pytest

from precision_core.compute_capability import compute_capability
from precision_core.hardware import device_count, is_available


def needs(device_type: str, count: int = 1, *, capability: tuple[int, int] | None = None) -> Any:
    """Returns a pytest mark that skips a test or a test class where torch does not find the hardware.

    Args:
        device_type: "cuda", "xpu", "mps", "xla", ...
        count: the least number of devices.
        capability: the least compute capability of a CUDA device, for example (8, 9) for FP8.
    """
    wanted = f"needs {count} {device_type} device{'s' if count != 1 else ''}"
    if capability is not None:
        wanted += f" of compute capability {capability[0]}.{capability[1]} or newer"
    reason = _missing(device_type, count, capability)
    return pytest.mark.skipif(reason is not None, reason=f"{wanted}: {reason}")


def _missing(device_type: str, count: int, capability: tuple[int, int] | None) -> str | None:
    if not is_available(device_type):
        return f"torch finds no {device_type} device here"
    if (found := device_count(device_type)) < count:
        return f"torch finds {found}"
    if capability is not None and (here := compute_capability()) < capability:
        return f"this one has {here[0]}.{here[1]}"
    return None
