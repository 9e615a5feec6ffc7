"""The hardware behind XLA devices: which there is, how well it computes in each dtype, and what it lacks."""

from __future__ import annotations

import torch

from precision_core import Policy
from precision_core.hardware import LEVELS, MODULES, Answer
from precision_xla import vendor

ACCELERATORS = {"cpu": "CPU", "tpu": "TPU"}
"""`Fabric(accelerator=...)` -> what the vendor calls it."""

_BY_COMPILER = "PJRT's CPU client is there to try programs out: XLA compiles the products in float32 and rounds"
_COMPILED: Answer = ("native", "XLA compiles for this CPU's instructions")

_FORMATS: dict[str, dict[torch.dtype, Answer]] = {
    "CPU": {
        torch.float64: _COMPILED,
        torch.float32: _COMPILED,
        torch.bfloat16: ("emulated", _BY_COMPILER),
        torch.float16: ("emulated", _BY_COMPILER),
    },
    "TPU": {
        torch.float64: ("no", "a TPU has no float64, and XLA would compute it in pairs of float32: use 32-true"),
        torch.float32: ("emulated", "a TPU's units multiply bfloat16: float32 products take several passes"),
        torch.bfloat16: ("native", "a TPU's units multiply bfloat16"),
        torch.float16: ("no", "a TPU's units multiply bfloat16, not float16: use bf16-mixed or bf16-true"),
    },
}
"""Hardware -> dtype -> the level and the reason; for a TPU what Google's documents say, as nobody has run it yet."""


def register() -> None:
    """Tells core of the devices and generator of "xla", for which torch has no module."""
    MODULES.setdefault("xla", vendor.Generators)


def answer(policy: Policy, hardware: str) -> Answer:
    """Returns the worst answer for the dtypes that `policy` computes in, exceptions included, on "TPU" or "CPU"."""
    dtypes = {part.compute for part in (policy.flat, *(exception for _, exception in policy.exceptions))}
    return max(
        (_FORMATS[hardware][dtype] for dtype in sorted(dtypes, key=lambda dtype: dtype.itemsize)),
        key=lambda each: LEVELS.index(each[0]),
    )
