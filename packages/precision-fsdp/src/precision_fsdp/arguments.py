"""Arguments: what `FSDPStrategy` is given is checked when it is made, and its mesh when the processes are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_MESH_NAMES = ("replicate", "shard")

_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "reshard_after_forward": (
        lambda given: isinstance(given, bool) or (type(given) is int and given > 0),
        "expected True, False, or a number of processes",
    ),
    "cpu_offload": (lambda given: isinstance(given, bool), "expected True or False"),
    "state_dict_type": (lambda given: given in ("sharded", "full"), "allowed are sharded, full"),
    "init_fn": (lambda given: given is None or callable(given), "expected a function of a module, or None"),
    "backend": (
        lambda given: given is None or isinstance(given, str),
        'expected a name such as "gloo" or "nccl", or None',
    ),
    "timeout": (
        lambda given: given is None or (isinstance(given, timedelta) and given > timedelta(0)),
        "expected datetime.timedelta(seconds=...), or None",
    ),
    "mesh": (
        lambda given: given is None or _is_shape(given.shape if isinstance(given, DeviceMesh) else given),
        "expected a DeviceMesh of one or two dimensions, or its shape: (replicas, shards)",
    ),
}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for an argument that is not what is expected of its name."""
    for name, value in given.items():
        is_right, expected = _EXPECTED[name]
        if not is_right(value):
            raise ValueError(f"FSDPStrategy({name}={value!r}): {expected}")


def make_mesh(given: DeviceMesh | tuple[int, ...] | None, device: torch.device, world_size: int) -> DeviceMesh:
    """Returns the mesh of all processes; raises `ValueError` when what was given is not of them, or of the device."""
    mesh = (world_size,) if given is None else given
    if isinstance(mesh, tuple):
        if math.prod(mesh) != world_size:
            raise ValueError(f"FSDPStrategy(mesh={mesh}) is for {math.prod(mesh)} processes, not {world_size}")
        return init_device_mesh(device.type, mesh, mesh_dim_names=_MESH_NAMES[-len(mesh) :])
    if mesh.device_type != device.type:
        raise ValueError(f"FSDPStrategy(mesh=...) is of {mesh.device_type} devices, the run is on {device}")
    ranks = sorted(mesh.mesh.flatten().tolist())
    if ranks != list(range(world_size)):
        raise ValueError(
            f"FSDPStrategy(mesh=...) is of the processes {ranks}, the run has {world_size}: those left out would train "
            "models of their own"
        )
    return mesh


def check_reshard(given: bool | int, mesh: DeviceMesh) -> None:
    """Raises `ValueError` for a number of processes among which the shards of `mesh` cannot be gathered."""
    shards = mesh.shape[-1]
    if not isinstance(given, bool) and shards % given:
        raise ValueError(f"FSDPStrategy(reshard_after_forward={given}): {shards} shards do not divide into {given}")


def _is_shape(sizes: Any) -> bool:
    return isinstance(sizes, tuple) and len(sizes) in (1, 2) and all(type(size) is int and size > 0 for size in sizes)
