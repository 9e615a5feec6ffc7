"""What is asked for in one place for the whole process: torch's switches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def switches() -> dict[str, Any]:
    """Returns torch's own switches for products in float32; those that torch cannot say are left out."""
    found: dict[str, Any] = {}
    read: dict[str, Callable[[], Any]] = {
        "matmul": torch.get_float32_matmul_precision,
        "cudnn_tf32": lambda: torch.backends.cudnn.allow_tf32,
    }
    for name, call in read.items():
        with suppress(RuntimeError):  # where old and new settings were mixed
            found[name] = call()
    return found
