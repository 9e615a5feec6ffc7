"""Activation checkpointing: a forward that backward recomputes uses the region and the scales of the first one.

The engine's `checkpoint` records them for each layer. Under torch's own, which models call themselves, a layer takes
those of its forward whose backward is pending, and raises where several are, with different scales.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from precision_te.reference.region import Region

T = TypeVar("T")


class Run:
    """One forward of a layer: its region (None outside of any), and delayed scaling's `scales` (3,)."""

    def __init__(self, region: Region | None) -> None:
        self.region = region
        self.scales: Tensor | None = None
        self.done = False
        """Whether its backward ran."""

    def computes_as(self, other: Run) -> bool:
        """Whether the same input gives the same output in both."""
        mine, theirs = self.region, other.region
        if mine is theirs:
            return True
        if mine is None or theirs is None or (mine.recipe, mine.calibrating) != (theirs.recipe, theirs.calibrating):
            return False
        return self.scales is None or other.scales is None or torch.equal(self.scales, other.scales)


def pending(runs: Iterable[Run], last: Run | None) -> Run | None:
    """Returns the run that backward recomputes: of `runs`, whose graphs are alive, one without a backward; else `last`.

    Raises:
        RuntimeError: there are several, with different scales or recipes.
    """
    there = list(runs)
    waiting = [run for run in there if not run.done] or there
    if not waiting:
        return last
    if not all(run.computes_as(waiting[0]) for run in waiting):
        raise RuntimeError(
            "a layer under torch's checkpoint ran several times before backward, with different scales or recipes, and "
            "cannot tell which forward is recomputed: use the plugin's checkpoint(function, *args) in place of "
            "torch.utils.checkpoint.checkpoint, or run backward after each forward"
        )
    return waiting[0]


class Checkpointed:
    """A function under the engine's `checkpoint`: it notes its layers' runs, and returns them when it is recomputed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._runs: dict[nn.Module, list[Run]] = {}
        self._taken: dict[nn.Module, int] = {}
        self._called = self.again = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function."""
        self.again, self._called, self._taken = self._called, True, {}
        _here.blocks = (*before, self) if (before := _here.blocks) else (self,)
        try:
            return self._function(*args, **kwargs)
        finally:
            _here.blocks = before

    def note(self, layer: nn.Module, run: Run) -> None:
        """Records a run of `layer`, in the first call."""
        if not self.again:
            self._runs.setdefault(layer, []).append(run)

    def take(self, layer: nn.Module) -> Run | None:
        """Returns the run of `layer` in the first call, in the order of its forwards; None if it ran less often."""
        at = self._taken[layer] = self._taken.get(layer, -1) + 1
        runs = self._runs.get(layer, [])
        return runs[at] if at < len(runs) else None


class _Here(threading.local):
    blocks: tuple[Checkpointed, ...] = ()


_here = _Here()


def taken(layer: nn.Module) -> Run | None:
    """Returns the run of `layer` in the innermost block that is recomputed; None outside of such a block."""
    block = next((block for block in reversed(_here.blocks) if block.again), None)
    return None if block is None else block.take(layer)


def note(layer: nn.Module, run: Run) -> None:
    """Records a run in all blocks that are in their first call."""
    for block in _here.blocks:
        block.note(layer, run)
