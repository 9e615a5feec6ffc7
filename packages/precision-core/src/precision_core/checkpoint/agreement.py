"""Agreement: an error on one rank is an error on all, and no rank waits for one that died."""

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
    """Returns whether `torch.distributed` is initialized in this process."""
    return dist.is_available() and dist.is_initialized()


def rank_of(group: ProcessGroup | None) -> int:
    """Returns this process's rank in `group` (None: all processes); 0 without torch.distributed."""
    return dist.get_rank(group) if is_distributed() else 0


def size_of(group: ProcessGroup | None) -> int:
    """Returns the number of processes in `group` (None: all); 1 without torch.distributed."""
    return dist.get_world_size(group) if is_distributed() else 1


def gather(value: T, group: ProcessGroup | None) -> list[T]:
    """Returns every rank's `value`, in rank order; all ranks of `group` call it. Values are pickled: keep them small.

    Raises:
        CheckpointError: a rank died or cannot be reached.
    """
    values: list[Any] = [None] * size_of(group)
    if not is_distributed():
        return [value]
    with peer_failure_as_error():
        dist.all_gather_object(values, value, group=group)
    return values


def gather_over(strategy: Strategy, value: T) -> list[T]:
    """Returns every rank's `value` as `gather` does, by the strategy's own broadcast."""
    if strategy.group.world_size == 1:
        return [value]
    with peer_failure_as_error():
        return [strategy.group.broadcast(value, src=rank) for rank in range(strategy.group.world_size)]


@contextmanager
def peer_failure_as_error() -> Iterator[None]:
    """Converts a collective's RuntimeError (a peer died or is unreachable) into `CheckpointError`."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"another rank died, or cannot be reached: {reason}") from error


class Agreement:
    """Context that all ranks leave together, all of them with an error if one raised; it may be entered again.

    Run no collective in it: a rank that raised before would never join. `gather` returns all ranks' texts; `message`
    formats the problem of another rank.

    Raises:
        CheckpointError: on ranks without an error of their own, naming the first that failed.
    """

    def __init__(
        self, gather: Callable[[str], list[str]], message: str = "rank {rank} of {size} failed: {problem}"
    ) -> None:
        self._gather, self._message = gather, message
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
        """Agrees now instead of at the end: the rest of the context concerns this rank alone."""
        self._reached = True
        problems = self._gather("")
        for rank, problem in enumerate(problems):
            if problem:
                raise CheckpointError(self._message.format(rank=rank, size=len(problems), problem=problem))


def together(group: ProcessGroup | None) -> Agreement:
    """Returns an `Agreement` of the ranks of `group` (None: all processes)."""
    return Agreement(functools.partial(gather, group=group))


def agreed(strategy: Strategy, what: str) -> Agreement:
    """Returns an `Agreement` of the strategy's ranks; errors say that a rank "could not `what` the checkpoint"."""
    message = f"rank {{rank}} could not {what} the checkpoint: {{problem}}"
    return Agreement(functools.partial(gather_over, strategy), message)
