"""This machine: Python, torch, CPU, memory, and the devices that torch finds."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from precision_core import Support
from precision_core.hardware import FORMATS, device_count, is_available
from precision_core.policy import dtype_name


@dataclass(frozen=True)
class Machine:
    """Versions, the CPU and its memory."""

    python: str
    torch: str
    platform: str
    cpu: str
    cores: int | None
    threads: int
    """CPU threads that torch computes with."""
    memory_bytes: int | None
    """Physical memory; None where the operating system does not say."""
    formats: dict[str, Support]
    """How well the CPU computes in bfloat16 and in float16, and why."""


@dataclass
class Device:
    """One kind of device."""

    type: str
    here: bool | None = None
    """None: unknown, because the probe raised `error`, or because asking would import torch_xla."""
    count: int | None = None
    names: list[str] = field(default_factory=list)
    error: str = ""


def describe_machine() -> Machine:
    """Returns versions, and this machine's CPU and memory."""
    cpu = FORMATS["cpu"]
    return Machine(
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        formats={dtype_name(dtype): Support(*cpu[dtype]()) for dtype in (torch.bfloat16, torch.float16)},
    )


def find_devices() -> list[Device]:
    """Returns every kind of device that core knows, here or not; xla only where torch_xla is installed."""
    devices = [_probe(device_type) for device_type in FORMATS]
    return [*devices, Device("xla")] if find_spec("torch_xla") else devices  # a kind of its own: not to be imported


def cpu_name() -> str:
    """Returns the CPU's name, or its architecture where torch does not know it."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


_NAMES: dict[str, Callable[[int], str]] = {
    "cpu": lambda _: cpu_name(),
    "cuda": lambda index: torch.cuda.get_device_name(index),
    "xpu": lambda index: torch.xpu.get_device_name(index),
    "mps": lambda _: cpu_name(),  # one chip
}


def _probe(device_type: str) -> Device:
    device = Device(device_type)
    try:
        device.here = is_available(device_type)
        device.count = device_count(device_type)
        device.names = [_NAMES[device_type](index) for index in range(device.count)]
    except Exception as error:  # a driver that does not fit raises anything; the other devices are still of interest
        device.error = f"{type(error).__name__}: {error}"
    return device


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
