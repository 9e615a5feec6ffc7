"""Shards: the part of a saved tensor that belongs to this rank, and whole tensors made of all ranks' parts.

A model under a strategy that shards has DTensors for parameters, and its optimizer DTensors for state. What is loaded
is brought into host memory as DTensors of the same sharding first, in the dtype that it was saved in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.tensors import is_made_of_parts, is_sharded
from precision_core.checkpoint.tree import Path, map_leaves

Described = list[tuple[Any, ...]]


def host_like(live: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an empty tensor in host memory: of the shape of `live`, and this rank's shards where it is a DTensor."""
    return torch.empty_like(live.detach(), dtype=dtype, device="cpu")


def cut(whole: Tensor, live: Tensor) -> Tensor:
    """Returns `whole` sharded as `live` is: a DTensor with a copy of this rank's part in host memory."""
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
    """Returns `content` with every DTensor as a whole tensor on the CPU, where `keep`; elsewhere with nothing of them.

    One tensor after the other is gathered, so that a rank that does not keep them never holds two. All ranks of the
    DTensors' meshes call it, with the same ones.
    """
    problem: Exception | None = None

    def take(_: Path, leaf: Any) -> Any:
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
