"""Layout: the elements of a tensor in the order of its memory, so that a piece is a slice.

A sharded tensor (DTensor) is stepped as its local shard: what is cut into pieces needs no other rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, any other tensor detached; it shares memory and version with `tensor`."""
    if type(tensor) is Tensor and not tensor.requires_grad:
        return tensor
    value: Any = tensor.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def is_dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, without gaps or overlaps, in whatever order."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def flat(tensor: Tensor) -> Tensor:
    """Returns a view of a dense tensor that has one dimension, in the order of memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def dense(tensor: Tensor) -> Tensor:
    """Returns `tensor`, or where it has gaps or overlaps a dense copy, in the order that `torch.empty_like` has."""
    return tensor if is_dense(tensor) else torch.empty_like(tensor).copy_(tensor)


def alike(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns `tensor`, or a copy of it, whose elements are in the order of the dense `like`, of the same shape."""
    if tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous()):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same numbers in memory; asks no address, which a FakeTensor has not."""
    storages = (each.untyped_storage()._cdata for each in (one, other))
    same_place = len({*storages}) == 1 and one.storage_offset() == other.storage_offset()
    return same_place and one.dtype is other.dtype


def local_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Returns this rank's shard (the tensor itself, if not sharded), and its offsets in the full tensor."""
    if not hasattr(tensor, "to_local"):
        return tensor, [0] * tensor.dim()
    sharded: Any = tensor
    part: Tensor = sharded.to_local()
    return part, _offsets(sharded) if part.numel() else [0] * tensor.dim()


def _offsets(sharded: Any) -> list[int]:
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = sharded.device_mesh, sharded.placements
    if any(type(each) not in (Replicate, Shard) for each in placements):
        return list(sharded.__create_chunk_list__()[0].offsets)
    # As torch.chunk cuts, one dimension of the mesh after the other. torch's own function reads a tensor for it.
    offsets, sizes = [0] * sharded.dim(), list(sharded.shape)
    for placement, count, place in zip(placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if isinstance(placement, Shard):
            chunk = -(-sizes[placement.dim] // count)
            start = min(chunk * place, sizes[placement.dim])
            offsets[placement.dim] += start
            sizes[placement.dim] = min(chunk, sizes[placement.dim] - start)
    return offsets


def sharded_like(param: Tensor, full: Tensor) -> Tensor:
    """Returns `full`, or this rank's shard of it where `param` is a DTensor, sharded as that is."""
    if not hasattr(param, "to_local"):
        return full
    sharded = torch.empty_like(param.detach(), dtype=full.dtype)
    part, offsets = local_part(sharded)
    if part.numel():
        for dim, (offset, size) in enumerate(zip(offsets, part.shape, strict=True)):
            full = full.narrow(dim, offset, size)
        part.copy_(full)
    return sharded
