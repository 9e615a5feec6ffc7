"""Which devices this machine has, and how well each kind computes in each dtype (core's rows of the support table)."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from precision_core.compute_capability import compute_capability
from precision_core.policy.policy import Policy

ACCELERATORS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "gpu": ("cuda", "xpu", "mps"),
    "cuda": ("cuda",),
    "mps": ("mps",),
    "xpu": ("xpu",),
    "tpu": ("xla",),
    "auto": ("cuda", "xpu", "mps", "cpu"),
}
"""`accelerator=` -> the device types it may mean; the first that is available wins."""

MODULES: dict[str, Any] = {}
"""Device type -> a replacement of `torch.cuda` where torch has no such module: `is_available`, `device_count`,
`manual_seed_all`, `get_rng_state`, `set_rng_state`. Packages add theirs when one of their objects is made."""


def module_of(device_type: str) -> Any:
    """Returns the module of a kind of device (`torch.cuda`, ...); raises as `torch.get_device_module` does."""
    return MODULES.get(device_type) or torch.get_device_module(device_type)


def is_available(device_type: str) -> bool:
    """Whether torch finds a device of that type (`"cuda"`, `"mps"`, ...) on this machine."""
    if device_type == "cpu":
        return True
    try:
        if device_type == "cuda":  # by NVML: its `is_available` starts the driver, which a forked rank then cannot use
            return torch.cuda.device_count() > 0
        return bool(module_of(device_type).is_available())
    except (RuntimeError, AttributeError):  # torch has no such module, or it cannot tell
        return False


def device_count(device_type: str) -> int:
    """Returns how many devices of that type there are; a CPU is one."""
    if device_type == "cpu":
        return 1
    return int(module_of(device_type).device_count()) if is_available(device_type) else 0


Level = Literal["native", "emulated", "slow", "no"]
"""From best to worst: instructions for the dtype; correct, computed in a wider one; correct, an order of magnitude
slower; not supported."""

LEVELS: tuple[Level, ...] = get_args(Level)

Answer = tuple[Level, str]

_EVERYWHERE: Answer = ("native", "every device of this kind computes in it")


def _cpu_bfloat16() -> Answer:
    for probe, units in (("_is_avx512_bf16_supported", "AVX512-BF16"), ("_is_amx_tile_supported", "AMX")):
        if getattr(torch.cpu, probe, bool)():
            return "native", f"this CPU has {units}"
    if _onednn("_is_mkldnn_bf16_supported"):
        if platform.machine().lower() in ("arm64", "aarch64"):
            return "native", "this CPU has bfloat16 instructions"
        return "emulated", "no bfloat16 units on this CPU: oneDNN computes in float32 and rounds"
    return "slow", "no bfloat16 units on this CPU, and no oneDNN kernels for it"


def _cpu_float16() -> Answer:
    if cpu_has_float16():
        return "native", "this CPU has float16 instructions"
    # Measured in training GPTs of one to two million parameters on an AVX-512 CPU without AVX512-FP16.
    return "slow", "float16 has no units on this CPU, 9 to 26 times slower than float32"


def cpu_has_float16() -> bool:
    """Whether torch multiplies float16 matrices with float16 instructions of this CPU."""
    if platform.system() == "Darwin":  # torch has no oneDNN there; all ARM CPUs that it runs on have units
        return platform.machine().lower() == "arm64"
    return _onednn("_is_mkldnn_fp16_supported")


def _onednn(question: str) -> bool:
    try:
        return bool(getattr(torch.ops.mkldnn, question)())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def _cuda_bfloat16() -> Answer:
    if torch.version.hip or compute_capability() >= (8, 0):
        return "native", "this GPU has bfloat16 units (compute capability 8.0 or newer)"
    return "emulated", "this GPU is older than compute capability 8.0: bfloat16 is computed in float32 and rounded"


def _cuda_float16() -> Answer:
    if torch.version.hip or compute_capability() >= (7, 0):
        return "native", "this GPU multiplies float16 matrices in units of their own"
    return "slow", "this GPU is older than compute capability 7.0 and has no units for float16 matrices"


def _xpu_float64() -> Answer:
    if torch.xpu.get_device_properties().has_fp64:
        return "native", "this GPU has float64 units"
    return "no", "this GPU has no float64: use 32-true, or accelerator='cpu'"


def _mps_bfloat16() -> Answer:
    if torch.backends.mps.is_macos_or_newer(14, 0):
        return "native", "macOS 14 or newer"
    return "no", "Metal has bfloat16 from macOS 14 on: use 16-mixed"


_Probe = Callable[[], Answer]


def _always(answer: Answer) -> _Probe:
    return lambda: answer


FORMATS: dict[str, dict[torch.dtype, _Probe]] = {
    "cpu": {
        torch.float64: _always(_EVERYWHERE),
        torch.float32: _always(_EVERYWHERE),
        torch.bfloat16: _cpu_bfloat16,
        torch.float16: _cpu_float16,
    },
    "cuda": {
        torch.float64: _always(_EVERYWHERE),
        torch.float32: _always(("native", "every device of this kind computes in it; TF32 by Fabric(tf32=True)")),
        torch.bfloat16: _cuda_bfloat16,
        torch.float16: _cuda_float16,
    },
    "xpu": {
        torch.float64: _xpu_float64,
        torch.float32: _always(_EVERYWHERE),
        torch.bfloat16: _always(_EVERYWHERE),
        torch.float16: _always(_EVERYWHERE),
    },
    "mps": {
        torch.float64: _always(("no", "Metal has no float64: use 32-true, or accelerator='cpu'")),
        torch.float32: _always(_EVERYWHERE),
        torch.bfloat16: _mps_bfloat16,
        torch.float16: _always(_EVERYWHERE),
    },
}
"""Device type -> dtype -> a probe of this machine: level and reason. Call only those of available devices."""


def by_dtypes(policy: Policy, device_type: str) -> Answer:
    """Returns the worst answer for the dtypes of `policy`, exceptions included, on that kind of device."""
    if device_type not in FORMATS:
        return "no", f"no installed package speaks of {device_type} devices; core knows {', '.join(FORMATS)}"
    if not is_available(device_type):
        return "no", f"torch finds no {device_type} device here"
    parts = [policy.flat, *(exception for _, exception in policy.exceptions)]
    dtypes = {dtype for part in parts for dtype in (part.compute, part.params)}
    narrow_first = sorted(
        dtypes, key=lambda dtype: (dtype.itemsize, str(dtype))
    )  # among equals the narrowest gives the reason
    return max((FORMATS[device_type][dtype]() for dtype in narrow_first), key=lambda answer: LEVELS.index(answer[0]))
