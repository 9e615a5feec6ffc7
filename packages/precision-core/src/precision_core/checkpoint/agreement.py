"""Agreement: what ranks do together, so that an error on one is an error on all, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from precision_core.checkpoint.error import CheckpointError

if TYPE_CHECKING:
    from precision_core.strategies import Strategy

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
    """Returns every rank's `value`, in the order of ranks; small values that pickle.

    Raises:
        CheckpointError: a rank is gone.
    """
    values: list[Any] = [None] * size_of(group)
    if not is_distributed():
        return [value]
    with losses_told():
        dist.all_gather_object(values, value, group=group)
    return values


def gather_over(strategy: Strategy, value: T) -> list[T]:
    """Returns every rank's `value` as `gather` does, over whatever engine the strategy has."""
    if strategy.group.world_size == 1:
        return [value]
    with losses_told():
        return [strategy.group.broadcast(value, src=rank) for rank in range(strategy.group.world_size)]


@contextmanager
def losses_told() -> Iterator[None]:
    """Context for collectives: a connection that another rank closed, by its death, is a `CheckpointError`."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"another rank is gone, or cannot be reached: {reason}") from error


class Agreement:
    """Context that all ranks leave at the same time, and all with an error when one has one; it may be entered again.

    There must be no collective in it: the rank that failed before it would be missed. `gather` returns all ranks'
    texts; `said` is how others' problems are told.

    Raises:
        CheckpointError: on ranks where all is well, naming the first that failed.
    """

    def __init__(
        self,
        gather: Callable[[str], list[str]],
        said: str = "rank {rank} of {size} failed: {problem}",
    ) -> None:
        self._gather, self._said = gather, said
        self._reached = False

    def __enter__(self) -> Agreement:
        self._reached = False
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._reached:
            return
        if error is None:
            self.reach()
            return
        with contextlib.suppress(CheckpointError):  # this rank's own error is the one to raise
            self._gather(f"{type(error).__name__}: {error}")

    def reach(self) -> None:
        """Agrees now, not at the end: what follows in the context is for this rank alone."""
        self._reached = True
        problems = self._gather("")
        for rank, problem in enumerate(problems):
            if problem:
                raise CheckpointError(self._said.format(rank=rank, size=len(problems), problem=problem))


def together(group: ProcessGroup | None) -> Agreement:
    """Returns the agreement of the ranks of `group`."""
    return Agreement(functools.partial(gather, group=group))


def agreed(strategy: Strategy, what: str) -> Agreement:
    """Returns the agreement of the strategy's ranks that `what` is done."""
    said = f"rank {{rank}} could not {what} the checkpoint: {{problem}}"
    return Agreement(functools.partial(gather_over, strategy), said)
