"""Regions: the part of a forward in which layers compute in low precision, and what happens at its end.

As with the vendor, layers compute as torch's outside of a region. Delayed scaling's forward scales are updated when the
outermost region ends with gradients enabled, those of gradients when a backward is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Variable

from precision_te.recipes import Delayed, Recipe
from precision_te.reference.amax import AmaxState, reduce


class Region:
    """A recipe at work: `states` are those of the layers that ran in it, in the order in which they did."""

    def __init__(self, recipe: Recipe, group: dist.ProcessGroup | None, calibrating: bool) -> None:
        self.recipe = recipe
        self.group = group
        self.calibrating = calibrating
        self._states: dict[int, AmaxState] = {}
        self._with_gradient: dict[int, AmaxState] = {}

    def joins(self, recipe: Recipe, group: dist.ProcessGroup | None, calibrating: bool) -> bool:
        """Whether a region inside of this one with these settings is a part of it."""
        return (recipe, group, calibrating) == (self.recipe, self.group, self.calibrating)

    def ran(self, state: AmaxState) -> None:
        """Notes that a layer ran."""
        self._states[id(state)] = state

    def end(self) -> None:
        """Updates the scales of inputs and weights; in evaluation they stay, and the largest values were noted."""
        if isinstance(self.recipe, Delayed) and (torch.is_grad_enabled() or self.calibrating):
            self._update(self.recipe, list(self._states.values()), ("input", "weight"))

    def ran_backward(self, state: AmaxState) -> None:
        """Notes that the gradient of a layer's output was seen; the scales are updated when this backward is done."""
        if not self._with_gradient:
            Variable._execution_engine.queue_callback(self._end_backward)
        self._with_gradient[id(state)] = state

    def _end_backward(self) -> None:
        states, self._with_gradient = self._with_gradient, {}
        assert isinstance(self.recipe, Delayed)
        self._update(self.recipe, list(states.values()), ("grad",))

    def _update(self, recipe: Delayed, states: list[AmaxState], roles: Any) -> None:
        if recipe.reduce_amax:
            reduce(states, roles, self.group)
        for state in states:
            state.update(recipe, roles)


class _Here(threading.local):
    region: Region | None = None


_here = _Here()


def current() -> Region | None:
    """Returns the region that this thread is in."""
    return _here.region


@contextmanager
def region(recipe: Recipe, *, group: dist.ProcessGroup | None = None, calibrating: bool = False) -> Iterator[None]:
    """Context in which layers compute as `recipe` says; one inside of another with equal settings is a part of it."""
    before = _here.region
    if before is not None and before.joins(recipe, group, calibrating):
        yield
        return
    _here.region = mine = Region(recipe, group, calibrating)
    try:
        yield
    finally:
        _here.region = before
    mine.end()  # not after an exception: other ranks may not be there
