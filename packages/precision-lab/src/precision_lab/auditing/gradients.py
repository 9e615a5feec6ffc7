"""Which tensors are gradients, or were computed from them, from a backward to the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from precision_lab.auditing.record import Event
from precision_lab.auditing.sample import local

_MANY = 1000


@dataclass
class _Derived:
    """A tensor that was computed from gradients."""

    memory: StorageWeakRef
    ids: list[int]
    degree: float  # it grows with this power of the gradients' scale
    events: list[Event] = field(default_factory=list)  # the changes to gradients that it would be, were it assigned


class Gradients:
    """Finds the parameters whose gradients a tensor is, or was computed from."""

    def __init__(self, params: Callable[[], list[nn.Parameter]]) -> None:
        self._params = params
        self._storages: dict[int, list[nn.Parameter]] | None = None
        self._derived: dict[int, _Derived] = {}
        self._before: dict[int, tuple[int, int]] = {}

    @property
    def nothing_known(self) -> bool:
        """Whether there is no gradient, nor anything that was computed from one."""
        return not self._derived and not self._known()

    def find(self, written: Any) -> list[int]:
        """Returns the ids of the parameters whose gradients are among the tensors."""
        return [id(param) for each in _flat(written) for param in self._found(storage(each))]

    def computed_from(self, tensor: Tensor) -> list[int]:
        """Returns the ids of the parameters from whose gradients the tensor was computed, or whose gradient it is."""
        found = self._made_of(tensor)
        return found.ids if found is not None else self.find(tensor)

    def degree(self, tensor: Tensor) -> float:
        """Returns with which power of the gradients' scale a tensor grows: 1 for gradients, 0 for all others."""
        found = self._made_of(tensor)
        return found.degree if found is not None else 1.0 if self.find(tensor) else 0.0

    def follow(
        self,
        name: str,
        args: tuple[Any, ...],
        inputs: list[Tensor],
        result: Any,
        event: Callable[[list[int]], Event | None],
    ) -> None:
        """Called after an operation that may have read gradients; `event` makes what it is if it becomes a gradient."""
        if self.nothing_known:
            return
        ids, events = dict[int, None](), list[Event]()
        for each in inputs:
            derived = self._made_of(each)
            ids.update(dict.fromkeys(self.find(each) if derived is None else derived.ids))
            # What a number was computed by is no change of the gradients that it is multiplied with.
            events += derived.events if derived is not None and each.dim() else []
        degree = degree_of(name, args, [self.degree(each) for each in inputs]) if ids else 0.0
        if result is None and name.startswith("_foreach_"):  # in place
            result = args[0]
        for each in _flat(result):
            where = storage(each)
            if self._found(where):  # a view of one, or one that was written
                continue
            self._derived.pop(where, None)
            if ids and where > 0:
                change = event(list(ids)) if each.dim() else None
                memory = StorageWeakRef(local(each).untyped_storage())
                self._derived[where] = _Derived(
                    memory, list(ids), degree, [*events, *([change] if change is not None else [])]
                )

    def copied(self, into: Any, values: Any) -> None:
        """Called where tensors were copied into gradients: what was computed from gradients counts as changed."""
        for target, value in zip(_flat(into), _flat(values), strict=False):
            derived = self._made_of(value)
            for event in derived.events if derived is not None else ():
                event.ids.extend(each for each in self.find(target) if each not in event.ids)

    def returned(self, inputs: Any, result: Any, event: Event) -> None:
        """Called with what torch.autograd.grad returned for the inputs: gradients, if parameters get them."""
        for given, each in zip(_flat(inputs), result, strict=False):
            if isinstance(given, nn.Parameter) and isinstance(each, Tensor) and storage(each) > 0:
                memory = StorageWeakRef(local(each).untyped_storage())
                self._derived[storage(each)] = _Derived(memory, [id(given)], 1.0, [event])

    def settle(self) -> None:
        """Called before gradients are used: one that was replaced by what was computed from it counts as changed."""
        if not self._derived:
            return
        for param in self._params():
            if param.grad is None:
                continue
            derived = self._made_of(param.grad)
            for event in derived.events if derived is not None else ():
                if id(param) not in event.ids:
                    event.ids.append(id(param))
        self.forget()

    def forget(self) -> None:
        """Called where gradients are other tensors than before."""
        self._storages = None
        if len(self._derived) > _MANY:
            self._derived = {key: each for key, each in self._derived.items() if not each.memory.expired()}

    def before_backward(self) -> None:
        """Notes each gradient that is there, and its version."""
        self._before = {
            id(param): (id(local(param.grad)), local(param.grad)._version)
            for param in self._params()
            if param.grad is not None and _says_something(local(param.grad))
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

    def _made_of(self, tensor: Tensor) -> _Derived | None:
        found = self._derived.get(storage(tensor)) if self._derived else None
        return found if found is not None and not found.memory.expired() else None

    def _known(self) -> dict[int, list[nn.Parameter]]:
        if self._storages is None:
            self._storages = {}
            for param in self._params():
                if param.grad is not None and param.grad.layout is torch.strided:
                    self._storages.setdefault(storage(param.grad), []).append(param)
        return self._storages

    def _found(self, where: int) -> list[nn.Parameter]:
        # Memory of a gradient that was freed is that of something else now.
        found = self._known().get(where, [])
        derived = self._derived.get(where)
        if not found and derived is not None and not derived.memory.expired():  # one that was assigned since
            found = [param for param in self._params() if id(param) in derived.ids]
        return [param for param in found if param.grad is not None and storage(param.grad) == where]


def _says_something(gradient: Tensor) -> bool:
    """Whether a gradient is there, that was not set to zero."""
    with _disable_current_modes():
        return gradient.is_meta or bool(torch.count_nonzero(gradient.detach()))


_PRODUCTS = frozenset(["mul", "mm", "bmm", "dot", "vdot", "mv", "addmm", "addcmul", "multiply"])
_COMPARES = frozenset(
    ["lt", "le", "gt", "ge", "eq", "ne", "sign", "argmax", "isfinite", "isnan", "isinf", "any", "all"]
)


def degree_of(name: str, args: tuple[Any, ...], degrees: list[float]) -> float:
    """Returns the degree of an operation's result, by those of the tensors among its arguments."""
    base = name.removeprefix("_foreach_").removesuffix("_")
    first = degrees[0] if degrees else 0.0
    if base in _COMPARES:
        return 0.0
    if base in _PRODUCTS and not name.startswith("_foreach_"):
        return sum(degrees)
    if base in ("div", "divide", "true_divide") and len(args) > 1 and isinstance(args[1], Tensor):
        return first - degrees[1]
    if base == "reciprocal":
        return -first
    if base in ("sqrt", "rsqrt"):
        return first / 2 if base == "sqrt" else -first / 2
    if base in ("square", "var"):
        return 2 * first
    if base == "pow" and len(args) > 1 and isinstance(args[1], (int, float)):
        return first * args[1]
    return max(degrees, key=abs, default=0.0)


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
            value = local(each)
            yield float(value) if value.numel() == 1 and not value.is_meta else None
        else:
            yield float(each) if isinstance(each, (int, float)) else None


def _flat(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from _flat(each)
