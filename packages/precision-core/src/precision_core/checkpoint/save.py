"""What Fabric.save does: the user's state, the precision's and the random generators', in one file.

A strategy that shards writes a folder instead, all ranks together; otherwise rank zero alone writes. It has the random
generators and loader positions of every rank; whatever else is not sharded is rank zero's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from precision_core.checkpoint import background
from precision_core.checkpoint.agreement import agreed, gather_over, together
from precision_core.checkpoint.arrival import Arrival
from precision_core.checkpoint.background import PendingSave
from precision_core.checkpoint.error import FORMAT_VERSION, RESERVED
from precision_core.checkpoint.live.optimizer_names import param_names
from precision_core.checkpoint.live.state import Filter, collect, state_dtypes, stateful_objects
from precision_core.checkpoint.shards import check_alike, check_parts, describe, is_sharded, unsharded
from precision_core.checkpoint.storage import file as checkpoint
from precision_core.checkpoint.tree import map_leaves, named, paths
from precision_core.data import rng
from precision_core.data.loader import DeviceLoader
from precision_core.strategies import Strategy


def save(
    path: Path, state: dict[str, Any], filter: Filter | None, strategy: Strategy, wait: bool = True
) -> PendingSave:
    """Writes the checkpoint; see `Fabric.save`."""
    if RESERVED in state:
        raise ValueError(f"fabric.save(path, state): state is a dict without the key {RESERVED!r}")
    background.raise_unreported(strategy)
    with agreed(strategy, "save"):
        content = strategy.to_cpu(collect(state, filter))
        loaders = {key: each.state_dict() for key, each in stateful_objects(state) if isinstance(each, DeviceLoader)}
        mine = {"rng": rng.rng_state(strategy.device), "loaders": loaders}
        sharded = named(paths(content, is_sharded))
        check_parts(sharded)
        shards = describe(sharded)
        header = {
            "version": FORMAT_VERSION,
            "policy": str(strategy.precision.policy),
            "torch": str(torch.__version__),
            "precision": strategy.precision.state_dict(),
            "param_dtypes": state_dtypes(state, strategy.precision.state_dtype),
            "param_names": param_names(state),
        }
    check_alike(gather_over(strategy, shards))
    ranks = gather_over(strategy, mine)
    content = {**content, RESERVED: {**header, "rng": ranks[0]["rng"], "ranks": ranks if len(ranks) > 1 else []}}
    arrival = Arrival()
    if not wait:
        with agreed(strategy, "save"):  # raise now what can be known now
            checkpoint.check_saveable(map_leaves(content, lambda _, leaf: None if is_sharded(leaf) else leaf))
            keeps = shards or strategy.sharded or strategy.group.is_rank_zero
            content, arrival = background.copied(content if keeps else {})
    if shards and not strategy.sharded:
        arrival.wait()
        content = unsharded(content, keep=strategy.group.is_rank_zero)

    def write(group: ProcessGroup | None) -> None:
        arrival.wait()
        if strategy.sharded:
            from precision_core.checkpoint.storage.folder import write_folder  # takes seconds to import

            write_folder(path, content, process_group=group)
            return
        with agreed(strategy, "save") if group is None else together(group):
            if strategy.group.is_rank_zero:
                checkpoint.write(path, content)

    if not wait:
        return background.begin(strategy, path, write)
    write(None)
    return PendingSave(path)
