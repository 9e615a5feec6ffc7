"""Layout: how many processes a run has, and which device this one drives; `Fabric(accelerator=..., devices=...)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from precision_core.hardware import ACCELERATORS, device_count, is_available
from precision_core.policy.messages import nearest
from precision_core.strategies.processes import Ranks, ranks_from_environment


@dataclass(frozen=True)
class Layout:
    """What `Fabric(accelerator=, devices=, num_nodes=)` asks for; `ranks` None: its processes are not launched yet."""

    device_type: str
    indices: Sequence[int]
    num_nodes: int
    ranks: Ranks | None
    asked: bool = True
    """Whether the user asked for so many devices, not torchrun alone."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Environment variables with which a process of this run has to be started, and this one was not."""

    @property
    def world_size(self) -> int:
        return len(self.indices) * self.num_nodes

    @property
    def device(self) -> torch.device:
        """This process's."""
        return device_of(self.device_type, self.indices[self.ranks.local_rank if self.ranks else 0])


def make_layout(accelerator: str, devices: int | str | Sequence[int], num_nodes: int) -> Layout:
    """Returns the layout; under torchrun it is torchrun's, and one that was asked for must agree with it.

    Raises:
        ValueError: an unknown or missing accelerator, devices that do not exist, another number than torchrun's.
    """
    if type(num_nodes) is not int or num_nodes < 1:
        raise ValueError(f"Fabric(num_nodes={num_nodes!r}): expected a number of machines, 1 or more")
    device_type = choose_type(accelerator)
    ranks = ranks_from_environment()
    if ranks is None:
        indices = choose_indices(devices, device_type)
        return Layout(device_type, indices, num_nodes, Ranks() if len(indices) * num_nodes == 1 else None)
    indices = choose_indices(ranks.local_world_size if devices == "auto" else devices, device_type)
    nodes = ranks.world_size // ranks.local_world_size
    if len(indices) != ranks.local_world_size or num_nodes not in (1, nodes):
        raise ValueError(
            f"Fabric(devices={devices!r}, num_nodes={num_nodes}) does not fit how this process was launched: "
            f"{ranks.local_world_size} processes on each of {nodes} machines. Leave devices and num_nodes out, or "
            f"launch with torchrun --nproc-per-node={len(indices)} --nnodes={num_nodes} [launched-otherwise]"
        )
    return Layout(device_type, indices, nodes, ranks, asked=devices != "auto")


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
    raise ValueError(
        f"Fabric(accelerator={accelerator!r}): torch finds no {wanted} device here. Here are: {here} [no-such-device]"
    )


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
            raise ValueError(
                f"{call}: there is no {device_type} device {missing[0]}, they are 0 to {count - 1} [no-such-device]"
            )
        if len(set(devices)) < len(devices):
            raise ValueError(f"{call}: one process drives one device, so each may be named once")
        return list(devices)
    raise ValueError(f'{call}: expected "auto", a number of devices, or a list of device indices')


def device_of(device_type: str, index: int) -> torch.device:
    """Returns the device with that index; a CPU has none."""
    return torch.device(device_type) if device_type in ("cpu", "mps") else torch.device(device_type, index)
