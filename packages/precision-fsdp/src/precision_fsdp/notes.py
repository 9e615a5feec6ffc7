"""Notes: what FSDPStrategy did with a model, for the report of its precision."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from precision_core.policy import dtype_name
from precision_fsdp.groups import Group


def notes_of(module: nn.Module, groups: list[Group], mesh: DeviceMesh, recomputed: int) -> list[str]:
    """Returns a line on processes, groups and bytes, and one for each group beside its block's own."""
    kinds = Counter(type(group.modules[0]).__name__ for group in groups if group.name and not group.beside)
    made = [f"{count} of {kind.removeprefix('FSDP')}" for kind, count in kinds.items()] + ["the rest in the root"]
    size = sum(param.to_local().nbytes for param in module.parameters() if isinstance(param, DTensor))
    world = f"{mesh.size()} processes" if mesh.size() > 1 else "one process, nothing is divided"
    if mesh.ndim == 2:
        world += " in {} replicas of {} shards".format(*mesh.shape)
    notes = [f"fsdp: {world}: {len(groups)} groups, {', '.join(made)}; {size:,} bytes of parameters here"]
    notes += [
        f"fsdp: {', '.join(group.names)} in a group beside {group.name or 'the root'}'s own, "
        f"gathered in {dtype_name(group.casts.gathered or group.casts.stored)}"
        for group in groups
        if group.beside
    ]
    if recomputed:
        notes.append(f"fsdp: {recomputed} blocks compute their activations again in backward")
    return notes
