"""Forked processes that run one function after another, each as its rank."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

Outcome = tuple[str, Any, float]
"""(returned, skipped, raised, died or late; the value or the reason; the rank's CPU seconds so far)."""

CLEANUPS: list[Callable[[], None]] = []
"""Functions that ranks call after each job, before their process group is destroyed: for engines with more state."""


@dataclass
class Job:
    """A function with its arguments, and the caller's state that ranks take over."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    environment: dict[str, str]
    folder: str
    filters: Sequence[Any]
    generators: dict[str, Any]

    def run(self, rank: int) -> tuple[str, Any]:
        """Runs it as this rank, and returns the outcome's kind and value."""
        os.environ.clear()
        os.environ.update(self.environment, RANK=str(rank), LOCAL_RANK=str(rank))
        os.chdir(self.folder)
        torch.set_num_threads(1)
        torch.set_rng_state(self.generators["torch"])
        random.setstate(self.generators["random"])
        if "numpy" in self.generators:
            sys.modules["numpy"].random.set_state(self.generators["numpy"])
        try:
            with warnings.catch_warnings():
                warnings.filters[:] = self.filters  # type: ignore[index]
                return "returned", self.function(*self.args)
        except pytest.skip.Exception as skip:
            return "skipped", str(skip)
        except BaseException:
            return "raised", traceback.format_exc()


class Forks:
    """`count` processes, forked now: with the first job, which need not pickle then, or to wait for one."""

    def __init__(self, count: int, job: Job | None = None) -> None:
        self.count, self.cpu_seconds = count, 0.0
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(count)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [context.Process(target=_live, args=(rank, pipes, job)) for rank in range(count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking where there are threads
            for process in self._processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()

    def send(self, job: bytes) -> None:
        """Sends a pickled job to all of them."""
        for connection in self._connections:
            connection.send_bytes(job)

    def collect(self, timeout: float) -> list[Outcome]:
        """Returns each rank's outcome. After a failure the others get five more seconds."""
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        while len(outcomes) < self.count:
            waiting = [connection for rank, connection in enumerate(self._connections) if rank not in outcomes]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    kind, value, seconds = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                    outcomes[rank] = (kind, pickle.loads(value), seconds)
                except (EOFError, ConnectionResetError):
                    outcomes[rank] = ("died", self._how_it_died(rank), 0.0)
                if outcomes[rank][0] != "returned":
                    deadline = min(deadline, time.monotonic() + 5)
        late = ("late", f"not done: killed after another rank failed, or after {timeout:.0f} s", 0.0)
        return [outcomes.get(rank, late) for rank in range(self.count)]

    def _how_it_died(self, rank: int) -> str:
        self._processes[rank].join(5)
        code = self._processes[rank].exitcode
        return f"it died without a traceback: exit code {code}, of signal N where it is -N"

    def clean(self) -> None:
        """Tells them to clean up, now that all have returned: before, one may need another's store."""
        for connection in self._connections:
            connection.send_bytes(b"clean")

    def is_clean(self, timeout: float) -> bool:
        """Whether all of them have cleaned up, for which they get `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            return all(
                connection.poll(max(0.0, deadline - time.monotonic())) and connection.recv_bytes() == b"clean"
                for connection in self._connections
            )
        except (EOFError, ConnectionResetError):
            return False

    def kill(self) -> None:
        """Ends them, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()


def _live(rank: int, pipes: list[tuple[Connection, Connection]], job: Job | None) -> None:
    gc.freeze()  # what the forked process left to the collector is its own: groups whose threads are not here crash
    connection = pipes[rank][1]
    for number, (theirs, ours) in enumerate(pipes):  # else this process would keep itself from seeing its end
        theirs.close()
        if number != rank:
            ours.close()
    code = 1
    try:
        while True:
            if job is None:
                job = pickle.loads(connection.recv_bytes())
            kind, value = job.run(rank)
            job = None
            try:  # send() would share tensors' memory, which ends with this process
                value = pickle.dumps(value)
            except Exception:
                kind, value = "raised", pickle.dumps(traceback.format_exc())
            connection.send_bytes(pickle.dumps((kind, value, time.process_time())))
            if kind != "returned":
                break
            connection.recv_bytes()  # others may need it until then, for the store of the process group
            _clean()
            connection.send_bytes(b"clean")
        code = 0
    except EOFError:  # the process that forked this one has ended, or closed its end
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # what is registered to run at exit belongs to the process that was forked


def _clean() -> None:
    groups = list(dist.distributed_c10d._world.pg_map)
    for cleanup in CLEANUPS:
        cleanup()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    gc.collect()
    # last, and from here: where torch's DDP is the last to hold a group, its end waits for gloo's threads, and they for
    # the interpreter, which it does not let go meanwhile
    del groups
