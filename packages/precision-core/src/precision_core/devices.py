"""Which devices this machine has, and which one `Fabric(accelerator=..., devices=...)` means."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from precision_core.dtypes import nearest

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


def is_available(device_type: str) -> bool:
    """Whether torch finds a device of that type (`"cuda"`, `"mps"`, ...) on this machine."""
    if device_type == "cpu":
        return True
    try:
        return bool(torch.get_device_module(device_type).is_available())
    except (RuntimeError, AttributeError):  # torch has no such module, or it cannot tell
        return False


def device_count(device_type: str) -> int:
    """Returns how many devices of that type there are; a CPU is one."""
    if device_type == "cpu":
        return 1
    return int(torch.get_device_module(device_type).device_count()) if is_available(device_type) else 0


def choose_device(accelerator: str, devices: int | str | Sequence[int]) -> torch.device:
    """Returns the one device that `Fabric(accelerator=..., devices=...)` means.

    `devices` is "auto", 1, or a list with one index.

    Raises:
        ValueError: an unknown or missing accelerator; devices that do not exist, or more than one.
    """
    device_type = _choose_type(accelerator)
    index = _choose_index(devices, device_type)
    return torch.device(device_type) if device_type in ("cpu", "mps") else torch.device(device_type, index)


def _choose_type(accelerator: str) -> str:
    if not isinstance(accelerator, str) or accelerator not in ACCELERATORS:
        hint = nearest(str(accelerator), ACCELERATORS)
        raise ValueError(f"Fabric(accelerator={accelerator!r}): allowed are {', '.join(ACCELERATORS)}{hint}")
    for device_type in ACCELERATORS[accelerator]:
        if is_available(device_type):
            return device_type
    here = ", ".join(name for name, types in ACCELERATORS.items() if any(map(is_available, types)))
    if accelerator == "tpu":
        raise ValueError('Fabric(accelerator="tpu") needs precision-xla: pip install precision-xla. Here are: ' + here)
    wanted = " or ".join(ACCELERATORS[accelerator])
    raise ValueError(f"Fabric(accelerator={accelerator!r}): torch finds no {wanted} device here. Here are: {here}")


def _choose_index(devices: int | str | Sequence[int], device_type: str) -> int:
    count = device_count(device_type)
    call = f"Fabric(devices={devices!r})"
    if devices == "auto":
        return 0
    if isinstance(devices, (list, tuple)) and devices and all(type(index) is int for index in devices):
        missing = [index for index in devices if not 0 <= index < count]
        if missing:
            raise ValueError(f"{call}: there is no {device_type} device {missing[0]}, they are 0 to {count - 1}")
        if len(devices) == 1:
            return int(devices[0])
        number = len(devices)
    elif type(devices) is int:
        number = devices
    else:
        raise ValueError(f'{call}: expected "auto", a number of devices, or a list with a device index')
    if number == 1:
        return 0
    if number < 1:
        raise ValueError(f"{call}: expected at least 1")
    if number > count:
        raise ValueError(f"{call}: this machine has {count} {device_type} device{'s' if count != 1 else ''}")
    raise ValueError(f"{call}: one process drives one device here; start with devices=1")
