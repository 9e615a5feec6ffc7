"""Regions: the part of a forward in which layers compute in low precision, and what happens at its end.

As with the vendor, layers compute as torch's outside of a region. Delayed scaling's forward scales are updated when the
outermost region ends with gradients enabled, those of gradients when a backward is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Protocol
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from precision_te.recipes import Delayed, Recipe
from precision_te.reference.amax import AmaxState, reduce
from precision_te.reference.operands import Role


class Layer(Protocol):
    """A layer that can have a state."""

    weight: Tensor

    def state(self, recipe: Delayed) -> AmaxState:
        """Returns its state, made now if need be."""
        ...


Layers = Sequence[Callable[[], Layer | None]] | None
"""References to layers; those of layers that were garbage collected stay in the list."""


def _nothing() -> None: ...


class Region:
    """An active recipe, and the amax states of the layers that ran in it.

    With `layers`, amax is reduced over ranks for all of them, whichever ran on each rank; without, for those that ran,
    which must be the same on all ranks, in the same order.
    """

    def __init__(
        self, recipe: Recipe, group: dist.ProcessGroup | None, calibrating: bool, layers: Layers = None
    ) -> None:
        self.recipe = recipe
        self.group = group
        self.calibrating = calibrating
        self.layers = layers
        self._states: dict[int, AmaxState] = {}
        self._with_gradient: dict[int, AmaxState] = {}
        self._ending: Callable[[], object] = _nothing

    def joins(self, recipe: Recipe, group: dist.ProcessGroup | None, calibrating: bool, layers: Layers) -> bool:
        """Whether a region inside of this one with these settings is a part of it."""
        same = (recipe, group, calibrating) == (self.recipe, self.group, self.calibrating)
        return same and layers is self.layers

    def ran(self, state: AmaxState) -> None:
        """Notes that a layer ran."""
        self._states[id(state)] = state

    def end(self) -> None:
        """Updates the scales of inputs and weights; in evaluation they stay, and only amax is recorded."""
        states, self._states = self._states, {}
        if isinstance(self.recipe, Delayed) and (torch.is_grad_enabled() or self.calibrating):
            self._update(self.recipe, states, ("input", "weight"))

    def ran_backward(self, state: AmaxState) -> None:
        """Notes that the gradient of a layer's output was seen; the scales are updated when this backward is done."""
        if self._ending() is None:  # also after a backward that an exception ended: its callback is gone with it
            ending = partial(Region._end_backward, self)
            self._ending = ref(ending)
            Variable._execution_engine.queue_callback(ending)
        self._with_gradient[id(state)] = state

    def _end_backward(self) -> None:
        states, self._with_gradient, self._ending = self._with_gradient, {}, _nothing
        assert isinstance(self.recipe, Delayed)
        self._update(self.recipe, states, ("grad",))

    def _update(self, recipe: Delayed, ran: dict[int, AmaxState], roles: Sequence[Role]) -> None:
        everyone: Sequence[AmaxState | None] = list(ran.values())
        anywhere: Iterable[Tensor | None] = repeat(None)
        if recipe.reduce_amax and self.group is not None and dist.get_world_size(self.group) > 1:
            everyone = everyone if self.layers is None else self._everyone(self.layers, recipe, ran)
            if not everyone:
                return
            anywhere = reduce(everyone, [id(state) in ran for state in everyone], roles, self.group)
        for state, there in zip(everyone, anywhere, strict=False):
            if state is not None:
                state.update(recipe, roles, None if id(state) in ran else there)

    def _everyone(
        self, layers: Sequence[Callable[[], Layer | None]], recipe: Delayed, ran: dict[int, AmaxState]
    ) -> list[AmaxState | None]:
        """Returns the states of all layers, also of those that did not run here; None: it was freed, or is on meta."""
        there = [each() for each in layers]
        states = [None if each is None or each.weight.is_meta else each.state(recipe) for each in there]
        if unregistered := ran.keys() - {id(state) for state in states}:
            raise RuntimeError(
                f"{len(unregistered)} layers ran under delayed scaling over several processes, and were not set up, "
                "such as those of a deepcopy of a model that was: call fabric.setup(copy) before it trains"
            )
        return states


class _Here(threading.local):
    region: Region | None = None


_here = _Here()


def current() -> Region | None:
    """Returns the region that this thread is in."""
    return _here.region


@contextmanager
def region(
    recipe: Recipe, *, group: dist.ProcessGroup | None = None, calibrating: bool = False, layers: Layers = None
) -> Iterator[None]:
    """Context in which layers compute in `recipe`; a nested one with equal settings is part of the outer one.

    With `layers` and delayed scaling, every rank of `group` ends it, whether or not a layer ran there, if gradients are
    enabled; and every rank's backward reaches at least one of these layers.
    """
    before = _here.region
    if before is not None and before.joins(recipe, group, calibrating, layers):
        yield
        return
    _here.region = mine = Region(recipe, group, calibrating, layers)
    try:
        yield
    finally:
        _here.region = before
    mine.end()  # not after an exception: other ranks may not be there
