"""Which devices `Fabric(accelerator=..., devices=...)` means under XLA, and with which variables a process gets them.

The vendor reads two variables when its runtime starts: PJRT_DEVICE says which kind of device, CPU_NUM_DEVICES how many
devices a CPU is. Neither is changed here. The first has a function in the vendor's API; the second a new process has to
be started with, which `fabric.launch()` does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from precision_core.strategies import Layout, Ranks
from precision_xla import vendor
from precision_xla.hardware import ACCELERATORS


@dataclass(frozen=True)
class Plan:
    """What the run needs: the hardware, how many devices, and the layout of its process."""

    hardware: str
    devices: int
    layout: Layout


def plan(accelerator: str, devices: int | str | Sequence[int], num_nodes: int) -> Plan:
    """Returns the plan; starts the runtime only to count TPUs.

    Raises:
        ValueError: an accelerator that XLA does not run on, devices that are not here, or another runtime than asked
            for: its kind and its number of devices are settled when it starts.
    """
    if (value := vendor.spmd_variable()) is not None:
        raise ValueError(
            f"the environment has {vendor.SPMD}={value}, which makes all devices one before they are "
            f"counted: Fabric(devices=...) decides that. Unset {vendor.SPMD}"
        )
    hardware = _hardware(accelerator)
    if num_nodes != 1:
        raise ValueError(f"XLAStrategy runs on one machine, and Fabric(num_nodes={num_nodes}) asks for more")
    here = _here(hardware)
    count = _count(devices, here, hardware)
    missing: dict[str, str] = {}
    if hardware == "CPU" and count > 1 and here != count:
        if here is not None:
            raise ValueError(_too_late(devices, here))
        missing = {vendor.DEVICE: "CPU", vendor.CPU_DEVICES: str(count)}
    return Plan(hardware, count, Layout("xla", range(1), 1, Ranks(), missing=missing))


def _hardware(accelerator: str) -> str:
    if accelerator not in (*ACCELERATORS, "auto"):
        raise ValueError(
            f'Fabric(accelerator={accelerator!r}) cannot run under XLAStrategy: pass accelerator="tpu", or '
            'accelerator="cpu" to try a program out'
        )
    asked = ACCELERATORS.get(accelerator)
    if vendor.DEVICE not in os.environ and asked is not None and not vendor.is_started():
        if asked == "TPU" and not vendor.tpu_chips():
            raise ValueError(
                'Fabric(accelerator="tpu"): there is no TPU here; accelerator="cpu", strategy="xla" tries a program out'
            )
        return asked
    found = vendor.hardware()
    if asked not in (None, found):
        how = f"{vendor.DEVICE}={os.environ.get(vendor.DEVICE, found)}"
        raise ValueError(
            f"Fabric(accelerator={accelerator!r}) needs the XLA runtime on {asked}, and this process has {how}: unset "
            f"{vendor.DEVICE}, which importing torch_xla sets, too, or leave accelerator out"
        )
    if found not in ACCELERATORS.values():
        raise ValueError(
            f"XLAStrategy knows {' and '.join(ACCELERATORS.values())}, and this process has {vendor.DEVICE}={found}"
        )
    return found


def _here(hardware: str) -> int | None:
    """Returns how many devices this process has; None: as many as are asked for, once it is restarted."""
    if hardware == "CPU" and not vendor.is_started():
        text = os.environ.get(vendor.CPU_DEVICES)
        if text is not None and not (text.isdigit() and int(text)):
            raise ValueError(f"the environment has {vendor.CPU_DEVICES}={text!r}: expected a number of devices")
        return None if text is None else int(text)
    return vendor.device_count()


def _count(devices: int | str | Sequence[int], here: int | None, hardware: str) -> int:
    call = f"Fabric(devices={devices!r})"
    if devices == "auto":
        return here or 1
    if isinstance(devices, (list, tuple)) and devices and all(type(index) is int for index in devices):
        if list(devices) != list(range(len(devices))):
            raise ValueError(f"{call}: XLA's devices are taken from the first on: pass devices={len(devices)}")
        devices = len(devices)
    if type(devices) is not int:
        raise ValueError(f'{call}: expected "auto", a number of devices, or a list of device indices')
    if devices < 1:
        raise ValueError(f"{call}: expected at least 1")
    if hardware == "TPU" and devices not in (1, here):
        raise ValueError(f"{call}: this process has {here} TPU devices, and SPMD takes all of them: pass 1 or {here}")
    return devices


def _too_late(devices: object, here: int | None) -> str:
    if vendor.is_started():
        why = (
            f"the XLA runtime of this process has started with {here} CPU device{'s' if here != 1 else ''}, and stays "
            "so: call Fabric and fabric.launch() before anything uses XLA, or start the process with "
            f"{vendor.CPU_DEVICES}={devices}"
        )
    else:
        why = f"the environment has {vendor.CPU_DEVICES}={here}, and SPMD takes all devices: pass devices={here}"
    return f"Fabric(devices={devices!r}): {why}"
