"""Tensors that are more than one block of memory: DTensors, of which each rank has a shard, and subclasses of parts.

A model under a strategy that shards has DTensors for parameters, and its optimizer DTensors for state. What is loaded
is brought into CPU memory as DTensors of the same sharding first, in the dtype that it was saved in. Subclasses without
a `clone`, as torchao's quantised optimizer states are, are copied by the parts that they flatten to for torch.compile;
any other knows how it is copied.
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
    """Returns whether it is a DTensor, without the import of that class, which takes over a second."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_made_of_parts(tensor: Tensor) -> bool:
    """Whether a tensor has no memory of its own, but is a wrapper around other tensors; a DTensor does not count."""
    return hasattr(type(tensor), "__tensor_flatten__") and not is_sharded(tensor)


def host_like(live: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an empty tensor in CPU memory: of the shape of `live`, and this rank's shards where it is a DTensor."""
    return torch.empty_like(live.detach(), dtype=dtype, device="cpu")


def cut(whole: Tensor, live: Tensor) -> Tensor:
    """Returns `whole` sharded as `live` is: a DTensor with a copy of this rank's part in CPU memory."""
    sharded = host_like(live, whole.dtype)
    local, offsets = local_part(sharded)
    if local.numel():
        for dim, (offset, size) in enumerate(zip(offsets, local.shape, strict=True)):
            whole = whole.narrow(dim, offset, size)
        local.copy_(whole)
    return sharded


def local_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Returns what this rank has of a tensor, all of one that is not sharded, and at which index it begins."""
    if not is_sharded(tensor):
        return tensor, [0] * tensor.dim()
    sharded: Any = tensor
    local: Tensor = sharded.to_local()
    return local, list(sharded.__create_chunk_list__()[0].offsets) if local.numel() else [0] * tensor.dim()


def made_whole(content: dict[str, Any], keep: bool) -> dict[str, Any]:
    """Returns `content` with every DTensor unsharded on the CPU, where `keep`; elsewhere with nothing of them.

    One tensor after the other is gathered, so that a rank that does not keep them never holds two. All ranks of the
    DTensors' meshes call it, with the same ones.
    """
    problem: Exception | None = None

    def take(_: KeyPath, leaf: Any) -> Any:
        nonlocal problem
        if not isinstance(leaf, Tensor) or not is_sharded(leaf):
            return leaf
        on_mesh: Any = leaf.detach().to(leaf.device_mesh.device_type)  # type: ignore[attr-defined]  # a CPU offload's
        whole = on_mesh.full_tensor()
        try:
            return whole.to("cpu") if keep and problem is None else None
        except Exception as error:  # the others gather on, so this rank does
            problem = error

    whole = map_leaves(content, take)
    if problem is not None:
        raise problem
    return whole


def check_parts(tensors: dict[str, Tensor]) -> None:
    """Raises `ValueError` for DTensors whose shards are made of parts, which no checkpoint can cut or put together."""
    for name, tensor in tensors.items():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        if is_made_of_parts(local):
            raise ValueError(
                f"cannot save {name}: shards of a {type(local).__name__} cannot be read again. Leave that object out "
                "of `state`, take an optimizer whose state is plain tensors (torch.optim.AdamW), or a strategy that "
                "shards nothing"
            )


def describe(tensors: dict[str, Tensor]) -> Described:
    """Returns what must be the same on all ranks that write together."""
    return [(name, type(tensor).__name__, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def check_alike(described: list[Described]) -> None:
    """Raises `CheckpointError` unless all ranks' descriptions are the same; names the tensors that differ."""
    for rank, theirs in enumerate(described):
        if theirs != described[0]:
            differ = sorted(str(item[0]) for item in set(theirs) ^ set(described[0])) or ["their order"]
            raise CheckpointError(f"cannot save: ranks 0 and {rank} have different tensors: {', '.join(differ[:10])}")


# ---------------------------------------------------------------- copies


def copy_of(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Returns a copy, by parts where the subclass has no way of its own; these on `device`, None: where they are."""
    if not is_made_of_parts(tensor):
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
    """Returns `copy.deepcopy(tree, memo)`, which such subclasses would fail."""
    copies = {} if memo is None else memo

    def keep(tensor: Tensor) -> Tensor:
        if is_made_of_parts(tensor) and id(tensor) not in copies:
            copies[id(tensor)] = copy_of(tensor, device)
        return tensor

    map_tensors(tree, keep)
    return copy.deepcopy(tree, copies)
