"""Rows of the support table: the modes that DeepSpeed does not run on devices that could."""

from __future__ import annotations

from collections.abc import Iterator

from precision_core.hardware import cpu_has_float16, is_available
from precision_core.support import SupportRow

STRATEGY = "deepspeed"
NO_FLOAT64 = "DeepSpeed's engine keeps float32 master weights and has no float64: use 32-true, or another strategy"
REDUCES_IN_FLOAT32 = (
    "under torch_autocast DeepSpeed reduces some layers' gradients in float32 whatever the config says: pass "
    "reduce=float32"
)
NO_ROUNDING = (
    "DeepSpeed's engine steps float32 master weights, and rounds them to nearest: use bf16-true, or bf16-master"
)
NO_FLOAT16 = (
    "DeepSpeed's accelerator reports no float16 support here, which its fp16 section needs: use 16-mixed, which is its "
    "torch_autocast, or bf16-true"
)


def rows() -> Iterator[SupportRow]:
    """Yields the modes that do not run under DeepSpeed on this machine, and why; the others are as the device is."""
    devices = ["cpu", *(["cuda"] if is_available("cuda") else [])]
    for device in devices:
        yield SupportRow("64-true", device, "no", NO_FLOAT64, STRATEGY)
        yield SupportRow("bf16-stochastic", device, "no", NO_ROUNDING, STRATEGY)
    if not cpu_has_float16():  # DeepSpeed asks oneDNN for the same; importing DeepSpeed takes seconds and prints
        for mode in ("16-true", "16-master"):
            yield SupportRow(mode, "cpu", "no", NO_FLOAT16, STRATEGY)
