"""Run, the base of Fabric: its methods that start processes, say which rank this is, and talk to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from precision_core.data import rng
from precision_core.strategies.base import Strategy
from precision_core.strategies.collectives import operation_name
from precision_core.strategies.layout import Layout
from precision_core.strategies.processes import Ranks

if TYPE_CHECKING:
    from precision_core.checkpoint.presence import Presence

T = TypeVar("T")


class Run:
    """The run's processes under `strategy`; the base of `Fabric`, which adds the precision and the loop.

    Before `launch` no other process is there: ranks are 0, and what needs the others raises `RuntimeError`.
    """

    _presence: Presence | None = None
    """Tells ranks of each other, once this process has joined them."""

    def __init__(self, strategy: Strategy, layout: Layout, again: Callable[[], Run]) -> None:
        self._strategy = strategy
        self._layout = layout
        self._again = again  # makes it anew, in a process that `launch` starts
        is_started = layout.ranks is not None or not strategy.multiprocess
        self._joined = is_started and not layout.missing
        if self._joined:
            strategy.join(layout.ranks or Ranks())

    def teardown(self) -> None:
        """Ends what the strategy started."""
        self._strategy.teardown()

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Starts the processes of the run, where they are not started yet; call it right after `Fabric(...)`.

        Without a function this process ends, and the script is started again from its top in each new one: what stands
        above the call runs once more than there are processes, what stands below once in each. With one,
        `function(fabric, *args, **kwargs)` runs in new processes, and rank 0's result is returned; they import the
        script, so there call it under `if __name__ == "__main__":`. On one device, and under torchrun, it only calls
        the function.

        A strategy that needs environment variables that this process was started without (XLA's several CPU devices)
        starts one process with them.

        Raises:
            RuntimeError: there is no script to start again; several machines, which torchrun starts; a process failed,
                with the traceback of the first one.
        """
        if self._joined:
            return None if function is None else function(self, *args, **kwargs)
        if self._layout.num_nodes > 1:
            raise RuntimeError(
                "fabric.launch() starts the processes of one machine; on several, start the script on each with "
                f"torchrun --nnodes={self._layout.num_nodes} --nproc-per-node={len(self._layout.indices)} ..."
            )
        if function is None:
            return self._strategy.start_processes(None, (), self._layout)
        return self._strategy.start_processes(_run_launched, (self._again, function, args, kwargs), self._layout)

    # ---------------------------------------------------------------- who this is

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._strategy.device

    @property
    def strategy(self) -> Strategy:
        """The strategy in use."""
        return self._strategy

    @property
    def global_rank(self) -> int:
        """This process's number among all processes of the run."""
        return self._strategy.group.rank if self._joined else 0

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        return self._strategy.group.local_rank if self._joined else 0

    @property
    def world_size(self) -> int:
        """How many processes the run has."""
        return self._strategy.group.world_size if self._joined else self._layout.world_size

    @property
    def node_rank(self) -> int:
        """This machine's number among the machines of the run."""
        ranks = self._layout.ranks or Ranks()
        return ranks.rank // ranks.local_world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.global_rank == 0

    # ---------------------------------------------------------------- what all of them do

    def _check_launched(self, all_call: str = "") -> None:
        """Raises where processes are not started yet; where all ranks must be in `all_call`, returns when they are."""
        if self._presence is not None:
            if all_call:
                self._presence.all_call(all_call)
            return
        missing = " ".join(f"{name}={value}" for name, value in self._layout.missing.items())
        needs = (
            f"this run needs a process that was started with {missing}"
            if missing
            else f"this run has {self._layout.world_size} processes, and they are not started yet"
        )
        raise RuntimeError(f"{needs}: call fabric.launch() right after Fabric(...) [not-launched]")

    def all_gather(self, data: T) -> T:
        """Returns `data`, any nesting, with each tensor as (world_size, *shape): those of all ranks, of one shape."""
        self._check_launched()
        return self._strategy.group.all_gather(data)

    def all_reduce(self, data: T, op: Any = "mean", *, reduce_op: Any = None) -> T:
        """Returns `data`, any nesting, with each tensor's "mean", "sum", "min" or "max" over all ranks.

        `reduce_op` is another name for `op`, as Lightning Fabric has it; "avg" and torch's `ReduceOp` are understood.

        Raises:
            ValueError: another operation, or two.
        """
        self._check_launched()
        name = operation_name(op)
        if reduce_op is not None:
            if name not in ("mean", operation_name(reduce_op, "reduce_op")):
                raise ValueError(f"all_reduce(op={op!r}, reduce_op={reduce_op!r}): pass one of them")
            name = operation_name(reduce_op, "reduce_op")
        return self._strategy.group.all_reduce(data, name)

    def broadcast(self, data: T, src: int = 0) -> T:
        """Returns rank `src`'s `data` on every rank: any object that pickles, its tensors on the rank's device."""
        self._check_launched()
        return self._strategy.group.broadcast(data, src)

    def barrier(self, name: str | None = None) -> None:
        """Waits until every process is here; `name` is ignored."""
        self._check_launched()
        self._strategy.group.barrier()

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Context that rank 0 runs before the others, to download data say; with `local`, rank 0 of each machine.

        The others wait for it at a barrier, as long as the strategy's `timeout` allows, and go on where it raises.
        """
        self._check_launched()
        is_first = (self.local_rank if local else self.global_rank) == 0
        if not is_first:
            self._strategy.group.barrier()
        try:
            yield
        finally:
            if is_first:
                self._strategy.group.barrier()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on the first rank only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    @staticmethod
    def seed_everything(seed: int, *, verbose: bool = False) -> int:
        """Seeds Python's, numpy's and torch's generators, all devices included; returns `seed`.

        `verbose`, which Lightning has, changes nothing: nothing is printed.
        """
        del verbose
        return rng.seed_everything(seed)


def _run_launched(
    again: Callable[[], Run], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `launch` runs in each new process, where torchrun's variables are set now."""
    run = again()
    result = function(run, *args, **kwargs)
    run.teardown()  # not after an error: other ranks would fail of the closed connection, and perhaps say so first
    return result
