"""Pieces: one step of an optimizer that sees float32 parameters, of which only a few elements exist at a time.

torch's optimizers walk through `self.param_groups` once a step. Here that walk gets copies of the groups that hold
placeholders, float32 tensors of one dimension with slices of parameters, their gradients and state; when the optimizer
asks for the next, what it did to the last ones is written back. So counters, hooks, schedulers and closures are the
user's own, once a step, and the arithmetic is torch's, on float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.precision.update.kinds import STEP
from precision_core.precision.update.layout import alike, dense, flat, is_dense, local, same_memory
from precision_core.precision.update.noise import Place, index_of
from precision_core.precision.update.storage import Storage, wide_copy
from precision_core.scaling.scaler import Unscale, as_it_is

Group = dict[str, Any]

_LARGEST = 1 << 18
"""Elements at a time: what they take stays in a CPU's cache, and there are enough that calls cost little."""
_SHARE = 32
"""At most 1 / 32 of all elements at a time: two float32 numbers each, so 0.25 bytes a parameter."""


@dataclass
class Param:
    """A parameter in a step: its elements in the order of memory, and its state."""

    param: nn.Parameter
    weight: Tensor
    gradient: Tensor
    beside: Tensor | None
    stored: Tensor | None
    """`beside`, as the optimizer's state has it."""
    moments: dict[str, Tensor]
    is_new: bool
    """Whether it has no state yet."""
    number: int
    """Its place among the optimizer's parameters."""
    first: int
    index: Tensor | None
    """Where its elements are in the full parameter: the first, or all."""
    late: dict[str, Any] = field(default_factory=dict)
    """Counters, which change when its last piece has stepped."""


