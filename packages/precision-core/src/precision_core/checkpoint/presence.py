"""Presence: a call that all ranks must make waits for all of them, and raises where one goes on without making it.

In `if rank == 0: fabric.save(...)` the collectives of `save` would meet other collectives of the other ranks: gloo
aborts, nccl waits for its timeout. So each rank counts itself in before the first collective. A rank that waits longer
than a moment asks the others how far they are: one that is late has begun no more collectives than the asker, one that
went on has begun more, or has exited. A thread on each rank answers, and sleeps otherwise; training steps cost nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from precision_core.checkpoint.agreement import is_distributed, peer_failure_as_error
from precision_core.checkpoint.background import settle
from precision_core.checkpoint.error import CheckpointError
from precision_core.strategies import Strategy

_PATIENCE, _BETWEEN, _ANSWER = 2.0, 1.0, 5.0
"""Seconds: before a rank asks the others, between two rounds, and to wait for an answer."""
_TIME_LIMIT = timedelta(minutes=30)
"""torch's own for gloo, where the strategy has none."""


class Presence:
    """Whether all ranks make the same call; does nothing in a single process."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = weakref.ref(strategy)
        self._desk: _Desk | None = None
        if strategy.group.world_size == 1 or not is_distributed():
            return
        self._rank, self._size = strategy.group.rank, strategy.group.world_size
        self._limit = getattr(strategy, "timeout", None) or _TIME_LIMIT
        self._one_machine = strategy.group.local_world_size == strategy.group.world_size
        self._store = dist.distributed_c10d._get_default_store()
        self._desk = _Desk(_own_address(self._one_machine))
        number = self._store.add(f"presence/{self._rank}", 1)  # of this rank's Fabrics, over one store
        self._prefix = f"presence/{number}"
        self._store.set(f"{self._prefix}/{self._rank}", json.dumps(self._desk.address))
        self._addresses: dict[int, Any] = {}
        weakref.finalize(self, self._desk.close)  # at the end of the process, too

    error = CheckpointError
    """What `all_call` raises."""

    def all_call(self, call: str) -> None:
        """Waits until all ranks are in `call`, each for the same number of times.

        Raises:
            CheckpointError: another rank began other collectives, or exited; or it did not come within the timeout.
        """
        desk, strategy = self._desk, self._strategy()
        if desk is None or strategy is None:
            return
        settle(strategy)  # its thread has collectives, too
        key = f"{self._prefix}/call/{desk.calls}"
        desk.calls += 1
        try:
            with peer_failure_as_error():
                self._store.add(key, 1)
                self._wait(key, call, desk)
        except BaseException:
            desk.calls -= 1
            if is_distributed():
                with contextlib.suppress(Exception):  # the store went with the rank that had it
                    self._store.add(key, -1)
            raise

    def close(self) -> None:
        """Tells the other ranks that this one makes no more calls."""
        if self._desk is not None:
            self._desk.close()
        self._desk = None

    def _wait(self, key: str, call: str, desk: _Desk) -> None:
        began, pauses = time.monotonic(), itertools.chain((0.001, 0.002, 0.005, 0.01, 0.02), itertools.repeat(0.05))
        suspects: dict[int, Any] = {}
        ask_at = began + _PATIENCE
        while self._store.add(key, 0) < self._size:
            now = time.monotonic()
            if now - began > self._limit.total_seconds():
                raise CheckpointError(
                    f"{call} was called on rank {self._rank}, and not on all others within {self._limit}"
                    " [not-on-all-ranks]"
                )
            if now > ask_at:
                found = self._look_around(desk)
                sure = next((rank for rank, why in found.items() if suspects.get(rank) == why), None)
                if sure is not None and self._store.add(key, 0) < self._size:
                    what = "has ended" if found[sure] == "ended" else "has gone on (a backward, another collective)"
                    raise CheckpointError(
                        f"{call} was called on rank {self._rank}, and rank {sure} {what} without calling it. All "
                        f"ranks must call {call}, also where rank 0 alone writes: take it out of "
                        "`if fabric.is_global_zero:`, or whatever keeps the others from it [not-on-all-ranks]"
                    )
                suspects, ask_at = found, time.monotonic() + _BETWEEN
            time.sleep(next(pauses))

    def _look_around(self, desk: _Desk) -> dict[int, Any]:
        """Returns the ranks that seem not to come: "ended", or how far they are. The same twice is certain."""
        found: dict[int, Any] = {}
        for rank in range(self._size):
            if rank == self._rank:
                continue
            answer = self._ask(rank)
            if answer == "ended":
                found[rank] = answer
            elif isinstance(answer, dict) and answer["calls"] < desk.calls:
                mine = _begun()
                if any(count > mine[group] for group, count in answer["begun"].items() if group in mine):
                    found[rank] = answer["begun"], mine
        return found

    def _ask(self, rank: int) -> Any:
        """Returns a rank's answer, "ended", or None if it is busy or cannot be reached."""
        if rank not in self._addresses:
            key = f"{self._prefix}/{rank}"
            if not self._store.check([key]):  # it has not made its Fabric yet
                return None
            self._addresses[rank] = json.loads(self._store.get(key))
        host, port, token = self._addresses[rank]
        try:
            with socket.create_connection((host, port), _ANSWER) as connection:
                connection.sendall(token.encode())
                data = b"".join(iter(lambda: connection.recv(65536), b""))
        except TimeoutError:
            return None
        except OSError:  # nobody listens; on another machine it may be a firewall
            return "ended" if self._one_machine else None
        return json.loads(data) if data else "ended"


class _Desk:
    """The socket at which a rank can be asked how far it is."""

    def __init__(self, host: str) -> None:
        self.calls = 0
        self._socket = socket.create_server((host, 0))
        self.address = (host, self._socket.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=_answer, args=(self._socket, weakref.ref(self)), daemon=True, name="presence").start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()


def _answer(server: socket.socket, desk: weakref.ref[_Desk]) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        try:
            with connection:
                connection.settimeout(_ANSWER)
                token = connection.recv(64).decode()
                begun = _begun()  # read before `calls`: a rank in the call may have begun its collectives
                live = desk()
                if live is not None and token == live.address[2]:
                    connection.sendall(json.dumps({"calls": live.calls, "begun": begun}).encode())
        except Exception:  # the asker closed the connection, or was not a rank
            continue


def _begun() -> dict[str, int]:
    """Returns how many collectives this process has begun, by the name of the group."""
    if not is_distributed():
        return {}
    counts: dict[str, int] = {}
    for group, name in list(dist.distributed_c10d._world.pg_names.items()):
        try:
            counts[str(name)] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        except RuntimeError:  # an engine that does not count
            continue
    return counts


def _own_address(one_machine: bool) -> str:
    """Returns the address by which other ranks reach this one."""
    if one_machine or "MASTER_ADDR" not in os.environ:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
