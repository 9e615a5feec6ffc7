"""One process of several of which the others are pretended: torch's fake process group, whose collectives do nothing.

What the process allocates for them (gathered weights, buffers of gradients) is allocated all the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def pretended(devices: int) -> Iterator[None]:
    """Context in which this process is rank 0 of `devices`, as torchrun would have started it; nothing is left of it.

    Raises:
        ValueError: it is one of several already.
    """
    if dist.is_initialized() or "RANK" in os.environ:
        raise ValueError(
            f"this process is one of a run already, so it cannot pretend to be one of {devices}: estimate in a process "
            "of its own, without torchrun"
        )
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend "fake"
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody connects
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=devices)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_shardings()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _forget_shardings() -> None:
    """Empties what DTensor keeps of operations, with the mesh of the first that ran: it is equal to that of a real run.

    Tensors of a real run in this process, or in a fork of it, would have the shards of rank zero on every rank, and a
    checkpoint of them would be refused.
    """
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()
