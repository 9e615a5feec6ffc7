"""Which tensors are gradients, or were computed from them, from a backward to the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from precision_lab.auditing.record import Event
from precision_lab.auditing.sample import local


@dataclass
class _Derived:
    """A tensor that was computed from gradients."""

    ids: list[int]
    events: list[Event] = field(default_factory=list)  # the changes to gradients that it would be, were it assigned


class Gradients:
    """Finds the parameters whose gradients a tensor is, or was computed from."""

    def __init__(self, params: Callable[[], list[nn.Parameter]]) -> None:
        self._params = params
        self._storages: dict[int, list[nn.Parameter]] | None = None
        self._derived: dict[int, _Derived] = {}
        self._before: dict[int, tuple[int, int]] = {}

    def find(self, written: Any) -> list[int]:
        """Returns the ids of the parameters whose gradients are among the tensors."""
        return [id(param) for each in _flat(written) for param in self._found(storage(each))]

    def computed_from(self, tensor: Tensor) -> list[int]:
        """Returns the ids of the parameters from whose gradients the tensor was computed, or whose gradient it is."""
        found = self._derived.get(storage(tensor))
        return found.ids if found is not None else self.find(tensor)

    def follow(self, inputs: list[Tensor], result: Any, event: Callable[[list[int]], Event | None]) -> None:
        """Called after an operation that may have read gradients; `event` makes what it is if it becomes a gradient."""
        if not self._known():
            return
        ids, events = dict[int, None](), list[Event]()
        for each in inputs:
            derived = self._derived.get(storage(each))
            ids.update(dict.fromkeys(self.find(each) if derived is None else derived.ids))
            events += [] if derived is None else derived.events
        for each in _flat(result):
            where = storage(each)
            if self._found(where):  # a view of one, or one that was written
                continue
            self._derived.pop(where, None)
            if ids:
                change = event(list(ids)) if each.dim() else None
                self._derived[where] = _Derived(list(ids), [*events, *([change] if change is not None else [])])

    def settle(self) -> None:
        """Called before gradients are used: one that was replaced by what was computed from it counts as changed."""
        if not self._derived:
            return
        for param in self._params():
            if param.grad is None:
                continue
            derived = self._derived.get(storage(param.grad))
            for event in derived.events if derived is not None else ():
                if id(param) not in event.ids:
                    event.ids.append(id(param))
        self.forget()

    def forget(self) -> None:
        """Called where gradients are other tensors than before."""
        self._storages = None
        self._derived.clear()

    def before_backward(self) -> None:
        """Notes each gradient that is there, and its version."""
        self._before = {
            id(param): (id(local(param.grad)), local(param.grad)._version)
            for param in self._params()
            if param.grad is not None
        }

    def after_backward(self) -> tuple[list[int], list[int]]:
        """Returns the ids of the parameters that backward gave a gradient, and of those that had none before."""
        self.forget()
        written, fresh = [], []
        for param in self._params():
            if param.grad is None:
                continue
            old = self._before.get(id(param))
            if old != (id(local(param.grad)), local(param.grad)._version):
                written.append(id(param))
                if old is None:
                    fresh.append(id(param))
        return written, fresh

    def _known(self) -> dict[int, list[nn.Parameter]]:
        if self._storages is None:
            self._storages = {}
            for param in self._params():
                if param.grad is not None and param.grad.layout is torch.strided:
                    self._storages.setdefault(storage(param.grad), []).append(param)
        return self._storages

    def _found(self, where: int) -> list[nn.Parameter]:
        # Memory of a gradient that was freed is that of something else now.
        found = self._known().get(where, ())
        return [param for param in found if param.grad is not None and storage(param.grad) == where]


def storage(tensor: Tensor) -> int:
    """Returns what tells the tensor's memory from that of others."""
    tensor = local(tensor)
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses without a storage of their own
        return -id(tensor)


def factor_of(name: str, args: tuple[Any, ...]) -> tuple[float | None, list[Tensor]]:
    """Returns the number that an operation multiplies its first argument with, and the tensors that come after it."""
    others = [each for each in _flat(args[1:]) if isinstance(each, Tensor)]
    base = name.removeprefix("_foreach_").removesuffix("_")
    if base not in ("mul", "div", "true_divide", "multiply", "divide") or len(args) < 2:
        return None, others
    values = list(_values(args[1]))
    if not values or any(each is None for each in values) or min(values) != max(values):  # type: ignore[type-var]
        return None, others
    value = float(values[0])  # type: ignore[arg-type]
    if base in ("mul", "multiply"):
        return value, others
    return (1 / value if value else None), others


def _values(operand: Any) -> Iterator[float | None]:
    for each in operand if isinstance(operand, (list, tuple)) else [operand]:
        if isinstance(each, Tensor):
            yield float(each) if each.numel() == 1 and not each.is_meta else None
        else:
            yield float(each) if isinstance(each, (int, float)) else None


def _flat(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from _flat(each)
