"""Environment variables with which torch_xla silently changes dtypes: none is set here, all are refused.

What each does in torch_xla 2.9 was tried on the CPU; the tests try it again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_TO_BFLOAT16 = (
    "makes every float32 {also}tensor on the device bfloat16, parameters and optimizer state included; "
    'for that pass precision="bf16-true"'
)
_NO_EFFECT = 'is not read by torch_xla 2.9, and the run would be in float32; pass precision="16-true" or "16-mixed"'

REFUSED = {
    "XLA_USE_BF16": _TO_BFLOAT16.format(also="and float64 "),
    "XLA_DOWNCAST_BF16": _TO_BFLOAT16.format(also="") + " (float64 becomes float32)",
    "XLA_USE_FP16": _NO_EFFECT,
    "XLA_DOWNCAST_FP16": _NO_EFFECT,
    "XLA_USE_F16": _NO_EFFECT,
    "XLA_USE_32BIT_LONG": "makes every int64 tensor on the device int32: ids and counters beyond 2**31 wrap around",
}
"""Variable -> what it does, and what to pass instead."""


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raises `ValueError` for a variable that is set and would change the run's dtypes; says what it does."""
    for name, what in REFUSED.items():
        if environment.get(name, "0").lower() not in ("", "0", "false"):
            raise ValueError(f"the environment has {name}={environment[name]}, which {what}. Unset {name}")
