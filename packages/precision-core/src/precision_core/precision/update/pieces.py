"""Pieces: one step of an optimizer that sees float32 parameters, of which only a few elements exist at a time.

torch's optimizers walk through `self.param_groups` once a step. Here that walk gets copies of the groups that hold
placeholders, float32 tensors with slices of parameters, or with small ones as they are, their gradients and state; when
the optimizer asks for the next, what it did to the last ones is written back. So counters, hooks, schedulers and
closures are the user's own, once a step, and the arithmetic is torch's, on float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.precision.update.kinds import STEP
from precision_core.precision.update.layout import is_dense, local
from precision_core.precision.update.piece import Piece, prepared
from precision_core.precision.update.rows import Row, Rows, copy_all, row_size
from precision_core.precision.update.storage import Storage
from precision_core.precision.update.whole import narrowed, widened
from precision_core.scaling.scaler import Unscale, as_it_is

Group = dict[str, Any]


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
        self._numbers = {} if storage.noise is None else storage.noise.numbers(optimizer)

    def __iter__(self) -> Iterator[Group]:
        if self._is_walked:  # by somebody who looks on, a torch function mode say
            return super().__iter__()
        self._is_walked = True
        return self._walk()

    def _walk(self) -> Iterator[Group]:
        stored = [param for group in self._mine for param in group["params"] if self._is_stored(param)]
        self._size_rows(stored)
        for group in self._mine:
            rest, whole, cut = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
            for param in group["params"]:
                each = cut if self._may_cut(param) else whole if self._is_stored(param) else rest
                each.append(param)
            if rest:
                yield {**group, "params": rest}
            for param in whole:
                yield from self._whole(group, param)
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
        if not self._by_pieces or not self._is_stored(param):
            return False
        assert param.grad is not None
        return param.grad.layout is torch.strided and is_dense(local(param))

    # ---------------------------------------------------------------- pieces

    def _size_rows(self, stored: list[nn.Parameter]) -> None:
        """Decides how many elements to step at a time: a row each for values, gradients and moments that are half."""
        total, moments = sum(local(param).numel() for param in stored), 0
        if self._storage.state is not torch.float32:
            states = [self._optimizer.state.get(param, {}) for param in stored]
            moments = max((sum(_is_half(value) for value in state.values()) for state in states), default=0)
        others = 0 if self._storage.noise is None else 2  # it has two of its own
        allocates = not all(group.get("fused") for group in self._mine)
        self._limit = row_size(total, 2 + moments + others, STEP, allocates=allocates)
        self._rows = Rows(2 + moments, min(self._limit, total))

    def _batches(self, params: Iterable[nn.Parameter]) -> Iterator[list[Piece]]:
        """Yields what to step together: pieces of at most `_limit` elements in all."""
        batch: list[Piece] = []
        room = self._limit
        for param in params:
            each, start = prepared(self._optimizer, self._storage, param, self._numbers, self._limit), 0
            while True:
                left = each.size - start
                if left > room and room < self._limit:  # the rest of a batch is too small a piece
                    yield batch
                    batch, room = [], self._limit
                stop = start + min(left, room)
                batch.append(Piece(each, start, stop))
                room -= stop - start
                if stop == each.size:
                    break
                yield batch
                batch, room, start = [], self._limit, stop
            if room < STEP:
                yield batch
                batch, room = [], self._limit
        if batch:
            yield batch

    def _step(self, group: Group, batch: list[Piece]) -> Iterator[Group]:
        optimizer, storage = self._optimizer, self._storage
        row, scratch, *spare = self._rows.cut([piece.weight.shape for piece in batch], batch[0].weight.device)
        weights = [piece.weight for piece in batch]
        besides = [piece.beside for piece in batch if piece.beside is not None]
        values = storage.read(weights, besides, row, scratch)
        gradients = self._gradients(batch, scratch)
        for number, (piece, value, gradient) in enumerate(zip(batch, values.parts, gradients, strict=True)):
            placeholder = nn.Parameter(value, requires_grad=piece.of.param.requires_grad)
            placeholder.grad = gradient
            if vars(piece.of.param):
                vars(placeholder).update(vars(piece.of.param))
            self._placeholders.append(placeholder)
            piece.give_state(optimizer, placeholder, storage.key, (each.parts[number] for each in spare))
        yield {**group, "params": self._placeholders[:]}
        places = [] if storage.noise is None else [piece.place for piece in batch]
        storage.write(values, weights, besides, places, scratch)
        for piece, placeholder, part in zip(batch, self._placeholders, scratch.parts, strict=True):
            piece.take_state(optimizer, placeholder, storage, part)
        self._placeholders.clear()

    def _gradients(self, batch: list[Piece], scratch: Row) -> list[Tensor]:
        """Returns float32 gradients: those that are so as they are, unscaled already, others in `scratch`."""
        gradients = [piece.gradient for piece in batch]
        half = [number for number, gradient in enumerate(gradients) if gradient.dtype is not torch.float32]
        if half:
            copy_all([scratch.parts[number] for number in half], [gradients[number] for number in half])
        for number in half:
            gradients[number] = self._unscale(batch[number].of.param, scratch.parts[number])
        return gradients

    # ---------------------------------------------------------------- one parameter at a time

    def _whole(self, group: Group, param: nn.Parameter) -> Iterator[Group]:
        placeholder = widened(self._optimizer, self._storage, param, self._unscale)
        self._placeholders.append(placeholder)
        yield {**group, "params": [placeholder]}
        narrowed(self._optimizer, self._storage, param, placeholder, self._numbers)
        self._placeholders.clear()


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float32
