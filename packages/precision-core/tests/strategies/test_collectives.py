"""Broadcast: tensors are pickled in CPU memory, and arrive on each rank's device."""

from __future__ import annotations

from typing import Any

import torch

from precision_core import Fabric
from precision_core.testing import HostReads, run_in_ranks


def broadcast() -> tuple[list[float], str, list[str], bool]:
    fabric = Fabric("cpu", "ddp", devices=2)
    mine: dict[str, Any] = {"x": [torch.full((2,), fabric.global_rank + 1.0)], "name": f"of {fabric.global_rank}"}
    with HostReads() as reads:
        theirs = fabric.broadcast(mine, src=1)
    moves = [line for line in reads.lines if line.endswith('<lambda>: to("cpu")')]
    fabric.teardown()
    return theirs["x"][0].tolist(), theirs["name"], moves, theirs is mine


def test_tensors_are_pickled_in_cpu_memory_by_the_rank_that_sends_them() -> None:
    first, second = run_in_ranks(2, broadcast)
    assert first[:2] == second[:2] == ([2.0, 2.0], "of 1")
    assert first[2:] == ([], False)
    assert len(second[2]) == 1 and "strategies/collectives.py" in second[2][0] and second[3]


class Custom:
    """Holds a tensor where nobody but pickle finds it."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value


def broadcast_custom() -> tuple[list[float], int]:
    fabric = Fabric("cpu", "ddp", devices=2)
    with HostReads() as reads:
        theirs = fabric.broadcast(Custom(torch.full((2,), fabric.global_rank + 1.0)), src=1)
    moves = [line for line in reads.lines if line.endswith('to("cpu")')]
    fabric.teardown()
    return theirs._value.tolist(), len(moves)


def test_tensors_in_custom_objects_are_sent_alike() -> None:
    assert run_in_ranks(2, broadcast_custom) == [([2.0, 2.0], 0), ([2.0, 2.0], 1)]
