"""Piece: some elements of a parameter in a step, or all of them, and the state that the optimizer finds for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.precision.update.layout import alike, flat, local, same_memory
from precision_core.precision.update.noise import Place
from precision_core.precision.update.storage import Storage
from precision_core.precision.update.whole import place_of

State = dict[str, Any]


@dataclass(slots=True)
class Param:
    """A parameter in a step."""

    param: nn.Parameter
    line: Callable[[Tensor], Tensor]
    """Gives the tensors below one dimension, in the order of memory, unless it is stepped as it is."""
    weight: Tensor
    size: int
    gradient: Tensor
    beside: Tensor | None
    stored: Tensor | None
    """`beside`, as the optimizer's state has it."""
    state: State
    """The optimizer's."""
    moments: dict[str, Tensor]
    is_new: bool
    """Whether it has no state yet."""
    place: tuple[int, int, Tensor | None]
    """Its number, and where its elements are in the full parameter: the first, or all."""
    late: State = field(default_factory=dict)
    """Counters, which change when its last piece has stepped."""


def prepared(optimizer: Optimizer, storage: Storage, param: nn.Parameter, numbers: dict[int, int], limit: int) -> Param:
    """Returns a dense parameter that has a gradient, for a step of at most `limit` elements."""
    state, weight = optimizer.state.get(param, {}), local(param)
    size = weight.numel()
    line = _as_it_is if size <= limit and weight.is_contiguous() else flat
    assert param.grad is not None
    gradient, stored = alike(local(param.grad), weight), storage.beside(param)
    beside = None if stored is None else line(alike(local(stored), weight))
    moments: dict[str, Tensor] = {}
    is_new = True
    for key, value in state.items():
        if key == storage.key:
            continue
        is_new = False
        dtype = storage.state_dtype(key, value, param)
        if dtype is None:
            continue
        moment = local(value)
        if moment.dtype is not dtype or moment.stride() != weight.stride():
            state[key] = torch.empty_like(param, dtype=dtype)
            moment = local(state[key]).copy_(moment)
        moments[key] = line(moment)
    place = place_of(param, numbers)
    return Param(param, line, line(weight), size, line(gradient), beside, stored, state, moments, is_new, place)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Piece:
    """The elements from `start` to `stop`; `weight`, `beside` and `gradient` are theirs."""

    __slots__ = ("_given", "_is_cut", "_is_last", "_start", "_stop", "beside", "gradient", "of", "weight")

    def __init__(self, of: Param, start: int, stop: int) -> None:
        self.of = of
        self._start = start
        self._stop = stop
        self._is_last = stop == of.size
        self._is_cut = start != 0 or not self._is_last
        self._given: State = {}
        self.weight = self._part(of.weight)
        self.gradient = self._part(of.gradient)
        self.beside = None if of.beside is None else self._part(of.beside)

    @property
    def place(self) -> Place:
        """Returns where it lies."""
        number, first, index = self.of.place
        return Place(number, first + self._start, index)

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor[self._start : self._stop] if self._is_cut else tensor

    def give_state(
        self, optimizer: Optimizer, placeholder: nn.Parameter, key: str | None, spare: Iterable[Tensor]
    ) -> None:
        """Gives `placeholder` its state, without `key`: half moments in `spare` memory, while there is some."""
        if self.of.is_new:
            return
        given, memory = self._given, iter(spare)
        for name, kept in self.of.state.items():
            moment = self.of.moments.get(name)
            if moment is None:
                if name != key:
                    given[name] = kept.clone() if self._is_cut and isinstance(kept, Tensor) else kept
            elif moment.dtype is torch.float32:
                given[name] = self._part(moment)  # the memory itself
            else:
                part = next(memory, None)
                given[name] = self._part(moment).float() if part is None else part.copy_(self._part(moment))
        optimizer.state[placeholder] = dict(given)

    def take_state(self, optimizer: Optimizer, placeholder: nn.Parameter, storage: Storage, scratch: Tensor) -> None:
        """Writes back what the optimizer did to the state of `placeholder`."""
        of, given = self.of, self._given
        stepped = optimizer.state.pop(placeholder, None)
        if stepped is not None:
            for key, value in stepped.items():
                moment = of.moments.get(key)
                is_given = key in given and value is given[key]
                if moment is None:
                    if is_given and not self._is_cut:
                        continue
                    dtype = storage.state_dtype(key, value, of.param)
                    if dtype is None:
                        of.late[key] = value
                        continue
                    of.state = optimizer.state[of.param]  # which it may not have had
                    if self._may_stay(value, dtype):
                        of.state[key] = value
                        continue
                    of.state[key] = torch.empty_like(of.param, dtype=dtype)
                    moment = of.moments[key] = of.line(local(of.state[key]))
                elif is_given and moment.dtype is torch.float32:
                    continue  # stepped in place
                part = self._part(moment)
                if not same_memory(part, value):
                    storage.write_state(key, value, part, self.place, scratch)
            if self._is_last and (of.is_new or of.late):
                ordered = {key: of.late[key] if key in of.late else of.state[key] for key in stepped}
                of.state = optimizer.state[of.param] = ordered if of.is_new else {**of.state, **ordered}
        if self._is_last:
            storage.written(of.param, of.stored)
            if storage.key is not None and of.stored is not None:
                optimizer.state[of.param][storage.key] = of.stored

    def _may_stay(self, value: Any, dtype: torch.dtype) -> bool:
        """Whether what an optimizer allocated as state can be that of the parameter."""
        param, weight = self.of.param, self.of.weight
        is_alike = value.dtype is dtype and value.shape == param.shape and value.stride() == weight.stride()
        is_all = value.untyped_storage().nbytes() == value.nbytes
        return is_alike and is_all and type(value) is Tensor and not hasattr(param, "to_local")
