"""Layout: how many processes a run has, and which device this one drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from precision_core.devices import choose_indices, choose_type, device_of
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
            f"launch with torchrun --nproc-per-node={len(indices)} --nnodes={num_nodes}"
        )
    return Layout(device_type, indices, nodes, ranks, asked=devices != "auto")
