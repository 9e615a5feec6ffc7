"""Layout: where a shard lies, without a read."""

from __future__ import annotations

from typing import Any

import torch

from precision_core.precision.update.layout import local_part
from precision_core.testing import run_in_ranks

SHAPES = [(7, 5), (4, 4), (3, 1), (1, 6), (9, 2)]


def found(dims: tuple[int, int]) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo") if not torch.distributed.is_initialized() else None
    mesh = init_device_mesh("cpu", dims)
    wrong = []
    for shape in SHAPES:
        full = torch.arange(shape[0] * shape[1]).view(shape)
        for placements in ([Shard(0), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Shard(1)]):
            part, offsets = local_part(distribute_tensor(full, mesh, placements))
            if part.numel() and not torch.equal(part, _at(full, offsets, part)):
                wrong.append((shape, placements, offsets))
    return wrong


def _at(full: torch.Tensor, offsets: list[int], part: torch.Tensor) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, part.shape, strict=True)):
        full = full.narrow(dim, offset, size)
    return full


def test_a_shards_offsets_are_where_its_elements_are() -> None:
    assert run_in_ranks(4, found, (2, 2)) == [[]] * 4
