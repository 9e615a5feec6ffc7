"""An optimizer's step: what is noted of it before it runs, and how many there were."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder


_PATIENCE = 10


class Steps:
    """Counts the steps that optimizers began, those left out by a scaler among them."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}
        self._made: list[weakref.ref[Optimizer]] = []

    def made(self, optimizer: Optimizer) -> None:
        """Called where an optimizer was made: it is waited for."""
        self._made.append(weakref.ref(optimizer))

    @property
    def any(self) -> bool:
        """Whether there is an optimizer."""
        return bool(self._begun) or any(each() is not None for each in self._made)

    def begin(self, optimizer: Optimizer) -> None:
        """Called where a step begins."""
        self._begun[id(optimizer)] = self._begun.get(id(optimizer), 0) + 1

    def of(self, optimizer: Optimizer) -> int:
        """Steps that this optimizer began."""
        return self._begun.get(id(optimizer), 0)

    @property
    def all(self) -> int:
        """Training steps: of the optimizer that steps least often, but not less than a tenth of another's."""
        counts = list(self._begun.values())
        made = (each() for each in self._made)
        waiting = any(each is not None and id(each) not in self._begun and _trains(each) for each in made)
        slowest = 0 if waiting else min(counts, default=0)
        return max(slowest, max(counts, default=0) // _PATIENCE)


def _trains(optimizer: Optimizer) -> bool:
    return any(param.requires_grad for group in optimizer.param_groups for param in group["params"])


def ids_of(optimizer: Any) -> list[int]:
    """Returns the ids of an optimizer's parameters."""
    return [id(param) for group in getattr(optimizer, "param_groups", ()) for param in group["params"]]


def state_of(optimizer: Any) -> dict[str, Any]:
    """Returns what an event says of an optimizer's parameters, before its step."""
    params = [param for group in getattr(optimizer, "param_groups", ()) for param in group["params"]]
    return {
        "ids": [id(param) for param in params],
        "without": [id(param) for param in params if param.requires_grad and param.grad is None],
        "dtypes": {param.dtype for param in params if param.requires_grad},
        "lrs": [
            float(lr)
            for group in getattr(optimizer, "param_groups", ())
            if isinstance(lr := group.get("lr"), (int, float))
        ],
    }


def note_step(recorder: Recorder, optimizer: Optimizer, closure: bool) -> None:
    """Notes that a step begins."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    trained, recast = recorder.record.trained, []
    for param in params:
        name = recorder.names.param(param)
        if name is not None and (old := trained.setdefault(name, param.dtype)) is not param.dtype:
            recast.append((name, old, param.dtype))
            trained[name] = param.dtype
    if recast:
        recorder.note("recast", names=[name for name, _, _ in recast], old=recast[0][1], new=recast[0][2])
    scale = getattr(optimizer, "grad_scale", None)
    recorder.note(
        "step",
        optimizer=recorder.keep(optimizer),
        name=type(optimizer).__name__,
        **state_of(optimizer),
        closure=closure,
        scaler=recorder.scaler_steps[-1] if recorder.scaler_steps else None,
        grad_scale=float(scale) if scale is not None else None,
        cache=recorder.open_cache(),
    )


def has_closure(args: Any, kwargs: Any) -> bool:
    """Whether a step was called with a closure, which computes the loss within it."""
    return any(callable(each) for each in (*args, *kwargs.values()))


def note_stepped(recorder: Recorder, optimizer: Optimizer) -> None:
    """Notes that a step with a closure has ended: its gradients are those that the update took."""
    name, scaler = type(optimizer).__name__, recorder.scaler_steps[-1] if recorder.scaler_steps else None
    kept = recorder.keep(optimizer)
    recorder.note(
        "stepped", optimizer=kept, name=name, **state_of(optimizer), closure=False, scaler=scaler, grad_scale=None
    )
