"""Saves in the background: a thread writes a copy in host memory while training goes on and changes the values."""

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
from precision_core.checkpoint.shards import deep_copied, is_sharded
from precision_core.policy.casting import map_tensors
from precision_core.strategies import Strategy


class PendingSave:
    """A save that is done, or under way in a thread.

    The process does not end before it is over. An error that neither `wait` nor another save has raised by then is
    printed.
    """

    def __init__(self, path: Path, write: Callable[[], None] | None = None) -> None:
        self._outcome = _Outcome(path)
        self._thread: threading.Thread | None = None
        if write is not None:
            weakref.finalize(self, self._outcome.tell)
            self._thread = threading.Thread(target=self._outcome.of, args=(write,), name=f"save {path.name}")
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the checkpoint is in place.

        Raises:
            OSError, CheckpointError: it could not be written, as from `Fabric.save`; what was at its path stays.
        """
        self.settle()
        if self._outcome.error is not None:
            self._outcome.told = True
            raise self._outcome.error

    def settle(self) -> None:
        """Returns when it is over, well or not."""
        if self._thread is not None:
            self._thread.join()

    @property
    def unsaid(self) -> bool:
        """Whether it failed, and nobody was told."""
        return self._outcome.error is not None and not self._outcome.told


class _Outcome:
    """What became of a save; apart from it, so that it can be told when that is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: BaseException | None = None
        self.told = False

    def of(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self.error = error

    def tell(self) -> None:
        if self.error is not None and not self.told:
            print(f"{self.path} was not saved: {type(self.error).__name__}: {self.error}", file=sys.stderr)


class _Background:
    """What a strategy has in the background: its newest save, and a process group for the ranks' threads."""

    group: ProcessGroup | None = None
    save: PendingSave | None = None


_OF: WeakKeyDictionary[Strategy, _Background] = WeakKeyDictionary()


def settle(strategy: Strategy) -> None:
    """Returns when no save of this strategy is under way; errors are kept for `wait` and the next save."""
    if strategy in _OF and (save := _OF[strategy].save) is not None:
        save.settle()


def raise_unsaid(strategy: Strategy) -> None:
    """Raises what the newest save in the background failed of, if nobody was told."""
    settle(strategy)
    save = _OF[strategy].save if strategy in _OF else None
    if save is not None and save.unsaid:
        save.wait()


def begin(strategy: Strategy, path: Path, write: Callable[[ProcessGroup | None], None]) -> PendingSave:
    """Has a thread call `write(group)`; on all ranks at the same point, as they make the group once.

    Raises:
        ValueError: there are several processes, and torch.distributed has not joined them.
    """
    background = _OF.setdefault(strategy, _Background())
    if strategy.group.world_size > 1 and not is_distributed():
        raise ValueError("fabric.save(wait=False) among several processes needs torch.distributed; use wait=True")
    if strategy.group.world_size > 1 and background.group is None:
        background.group = dist.new_group(backend="gloo")  # training has the other one to itself
    group = background.group
    background.save = PendingSave(path, lambda: write(group))
    return background.save


def forget(strategy: Strategy) -> None:
    """Waits for the strategy's save, and lets its process group go; call it before the processes part."""
    settle(strategy)
    background = _OF.pop(strategy, None)
    if background is not None and background.group is not None and is_distributed():
        dist.destroy_process_group(background.group)


def copied(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `content` in host memory that shares nothing with it; of DTensors this rank's shards.

    Tensors that are one in memory, such as tied weights, stay one.
    """
    places: dict[Any, Tensor] = {}
    copies: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        if is_sharded(tensor) or (type(tensor) is Tensor and not vars(tensor)):  # others know how they are copied
            local: Any = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            place: Any = id(tensor)
            if local.layout is torch.strided and local.numel():
                place = (local.data_ptr(), local.device, local.stride(), tensor.shape, tensor.dtype)
            if place not in places:
                places[place] = tensor.detach().to("cpu", copy=True).requires_grad_(tensor.requires_grad)
            copies[id(tensor)] = places[place]
        return tensor

    map_tensors(content, keep)
    return deep_copied(content, copies, "cpu")
