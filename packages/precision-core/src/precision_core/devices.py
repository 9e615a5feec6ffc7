"""Which devices this machine has, and which one `Fabric(accelerator=..., devices=...)` means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from precision_core.policy.dtypes import nearest

ACCELERATORS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "gpu": ("cuda", "xpu", "mps"),
    "cuda": ("cuda",),
    "mps": ("mps",),
    "xpu": ("xpu",),
    "tpu": ("xla",),
    "auto": ("cuda", "xpu", "mps", "cpu"),
}
"""`accelerator=` -> the device types it may mean, the first that is here wins."""

MODULES: dict[str, Any] = {}
"""Device type -> what stands in for `torch.cuda` where torch has no such module: `is_available`, `device_count`,
`manual_seed_all`, `get_rng_state`, `set_rng_state`. Packages add theirs when one of their objects is made."""


def module_of(device_type: str) -> Any:
    """Returns the module of a kind of device (`torch.cuda`, ...); raises as `torch.get_device_module` does."""
    return MODULES.get(device_type) or torch.get_device_module(device_type)


def is_available(device_type: str) -> bool:
    """Whether torch finds a device of that type (`"cuda"`, `"mps"`, ...) on this machine."""
    if device_type == "cpu":
        return True
    try:
        return bool(module_of(device_type).is_available())
    except (RuntimeError, AttributeError):  # torch has no such module, or it cannot tell
        return False


def device_count(device_type: str) -> int:
    """Returns how many devices of that type there are; a CPU is one."""
    if device_type == "cpu":
        return 1
    return int(module_of(device_type).device_count()) if is_available(device_type) else 0


def choose_type(accelerator: str) -> str:
    """Returns the device type that `Fabric(accelerator=...)` means; raises `ValueError` for one unknown or missing."""
    if not isinstance(accelerator, str) or accelerator not in ACCELERATORS:
        hint = nearest(str(accelerator), ACCELERATORS)
        raise ValueError(f"Fabric(accelerator={accelerator!r}): allowed are {', '.join(ACCELERATORS)}{hint}")
    for device_type in ACCELERATORS[accelerator]:
        if is_available(device_type):
            return device_type
    here = ", ".join(name for name, types in ACCELERATORS.items() if any(map(is_available, types)))
    if accelerator == "tpu":
        raise ValueError(
            'Fabric(accelerator="tpu") needs precision-xla, and runs under strategy="xla": pip install '
            "./packages/precision-xla in a checkout of the project (it is on no package index yet). "
            f"Here are: {here}"
        )
    wanted = " or ".join(ACCELERATORS[accelerator])
    raise ValueError(f"Fabric(accelerator={accelerator!r}): torch finds no {wanted} device here. Here are: {here}")


def choose_indices(devices: int | str | Sequence[int], device_type: str) -> Sequence[int]:
    """Returns the indices of this node's devices that `Fabric(devices=...)` means, one for each process.

    `devices` is "auto" (all devices of the type, or one CPU), a number, or a list of indices. On a CPU any number of
    processes share it.

    Raises:
        ValueError: devices that do not exist, or none.
    """
    call = f"Fabric(devices={devices!r})"
    count = device_count(device_type)
    if devices == "auto":
        return range(count)
    if type(devices) is int:
        if devices < 1:
            raise ValueError(f"{call}: expected at least 1")
        if device_type != "cpu" and devices > count:
            raise ValueError(f"{call}: this machine has {count} {device_type} device{'s' if count != 1 else ''}")
        return range(devices)
    if isinstance(devices, (list, tuple)) and devices and all(type(index) is int for index in devices):
        missing = [index for index in devices if not 0 <= index < count]
        if missing:
            raise ValueError(f"{call}: there is no {device_type} device {missing[0]}, they are 0 to {count - 1}")
        if len(set(devices)) < len(devices):
            raise ValueError(f"{call}: one process drives one device, so each may be named once")
        return list(devices)
    raise ValueError(f'{call}: expected "auto", a number of devices, or a list of device indices')


def device_of(device_type: str, index: int) -> torch.device:
    """Returns the device with that index; a CPU has none."""
    return torch.device(device_type) if device_type in ("cpu", "mps") else torch.device(device_type, index)