class Groups(list[Group]):
    """The groups of an optimizer, which yields copies with placeholders where it is walked through, once."""

    def __init__(self, optimizer: Optimizer, storage: Storage, *, by_pieces: bool, unscale: Unscale = as_it_is) -> None:
        super().__init__(optimizer.param_groups)
        self._unscale = unscale
        self._optimizer = optimizer
        self._storage = storage
        self._by_pieces = by_pieces
        self._mine = optimizer.param_groups
        self._placeholders: list[nn.Parameter] = []
        self._is_walked = False
        self._memory: Tensor | None = None
        params = [param for group in self._mine for param in group["params"] if self._is_stored(param)]
        self._total = sum(local(param).numel() for param in params)
        self._limit = _limit(self._total)
        self._numbers = {} if storage.noise is None else storage.noise.numbers(optimizer)

    def __iter__(self) -> Iterator[Group]:
        if self._is_walked:  # by somebody who looks on, a torch function mode say
            return super().__iter__()
        self._is_walked = True
        return self._walk()

    def _walk(self) -> Iterator[Group]:
        for group in self._mine:
            stored = [param for param in group["params"] if self._is_stored(param)]
            others = {id(param) for param in stored}
            rest = [param for param in group["params"] if id(param) not in others]
            if rest:
                yield {**group, "params": rest}
            whole = [param for param in stored if not self._may_cut(param)]
            for param in whole:
                yield from self._whole(group, param)
            cut = [param for param in stored if self._may_cut(param)]
            for batch in self._batches(cut):
                yield from self._step(group, batch)
        self.restore()

    def restore(self) -> None:
        """Gives the optimizer its own groups back; hooks and whoever comes after the step see those."""
        self._optimizer.param_groups = self._mine
        for placeholder in self._placeholders:
            self._optimizer.state.pop(placeholder, None)
        self._placeholders.clear()

    def _is_stored(self, param: nn.Parameter) -> bool:
        return param.dtype is self._storage.params and param.grad is not None

    def _may_cut(self, param: nn.Parameter) -> bool:
        assert param.grad is not None
        return self._by_pieces and param.grad.layout is torch.strided and is_dense(local(param))

    # ---------------------------------------------------------------- pieces

    def _batches(self, params: Iterable[nn.Parameter]) -> Iterator[list[tuple[Param, int, int]]]:
        """Yields what to step together: (parameter, first element, end), of at most `_limit` elements in all."""
        batch: list[tuple[Param, int, int]] = []
        room = self._limit
        for param in params:
            prepared, start = self._prepare(param), 0
            while True:
                left = prepared.weight.numel() - start
                if left > room and room < self._limit:  # the rest of a batch is too small a piece
                    yield batch
                    batch, room = [], self._limit
                stop = start + min(left, room)
                batch.append((prepared, start, stop))
                room -= stop - start
                if stop == prepared.weight.numel():
                    break
                yield batch
                batch, room, start = [], self._limit, stop
            if room < STEP:
                yield batch
                batch, room = [], self._limit
        if batch:
            yield batch

    def _prepare(self, param: nn.Parameter) -> Param:
        storage, state = self._storage, self._optimizer.state.get(param, {})
        weight = local(param)
        gradient, stored = alike(local(param.grad), weight), storage.beside(param)  # type: ignore[arg-type]
        rest = None if stored is None else flat(alike(local(stored), weight))
        moments = {}
        for key, value in state.items():
            dtype = None if key == storage.key else storage.state_dtype(key, value, param)
            if dtype is None:
                continue
            moment = local(value)
            if moment.dtype is not dtype or moment.stride() != weight.stride():
                state[key] = torch.empty_like(param, dtype=dtype)
                moment = local(state[key]).copy_(moment)
            moments[key] = flat(moment)
        is_new = not any(key != storage.key for key in state)
        place = place_of(param, self._numbers)
        return Param(param, flat(weight), flat(gradient), rest, stored, moments, is_new, *place)

    def _step(self, group: Group, batch: list[tuple[Param, int, int]]) -> Iterator[Group]:
        size = sum(stop - start for _, start, stop in batch)
        values, gradients = self._room(size, batch[0][0].weight.device)
        offset, given = 0, []
        for each, start, stop in batch:
            here = slice(offset, offset + stop - start)
            offset = here.stop
            given.append(self._placeholder(each, slice(start, stop), values[here], gradients[here]))
        yield {**group, "params": self._placeholders[:]}
        for (each, start, stop), placeholder, state in zip(batch, self._placeholders, given, strict=True):
            self._write(each, slice(start, stop), placeholder, state)
        self._placeholders.clear()

    def _room(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns memory for so many values and gradients: always the same, as fresh memory costs a CPU page faults."""
        if self._memory is None or self._memory.device != device or self._memory.shape[1] < size:
            self._memory = torch.empty(2, max(size, min(self._limit, self._total)), device=device)
        values, gradients = self._memory.unbind()
        return values[:size], gradients[:size]

    def _placeholder(self, each: Param, piece: slice, value: Tensor, gradient: Tensor) -> dict[str, Any]:
        """Makes the placeholder of a piece, in `value` and `gradient`; returns the state that the optimizer finds."""
        beside = None if each.beside is None else each.beside[piece]
        value = self._storage.read(each.weight[piece], beside, value)
        placeholder = nn.Parameter(value, requires_grad=each.param.requires_grad)
        placeholder.grad = self._gradient(each, piece, gradient)
        vars(placeholder).update(vars(each.param))
        self._placeholders.append(placeholder)
        if each.is_new:
            return {}
        state = {}
        is_cut = piece.start != 0 or piece.stop != each.weight.numel()
        for key, kept in self._optimizer.state[each.param].items():
            if key in each.moments:
                state[key] = each.moments[key][piece].float()  # the memory itself where it is float32
            elif key != self._storage.key:
                state[key] = kept.clone() if is_cut and isinstance(kept, Tensor) else kept
        self._optimizer.state[placeholder] = state
        return dict(state)

    def _gradient(self, each: Param, piece: slice, out: Tensor) -> Tensor:
        gradient = each.gradient[piece]
        if gradient.dtype is torch.float32:  # they are unscaled where they are
            return gradient
        return self._unscale(each.param, out.copy_(gradient))

    def _write(self, each: Param, piece: slice, placeholder: nn.Parameter, given: dict[str, Any]) -> None:
        """Writes back what the optimizer did to a placeholder: its values, and its state, which was `given`."""
        storage, optimizer, param = self._storage, self._optimizer, each.param
        beside = None if each.beside is None else each.beside[piece]
        place = Place(each.number, each.first + piece.start, each.index)
        storage.write(placeholder.detach(), each.weight[piece], beside, place)
        stepped = optimizer.state.pop(placeholder, None)
        is_last = piece.stop == each.weight.numel()
        if stepped is not None:
            state = optimizer.state[param]
            for key, value in stepped.items():
                moment = each.moments.get(key)
                if moment is None:
                    dtype = storage.state_dtype(key, value, param)
                    if dtype is None:
                        each.late[key] = value
                        continue
                    state[key] = torch.empty_like(param, dtype=dtype)
                    moment = each.moments[key] = flat(local(state[key]))
                elif value is given.get(key) and moment.dtype is torch.float32:
                    continue  # stepped in place
                part = moment[piece]
                if not same_memory(part, value):
                    storage.write_state(key, value, part, place)
            if is_last:
                ordered = {key: each.late[key] if key in each.late else state[key] for key in stepped}
                optimizer.state[param] = ordered if each.is_new else {**state, **ordered}
        if is_last:
            self._finish(param, each.stored, each.beside)

    def _finish(self, param: nn.Parameter, stored: Tensor | None, beside: Tensor | None) -> None:
        storage = self._storage
        storage.written(param, stored)
        if storage.key is not None and stored is not None:
            self._optimizer.state[param][storage.key] = stored

    # ---------------------------------------------------------------- one parameter at a time

    def _whole(self, group: Group, param: nn.Parameter) -> Iterator[Group]:
        placeholder = widened(self._optimizer, self._storage, param, self._unscale)
        self._placeholders.append(placeholder)
        yield {**group, "params": [placeholder]}
        narrowed(self._optimizer, self._storage, param, placeholder, self._numbers)
        self._placeholders.clear()


def widened(optimizer: Optimizer, storage: Storage, param: nn.Parameter, unscale: Unscale = as_it_is) -> nn.Parameter:
    """Returns a float32 placeholder of a whole parameter, with its gradient; it takes over the optimizer's state."""
    placeholder = nn.Parameter(wide_copy(storage, param), requires_grad=param.requires_grad)
    assert param.grad is not None
    is_wide = param.grad.dtype is torch.float32
    placeholder.grad = param.grad if is_wide else unscale(param, param.grad.float())
    vars(placeholder).update(vars(param))
    kept = {key: value for key, value in optimizer.state.get(param, {}).items() if key != storage.key}
    if kept:
        wide = {key: storage.state_dtype(key, value, param) is not None for key, value in kept.items()}
        optimizer.state[placeholder] = {key: value.float() if wide[key] else value for key, value in kept.items()}
    return placeholder


def narrowed(
    optimizer: Optimizer,
    storage: Storage,
    param: nn.Parameter,
    placeholder: nn.Parameter,
    numbers: Mapping[int, int],
) -> None:
    """Writes a placeholder of `widened` back into the parameter that it stood for, and its state."""
    stored, weight = storage.beside(param), local(param)
    written = dense(weight)
    beside = None if stored is None else flat(alike(local(stored), written))
    place = Place(*place_of(param, numbers))
    storage.write(flat(local(placeholder)), flat(written), beside, place)
    if written is not weight:
        weight.copy_(written)
    stepped = optimizer.state.pop(placeholder, None)
    if stepped is not None:
        for key, value in stepped.items():
            dtype = storage.state_dtype(key, value, param)
            if dtype is not None and value.dtype is not dtype:
                stepped[key] = torch.empty_like(value, dtype=dtype)
                storage.write_state(key, local(value), local(stepped[key]), place)
        optimizer.state[param] = stepped
    storage.written(param, stored)
    if storage.key is not None and stored is not None:
        optimizer.state[param][storage.key] = stored


def place_of(param: nn.Parameter, numbers: Mapping[int, int]) -> tuple[int, int, Tensor | None]:
    """Returns the number of `param`, and where its elements are in the full parameter."""
    return (numbers[id(param)], *index_of(param)) if numbers else (0, 0, None)


def _limit(total: int) -> int:
    """Returns how many elements of `total` to step at a time, a multiple of `STEP`."""
    return max(STEP, min(_LARGEST, total // _SHARE // STEP * STEP))
