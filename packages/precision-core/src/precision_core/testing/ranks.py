"""Ranks: a function in several processes of this machine, forked from this one, so that nothing has to pickle."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch


class RankError(AssertionError):
    """A rank failed, or did not come to its end in time; holds every rank's traceback."""


def run_in_ranks(count: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Returns what `function(*args)` returns on each of `count` ranks, in an environment as torchrun makes it.

    The results must pickle. On the CPU only: CUDA cannot be forked once it is in use.

    Raises:
        RankError: a rank raised, died, or was not done within `timeout` seconds; all of them are killed then.
    """
    importlib.import_module("torch._dynamo")  # DDP imports it: 4 seconds that each rank would spend anew

    context = multiprocessing.get_context("fork")
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(_free_port())
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, environment, pipes[rank][1], function, args)) for rank in range(count)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking where there are threads
        for process in processes:
            process.start()
    for _, sender in pipes:
        sender.close()
    try:
        outcomes = _collect([receiver for receiver, _ in pipes], time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    skipped = [value for kind, value in outcomes if kind == "skipped"]
    if skipped:
        pytest.skip(skipped[0])
    outcomes = [
        (kind, f"{value}: exit code {process.exitcode}, of signal N where it is -N" if kind == "died" else value)
        for process, (kind, value) in zip(processes, outcomes, strict=True)
    ]
    failed = [f"rank {rank} of {count}:\n{value}" for rank, (kind, value) in enumerate(outcomes) if kind != "returned"]
    if failed:
        raise RankError("\n".join(failed))
    return [value for _, value in outcomes]


def _collect(receivers: list[Connection], deadline: float, timeout: float) -> list[tuple[str, Any]]:
    """Returns each rank's outcome. After the first failure the others get five seconds: they wait for it in vain."""
    outcomes: dict[int, tuple[str, Any]] = {}
    while len(outcomes) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in outcomes]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                outcomes[rank] = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                outcomes[rank] = ("died", "it died without a traceback")
            if outcomes[rank][0] != "returned":
                deadline = min(deadline, time.monotonic() + 5)
    late = ("late", f"not done: killed after another rank failed, or after {timeout:.0f} s")
    return [outcomes.get(rank, late) for rank in range(len(receivers))]


def _run(
    rank: int, environment: dict[str, str], sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # what the forked process left to the collector is its own: groups whose threads are not here crash
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        outcome: tuple[str, Any] = ("returned", function(*args))
    except pytest.skip.Exception as skip:
        outcome = ("skipped", str(skip))
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))  # send() would share tensors' memory, which ends with this process
    sender.close()
    if outcome[0] == "returned":  # others may need it still, for the store of the process group; it is killed with them
        time.sleep(60)
    os._exit(0)  # what is registered to run at exit belongs to the process that was forked


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
