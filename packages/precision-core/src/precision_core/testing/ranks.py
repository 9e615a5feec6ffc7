"""Ranks: runs a function in several processes of this machine, forked from this one, so that nothing has to pickle."""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import random
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from precision_core.testing.forks import Forks, Job


class RankError(AssertionError):
    """A rank failed, or did not finish in time; the message has every failed rank's traceback."""


class Pools:
    """Ranks that are kept for the next function, by their number; none if `key` is None, which is the default.

    A new rank costs a fork and torch's first computation: 0.2 CPU seconds and up to half a second of waiting. Between
    two functions the process group is destroyed, and environment, folder, warnings and random generators are set to
    the caller's. Other state that a function leaves behind stays, so kept ranks are opt-in.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self._kept: dict[int, Forks] = {}
        self._ends_with_process = False
        self.cpu_seconds = 0.0
        """CPU seconds of kept ranks that this process's own times do not include yet."""

    def choose(self, key: str | None) -> None:
        """Runs the next functions in ranks kept under `key` (None: in new ones). Ranks of another key are ended."""
        if key != self.key and key is not None and self._kept:
            self.close()
        self.key = key

    def take(self, count: int) -> Forks:
        """Returns `count` waiting ranks; they belong to the caller until `give_back`."""
        kept = self._kept.pop(count, None)
        if kept is not None and not kept.is_clean(timeout=20.0):
            self.let_go(kept)
            kept = None
        return kept or Forks(count)

    def give_back(self, forks: Forks, cpu_seconds: float) -> None:
        """Keeps ranks that have all returned, with their CPU seconds so far in total; they clean up meanwhile."""
        self.cpu_seconds += cpu_seconds - forks.cpu_seconds
        forks.cpu_seconds = cpu_seconds
        if not self._ends_with_process:
            atexit.register(self.close)  # before multiprocessing, which would wait for them
            self._ends_with_process = True
        forks.clean()
        self._kept[forks.count] = forks

    def let_go(self, forks: Forks) -> None:
        """Ends ranks that were taken, or kept."""
        forks.kill()
        self.cpu_seconds -= forks.cpu_seconds  # now it is in this process's times of children

    def close(self) -> None:
        """Ends all kept ranks."""
        while self._kept:
            self.let_go(self._kept.popitem()[1])


POOLS = Pools()


def run_in_ranks(count: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Runs `function(*args)` on `count` ranks, with torchrun's environment, and returns the results in rank order.

    Results must pickle. CPU only: CUDA cannot be forked once it is in use.

    Raises:
        RankError: a rank raised, died, or did not finish within `timeout` seconds; all are killed then.
        RuntimeError: this process has a process group, which forked ranks would use as theirs.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "run_in_ranks: this process has a process group, and forked ranks would use it as theirs. Find what made "
            "it (an earlier test?), and end it: fabric.teardown(), or run that in ranks too"
        )
    importlib.import_module("torch._dynamo")  # DDP imports it: 4 seconds that each rank would spend anew

    job = _job(count, function, args)
    payload = _pickled(job) if POOLS.key is not None else None
    forks = Forks(count, job) if payload is None else POOLS.take(count)
    kept = False
    try:
        if payload is not None:
            forks.send(payload)
        outcomes = forks.collect(timeout)
        if payload is not None and all(kind == "returned" for kind, _, _ in outcomes):
            POOLS.give_back(forks, sum(seconds for _, _, seconds in outcomes))
            kept = True
    finally:
        if not kept:
            POOLS.let_go(forks)
    skipped = [value for kind, value, _ in outcomes if kind == "skipped"]
    if skipped:
        pytest.skip(skipped[0])
    failed = [
        f"rank {rank} of {count}:\n{value}" for rank, (kind, value, _) in enumerate(outcomes) if kind != "returned"
    ]
    if failed:
        raise RankError("\n".join(failed))
    return [value for _, value, _ in outcomes]


def _job(count: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Job:
    """Returns the function with the state of this process that a forked one would have."""
    generators: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if "numpy" in sys.modules:
        generators["numpy"] = sys.modules["numpy"].random.get_state()
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return Job(function, args, environment, os.getcwd(), list(warnings.filters), generators)


def _pickled(job: Job) -> bytes | None:
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError):  # a closure, or an argument that is bound to this process
        return None


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
