"""Reads torchrun's environment variables, and makes the process group: how a process joins the others of its run."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_LET_GO = 0.1
"""Seconds that a process waits at its end. gloo's threads let go of the last collective's tensors some time after it is
done, and need the interpreter for that: one that is going away aborts the process (exit code -6, one run in a hundred
on a busy machine). Ending the group does not help: torch's DDP keeps it alive."""


@dataclass(frozen=True)
class Ranks:
    """This process's number in the run and on its node, and how many processes there are of both."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Returns what torchrun, or a launcher that sets its variables, says of this process; None: no launcher.

    Raises:
        ValueError: some of RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT without the others, or numbers that cannot be.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ValueError(
            f"the environment has torchrun's variables, but not {', '.join(missing)}: start with torchrun, or unset "
            f"{', '.join(name for name in needed if name in environment)}"
        )
    rank, world_size = (_number(environment, name) for name in needed[:2])
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)
    local_rank = _number(environment, "LOCAL_RANK", rank % max(local_world_size, 1))
    ranks = Ranks(rank, local_rank, world_size, local_world_size)
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ValueError(f"torchrun's variables contradict each other: {ranks}")
    return ranks


_BACKENDS = {"cpu": "gloo", "mps": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
_GLOO = dist.Backend.backend_capability[dist.Backend.GLOO]


def backend_for(device: torch.device) -> str | None:
    """Returns the backend of torch.distributed for processes on such devices; None: torch's own choice.

    That choice is the accelerator's backend alone wherever the machine has one, in which no tensor on the CPU can be
    reduced, gathered or broadcast: neither those of a run on the CPU, nor a checkpoint's.
    """
    return _BACKENDS.get(device.type)


def bound_device(device: torch.device, backend: str | None) -> torch.device | None:
    """Returns the `device_id` for `init_process_group`: the device, where `backend` is made for its kind.

    With it nccl connects at once, and `barrier` does not guess the device, of which it warns. A backend that takes such
    tensors by way of the CPU, as gloo does, is not bound; nor is one to devices that gloo does not know (xpu), since
    every later group is for the bound device too, that for saves in the background among them.
    """
    own = dist.Backend.default_device_backend_map.get(device.type)
    is_own = own != dist.Backend.GLOO and own in re.split("[:,]", str(backend or own).lower())
    return device if is_own and device.index is not None and device.type in _GLOO else None


def join(ranks: Ranks, device: torch.device, backend: str | None, timeout: timedelta | None) -> bool:
    """Joins the other processes; returns whether a process group was made for it, False where there was one.

    `backend` None is `backend_for(device)`.

    Raises:
        RuntimeError: there is a process group of another size, or torch cannot make one.
    """
    if device.type not in ("cpu", "mps"):
        torch.get_device_module(device).set_device(device)
    if dist.is_initialized():
        if dist.get_world_size() != ranks.world_size:
            raise RuntimeError(
                f"there is a process group of {dist.get_world_size()} already, and Fabric was asked for "
                f"{ranks.world_size} processes"
            )
        return False
    store = _store_for(ranks, timeout)
    backend = backend_for(device) if backend is None else backend
    dist.init_process_group(
        backend,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=bound_device(device, backend),
    )
    _wait_for_all(store, ranks)
    atexit.register(time.sleep, _LET_GO)
    return True


def _wait_for_all(store: dist.Store, ranks: Ranks) -> None:
    """Returns once all ranks have joined: one that leaves at once breaks the connections that others still make."""
    if store.add("joined", 1) == ranks.world_size:
        store.set("all have joined", "")
    store.wait(["all have joined"])


_stores: dict[tuple[object, ...], tuple[dist.Store, Iterator[int]]] = {}


def _store_for(ranks: Ranks, timeout: timedelta | None) -> dist.Store:
    """Returns a store of this group's own, in one that the process makes once.

    A second group on a store of the same names, or at an address that the first is about to leave, finds what is left
    of the first one on a rank that is later: both wait for ever.
    """
    if ranks.world_size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    key = (os.getpid(), ranks, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    if key not in _stores:
        options = {} if timeout is None else {"timeout": timeout}
        store, *_ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, **options))
        _stores[key] = store, itertools.count()
    store, numbers = _stores[key]
    return dist.PrefixStore(f"precision_core/{next(numbers)}", store)


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"the environment has {name}={text!r}: expected a number")
    return int(text)
