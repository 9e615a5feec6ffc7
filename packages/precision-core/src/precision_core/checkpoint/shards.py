"""Tensors that are not one block of memory: DTensors (each rank has a shard), and subclasses that wrap other tensors.

Under a strategy that shards, parameters and optimizer state are DTensors. Values are loaded into CPU memory first, as
DTensors of the same sharding, in the dtype that they were saved in. Subclasses that cannot be deep-copied, such as
torchao's quantised optimizer states, are copied by the tensors that `__tensor_flatten__` names.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.tree import KeyPath, map_leaves
from precision_core.policy.casting import map_tensors

Described = list[tuple[Any, ...]]


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether `tensor` is a DTensor, without importing that class (over a second)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Whether `tensor` is a subclass that wraps other tensors (`__tensor_flatten__`), DTensor excepted."""
    return hasattr(type(tensor), "__tensor_flatten__") and not is_sharded(tensor)


def cpu_like(live: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised CPU tensor with the shape of `live`; a DTensor of the same sharding if that is one."""
    return torch.empty_like(live.detach(), dtype=dtype, device="cpu")


def cut(full: Tensor, live: Tensor) -> Tensor:
    """Returns `full` as a DTensor sharded like the DTensor `live`, with a copy of this rank's shard in CPU memory.

    The result keeps the dtype of `full`; both have the same full shape.
    """
    sharded = cpu_like(live, full.dtype)
    local, offsets = local_part(sharded)
    if local.numel():
        for dim, (offset, size) in enumerate(zip(offsets, local.shape, strict=True)):
            full = full.narrow(dim, offset, size)
        local.copy_(full)
    return sharded


def local_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Returns this rank's shard (the tensor itself, if not sharded), and its offsets in the full tensor."""
    if not is_sharded(tensor):
        return tensor, [0] * tensor.dim()
    sharded: Any = tensor
    local: Tensor = sharded.to_local()
    return local, list(sharded.__create_chunk_list__()[0].offsets) if local.numel() else [0] * tensor.dim()


def unsharded(content: dict[str, Any], keep: bool) -> dict[str, Any]:
    """Returns `content` with every DTensor gathered into a full tensor on the CPU if `keep`, else with None for each.

    Tensors are gathered one at a time, so that a rank without `keep` holds one at most. All ranks of the DTensors'
    meshes call this, with the same tensors.
    """
    problem: Exception | None = None

    def take(_: KeyPath, leaf: Any) -> Any:
        nonlocal problem
        if not isinstance(leaf, Tensor) or not is_sharded(leaf):
            return leaf
        on_mesh: Any = leaf.detach().to(leaf.device_mesh.device_type)  # type: ignore[attr-defined]  # a CPU offload's
        full = _gathered(on_mesh)
        try:
            return full.to("cpu") if keep and problem is None else None
        except Exception as error:  # the other ranks go on gathering, so this one must
            problem = error

    gathered = map_leaves(content, take)
    if problem is not None:
        raise problem
    return gathered


def _gathered(sharded: Any) -> Tensor:
    """Returns the full tensor; int16, which no backend of torch sends, goes as bfloat16, bit for bit."""
    if sharded.dtype is not torch.int16:
        full: Tensor = sharded.full_tensor()
        return full
    sent: Any = torch.empty_like(sharded, dtype=torch.bfloat16)
    sent.to_local().copy_(sharded.to_local().view(torch.bfloat16))
    gathered: Tensor = sent.full_tensor()
    return gathered.view(torch.int16)


def check_parts(tensors: dict[str, Tensor]) -> None:
    """Raises `ValueError` for DTensors whose shards wrap other tensors: they cannot be sharded anew later."""
    for name, tensor in tensors.items():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        if is_wrapper_subclass(local):
            raise ValueError(
                f"cannot save {name}: shards of a {type(local).__name__} cannot be read again. Leave that object out "
                "of `state`, use an optimizer whose state is plain tensors (torch.optim.AdamW), or a strategy that "
                "does not shard"
            )


def describe(tensors: dict[str, Tensor]) -> Described:
    """Returns names, types, shapes and dtypes: what must be equal on all ranks that write together."""
    return [(name, type(tensor).__name__, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def check_alike(described: list[Described]) -> None:
    """Raises `CheckpointError` unless all ranks' descriptions are equal; names the tensors that differ."""
    for rank, theirs in enumerate(described):
        if theirs != described[0]:
            differ = sorted(str(item[0]) for item in set(theirs) ^ set(described[0])) or ["their order"]
            raise CheckpointError(f"cannot save: ranks 0 and {rank} have different tensors: {', '.join(differ[:10])}")


# ---------------------------------------------------------------- copies


def copy_of(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Returns a deep copy; a subclass that has none is copied by its inner tensors, onto `device` (None: their own)."""
    if not is_wrapper_subclass(tensor):
        return copy.deepcopy(tensor)
    try:
        return copy.deepcopy(tensor)
    except (NotImplementedError, RuntimeError, TypeError):
        kind: Any = type(tensor)
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(tensor, name).detach().to(device, copy=True) for name in names}
        made: Tensor = kind.__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
        return made.requires_grad_(tensor.requires_grad)


def deep_copied(tree: Any, memo: dict[int, Any] | None = None, device: torch.device | str | None = None) -> Any:
    """Returns `copy.deepcopy(tree, memo)`, also where it holds subclasses that `copy_of` has to copy."""
    copies = {} if memo is None else memo

    def keep(tensor: Tensor) -> Tensor:
        if is_wrapper_subclass(tensor) and id(tensor) not in copies:
            copies[id(tensor)] = copy_of(tensor, device)
        return tensor

    map_tensors(tree, keep)
    return copy.deepcopy(tree, copies)
