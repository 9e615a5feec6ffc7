"""Data loaders that move batches to the device, and resume in the middle of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from precision_core.data.order import capture, keeps_own_state, length, recall, stateful_sampler
from precision_core.policy.casting import move

_KEYS: dict[str, Any] = {
    "epoch": int,
    "batches": (int, type(None)),
    "length": (int, type(None)),
    "start": dict,
    "now": dict,
}


class DeviceLoader:
    """Iterates over `loader` and moves each batch to `device`, dtypes unchanged; other attributes are `loader`'s.

    Its state is the position in the epoch and the random state that the epoch's order was drawn from. The first pass
    after `load_state_dict` resumes at the very next batch: it draws the same order, then loads and drops the batches
    that were handed out before, in the workers too, so that their random streams are right. A loader with `state_dict`
    of its own (torchdata's StatefulDataLoader) saves and resumes by that instead.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self._loader = loader
        self.destination = device
        self._epoch = 0  # completed passes
        self._batches: int | None = None  # handed out in the current pass; None: no pass is running
        self._start: dict[str, Any] = {}  # random state that the current pass's order was drawn from
        self._newest: object = None  # token of the current pass: batches of older iterators do not count
        self._begun = False  # whether this process has begun a pass
        self._goes_on = False

    def __iter__(self) -> Iterator[Any]:
        if self._goes_on:
            batches = self._go_on()
        else:
            if not keeps_own_state(self._loader):
                self._start = {**capture(self._loader), "warm": self._begun}
            self._batches = 0
            batches = iter(self._loader)
        self._begun, self._newest = True, object()
        return self._hand_out(batches, self._newest)

    def _hand_out(self, batches: Iterator[Any], which: object) -> Iterator[Any]:
        for batch in self.moved(batches):
            if which is self._newest and self._batches is not None:
                self._batches += 1
            yield batch
        if which is self._newest:
            self.end_epoch()

    def moved(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yields the batches on the device; a strategy's subclass may move them in another way."""
        for batch in batches:
            yield move(batch, self.destination)

    def _go_on(self) -> Iterator[Any]:
        now = capture(self._loader)
        try:
            if self._start.get("warm") and not self._begun and getattr(self._loader, "persistent_workers", False):
                iter(self._loader)  # the pass was not its workers' first, so it drew no seed for them
            recall(self._loader, self._start)
            batches = iter(self._loader)
            skip = 0 if stateful_sampler(self._loader) else self._batches or 0
            skipped = sum(1 for _ in islice(batches, skip))
        finally:
            recall(self._loader, now)
        if skipped < skip:
            raise ValueError(
                f"cannot resume at batch {skip}: the loader ended after {skipped} batches, so its data changed"
                " [loader-position]"
            )
        self._goes_on = False
        return batches

    def end_epoch(self) -> None:
        """Ends the current pass as a completed epoch; call it after a `break` that cut an epoch short on purpose."""
        self._epoch += self._batches is not None
        self._batches, self._start, self._goes_on = None, {}, False

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and the generators' states as plain values and tensors, or the loader's own state.

        Raises:
            ValueError: in the middle of an epoch, with worker processes and a sampler that keeps its own position: the
                workers have drawn ahead from it.
        """
        if keeps_own_state(self._loader):
            return self._loader.state_dict()  # type: ignore[attr-defined]
        sampler = stateful_sampler(self._loader)
        if sampler is not None and self._batches is not None and self.has_workers():
            raise ValueError(
                f"the workers have drawn ahead from {type(sampler).__name__}, which keeps its own position: save at "
                "the end of the epoch, use num_workers=0, or a loader with state_dict (torchdata's StatefulDataLoader)"
            )
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "length": length(self._loader),
            "start": self._start,
            "now": capture(self._loader),
            "sampler": None if sampler is None else sampler.state_dict(),
        }

    def has_workers(self) -> bool:
        """Whether worker processes load the batches."""
        return bool(getattr(self._loader, "num_workers", 0))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the next pass resumes at that position.

        Raises:
            ValueError: not the state of a loader, or a position in a loader of another length; nothing changes.
        """
        if keeps_own_state(self._loader):
            self._loader.load_state_dict(state)  # type: ignore[attr-defined]
            return
        if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in _KEYS.items()):
            raise ValueError(f"not the state of a data loader: {str(state)[:80]}")
        mine = length(self._loader)
        if state["batches"] is not None and state["length"] != mine:
            raise ValueError(
                f"cannot resume at batch {state['batches']}: the checkpoint's loader had {state['length']} batches per "
                f"epoch, this one has {mine}. Save at the end of an epoch, or leave the loader out of `state`"
                " [loader-position]"
            )
        sampler = stateful_sampler(self._loader)
        if sampler is not None and state.get("sampler") is not None:
            sampler.load_state_dict(state["sampler"])
        recall(self._loader, state["now"], globals_too=False)
        self._epoch, self._batches, self._start = state["epoch"], state["batches"], state["start"]
        self._goes_on = self._batches is not None
        self._newest = None

    def undo_load(self) -> Callable[[], None]:
        """Returns a function that restores the loader's present position, also in a running pass."""
        before, now = dict(vars(self)), capture(self._loader)
        parts: list[Any] = [part for part in (self._loader, stateful_sampler(self._loader)) if keeps_own_state(part)]
        positions = [copy.deepcopy(part.state_dict()) for part in parts]

        def undo() -> None:
            for part, position in zip(parts, positions, strict=True):
                part.load_state_dict(position)
            recall(self._loader, now, globals_too=False)
            vars(self).update(before)

        return undo

    # ---------------------------------------------------------------- the loader's own attributes

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loader" not in self.__dict__:  # copy and pickle ask before there is a loader
            raise AttributeError(name)
        return getattr(self._loader, name)
