"""Saves in the background: a thread writes a copy in CPU memory while training goes on."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from precision_core.checkpoint.agreement import is_distributed
from precision_core.checkpoint.arrival import Arrival
from precision_core.checkpoint.shards import deep_copied, is_sharded
from precision_core.policy.casting import map_tensors
from precision_core.strategies import Strategy


class PendingSave:
    """A save that has ended, or runs in a thread.

    The process does not exit before it has ended. An error that neither `wait` nor a later save raised is printed to
    stderr then.
    """

    def __init__(self, path: Path, write: Callable[[], None] | None = None) -> None:
        self._outcome = _Outcome(path)
        self._thread: threading.Thread | None = None
        if write is not None:
            weakref.finalize(self, self._outcome.print_error)
            self._thread = threading.Thread(target=self._outcome.run, args=(write,), name=f"save {path.name}")
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the save has ended, with or without an error."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Waits until the checkpoint is in place.

        Raises:
            OSError, CheckpointError: the save failed, as `Fabric.save` would; an older checkpoint at its path is kept.
        """
        self.settle()
        if self._outcome.error is not None:
            self._outcome.reported = True
            raise self._outcome.error

    def settle(self) -> None:
        """Waits until the save has ended, with or without an error."""
        if self._thread is not None:
            self._thread.join()

    @property
    def unreported(self) -> bool:
        """Whether it failed, and `wait` has not raised its error yet."""
        return self._outcome.error is not None and not self._outcome.reported


class _Outcome:
    """How a save ended. Not part of `PendingSave`, so that an error can be printed when that is deleted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: BaseException | None = None
        self.reported = False

    def run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self.error = error

    def print_error(self) -> None:
        if self.error is not None and not self.reported:
            print(f"{self.path} was not saved: {type(self.error).__name__}: {self.error}", file=sys.stderr)


class _Background:
    """A strategy's last background save, and the process group of the ranks' threads."""

    group: ProcessGroup | None = None
    save: PendingSave | None = None


_OF: WeakKeyDictionary[Strategy, _Background] = WeakKeyDictionary()


def settle(strategy: Strategy) -> None:
    """Waits until no save of this strategy runs; an error is kept for `wait` and the next save."""
    if strategy in _OF and (save := _OF[strategy].save) is not None:
        save.settle()


def raise_unreported(strategy: Strategy) -> None:
    """Re-raises the last background save's error, unless `wait()` already raised it."""
    settle(strategy)
    save = _OF[strategy].save if strategy in _OF else None
    if save is not None and save.unreported:
        save.wait()


def begin(strategy: Strategy, path: Path, write: Callable[[ProcessGroup | None], None]) -> PendingSave:
    """Starts a thread that calls `write(group)`. All ranks call this at the same point: the first call makes the group.

    Raises:
        ValueError: several processes without torch.distributed.
    """
    background = _OF.setdefault(strategy, _Background())
    if strategy.group.world_size > 1 and not is_distributed():
        raise ValueError("fabric.save(wait=False) among several processes needs torch.distributed; use wait=True")
    if strategy.group.world_size > 1 and background.group is None:
        background.group = dist.new_group(backend="gloo")  # not the one that training uses
    group = background.group
    background.save = PendingSave(path, lambda: write(group))
    return background.save


def forget(strategy: Strategy) -> None:
    """Waits for the strategy's save and destroys its process group; call it before the default group is destroyed."""
    settle(strategy)
    background = _OF.pop(strategy, None)
    if background is not None and background.group is not None and is_distributed():
        dist.destroy_process_group(background.group)


def copied(content: dict[str, Any]) -> tuple[dict[str, Any], Arrival]:
    """Returns a deep copy of `content` in CPU memory, with this rank's shards of DTensors, and what to wait for first.

    Tensors that share their memory, such as tied weights, share it in the copy.
    """
    arrival = Arrival()
    by_memory: dict[Any, Tensor] = {}
    copies: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        if is_sharded(tensor) or (type(tensor) is Tensor and not vars(tensor)):  # subclasses copy themselves
            local: Any = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            memory: Any = id(tensor)
            if local.layout is torch.strided and local.numel():
                memory = (local.data_ptr(), local.device, local.stride(), tensor.shape, tensor.dtype)
            if memory not in by_memory:
                by_memory[memory] = arrival.copy(tensor)
            copies[id(tensor)] = by_memory[memory]
        return tensor

    map_tensors(content, keep)
    arrival.record()
    return deep_copied(content, copies, "cpu"), arrival
