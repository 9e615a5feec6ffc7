"""Agreement: what ranks do together, so that an error on one is an error on all, and nobody waits for the dead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from precision_core.checkpoint import CheckpointError

T = TypeVar("T")


def is_distributed() -> bool:
    """Returns whether this process is one of several that `torch.distributed` has joined."""
    return dist.is_available() and dist.is_initialized()


def rank_of(group: ProcessGroup | None) -> int:
    """Returns this process's number in `group`; None is all processes, alone it is 0."""
    return dist.get_rank(group) if is_distributed() else 0


def size_of(group: ProcessGroup | None) -> int:
    """Returns how many processes `group` has."""
    return dist.get_world_size(group) if is_distributed() else 1


def gather(value: T, group: ProcessGroup | None) -> list[T]:
    """Returns every rank's `value`, in the order of ranks; small values that pickle."""
    values: list[Any] = [None] * size_of(group)
    if not is_distributed():
        return [value]
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def together(group: ProcessGroup | None) -> Iterator[None]:
    """Context that every rank leaves at the same time, and all with an error when one has one.

    There must be no collective in it: the rank that failed before it would be missed.

    Raises:
        CheckpointError: on ranks where all is well, naming the first that failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    problems = gather(None if problem is None else f"{type(problem).__name__}: {problem}", group)
    if problem is not None:
        raise problem
    for rank, text in enumerate(problems):
        if text is not None:
            raise CheckpointError(f"rank {rank} of {len(problems)} failed: {text}")
