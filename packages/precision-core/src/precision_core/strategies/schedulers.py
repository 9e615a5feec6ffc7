"""Schedulers whose step does nothing after a skipped optimizer step, without waiting for a GPU to say whether it was.

Whether a step under a scaled loss was skipped is known on the GPU alone when `optimizer.step()` returns. Its flag is
copied from there meanwhile; a scheduler's step is decided when somebody needs the rate: the optimizer's next step,
`get_last_lr` or `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_core.override import is_overridden, override, without_overrides
from precision_core.precision.base import Precision

_ASYNCHRONOUS = ("cuda", "xpu")
_NEED_THE_RATE = ("get_last_lr", "state_dict")


class Schedulers:
    """The schedulers of a run; keeps none of them alive, and no optimizer."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._of: WeakKeyDictionary[Optimizer, _Steps] = WeakKeyDictionary()

    def take(self, scheduler: Any, optimizers: Any) -> list[Callable[[], None]]:
        """Has the scheduler's step do nothing after a skipped step of its optimizer; returns what undoes it.

        Raises:
            ValueError: no scheduler, one that was set up before, or one of an optimizer that is not in `optimizers`.
        """
        call, name = "fabric.setup_schedulers", type(scheduler).__name__
        optimizer = getattr(scheduler, "optimizer", None)
        if not isinstance(optimizer, Optimizer) or not callable(getattr(scheduler, "step", None)):
            raise ValueError(f"{call} expected schedulers with an `optimizer` and a `step`, got a {name}")
        if optimizer not in optimizers:
            raise ValueError(f"{call}: set the optimizer of this {name} up first, with fabric.setup(model, optimizer)")
        if is_overridden(scheduler, "step"):
            raise ValueError(f"{call}: this {name} is set up already")
        steps = self._of.setdefault(optimizer, _Steps())
        return [
            override(scheduler, "step", steps.after_outcome),
            *(override(scheduler, name, steps.settled) for name in _NEED_THE_RATE if hasattr(scheduler, name)),
        ]

    def before_step(self, optimizer: Optimizer) -> None:
        """Gives the optimizer its rate: decides what its schedulers' steps since its last step do."""
        if self._of and (steps := self._of.get(optimizer)) is not None:
            steps.settle()

    def after_step(self, optimizer: Optimizer) -> None:
        """Takes note of whether the step was skipped, or has that copied from the device."""
        if self._of and (steps := self._of.get(optimizer)) is not None:
            steps.outcome = _Outcome(self._precision.scaler.was_skipped(optimizer))


class _Outcome:
    """Whether an optimizer's step was skipped: known, or on its way."""

    def __init__(self, skipped: bool | Tensor) -> None:
        self._event: torch.Event | None = None
        self._skipped = skipped
        if isinstance(skipped, Tensor) and skipped.device.type in _ASYNCHRONOUS:
            self._skipped = skipped.to("cpu", non_blocking=True)  # pinned memory
            self._event = torch.Event(skipped.device)
            self._event.record(torch.accelerator.current_stream(skipped.device))
        elif isinstance(skipped, Tensor):
            self._skipped = skipped.detach().clone()

    @property
    def is_known(self) -> bool:
        return isinstance(self._skipped, bool)

    def skipped(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        self._skipped, self._event = bool(self._skipped), None
        return self._skipped


class _Steps:
    """The steps of one optimizer's schedulers that wait for the outcome of its last step."""

    def __init__(self) -> None:
        self.outcome: _Outcome | None = None
        self._waiting: list[Callable[[], Any]] = []

    def settle(self) -> None:
        """Takes the steps that wait, or drops them if the optimizer's step was skipped."""
        waiting, self._waiting = self._waiting, []
        if waiting and self.outcome is not None and not self.outcome.skipped():
            for step in waiting:
                step()

    def after_outcome(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a scheduler's `step` that is decided by the outcome, now if that is known."""

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self.outcome is None:  # before the optimizer's first step, of which torch warns
                return function(scheduler, *args, **kwargs)
            self._waiting.append(lambda: function(scheduler, *args, **kwargs))
            if self.outcome.is_known:
                self.settle()
            return None

        return step

    def settled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a method of a scheduler that sees all its steps taken."""

        def method(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            self.settle()
            result = function(scheduler, *args, **kwargs)
            return without_overrides(scheduler, result) if function.__name__ == "state_dict" else result

        return method
