"""Scaler: the null object of loss scaling, for every mode that does not scale. `LossScaler` overrides what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.override import original
from precision_core.scaling.clipping import Clip, clip_unscaled
from precision_core.scaling.counters import StepCounter

NameOf = Callable[[Tensor], str]
"""Gives a parameter's dotted name, for messages."""

Unscale = Callable[[nn.Parameter, Tensor], Tensor]
"""Unscales a float32 copy of a parameter's gradient, or of a slice of it, in place; returns it."""


def as_it_is(param: nn.Parameter, gradient: Tensor) -> Tensor:
    """Returns the gradient, which carries no scale."""
    return gradient


class Scaler:
    """Does not scale: loss and gradients are as they come, and a step is the optimizer's own."""

    def __init__(self) -> None:
        self.counter = StepCounter()
        self.unsynced: Callable[[], list[Tensor]] = list
        """Returns unsynced gradients: an engine keeps them for a later reduction, and `p.grad` does not show them."""

    @property
    def factor(self) -> float:
        """By what the loss is multiplied, after a pending update."""
        return 1.0

    def register(self, optimizers: Iterable[Optimizer]) -> None:
        """Adds optimizers of the run."""

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss to call backward on."""
        return loss

    def after_backward(self) -> None:
        """Called when the backward of a loss that `scale` returned has ended."""

    def replacing(self) -> AbstractContextManager[Any]:
        """Context in which an engine may replace gradients by equal ones; elsewhere that is a change by the user."""
        return nullcontext()

    def unscaled(self, scaled: Tensor) -> Tensor:
        """Returns the loss that `scale` was given."""
        return scaled

    def unscaling(self, optimizer: Optimizer) -> Unscale:
        """Returns what gradients of `optimizer` that a step widens are to go through, during that step."""
        return as_it_is

    def unscale(self, optimizer: Optimizer) -> None:
        """Divides the gradients of `optimizer` by the scale, at most once per step."""

    def clip(
        self, optimizer: Optimizer | None, params: list[nn.Parameter], clip: Clip, name_of: NameOf
    ) -> Tensor | None:
        """Unscales and clips the gradients of `params`; returns their unscaled norm for `max_norm`, else None."""
        return clip_unscaled(params, clip)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, name_of: NameOf, **kwargs: Any) -> Any:
        """Steps `optimizer`; returns the closure's result when there is one, else what the optimizer returns."""
        step = original(optimizer, "step")
        result = step(**kwargs) if closure is None else step(closure, **kwargs)
        self.counter.steps += 1
        return result

    def was_skipped(self, optimizer: Optimizer) -> bool | Tensor:
        """Whether the last step of `optimizer` was skipped; a tensor, not zero if so, where only its device knows."""
        return self.counter.last_skipped

    def check_skips(self, name_of: NameOf) -> None:
        """Raises `FloatingPointError` when too many steps in a row were skipped."""

    def teardown(self) -> None:
        """Unscales gradients that were not stepped, and stops watching them."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and what its growth depends on; empty when there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; raises `ValueError`, with nothing changed, for anything else."""


NO_SCALER = Scaler()
