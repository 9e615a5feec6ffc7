"""Held back: gradients that FSDP keeps whole under `no_backward_sync`, where `p.grad` does not show them.

It adds them to those of the next backward that reduces. So who drops gradients, rescales them, or steps with them has
to ask here, too.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from precision_core.scaling import NameOf, Scaler, params_of
from precision_fsdp.limits import listed


class HeldBack:
    """The gradients that are held back in a run's sharded models."""

    def __init__(self) -> None:
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._expected = False  # that there are any: else nobody has to look for them

    def __reduce__(self) -> tuple[type[HeldBack], tuple[()]]:
        return HeldBack, ()  # in a process that is started with the strategy nothing is held yet

    def expect(self, scaler: Scaler) -> None:
        """Takes note that there will be some, which `scaler` brings to another scale as it does `p.grad`."""
        self._expected = True
        scaler.held_back = self._gradients

    def _gradients(self) -> list[Tensor]:
        return [gradient for root in self.roots for handle in handles(root) for gradient in _of(handle)]

    def drop(self, optimizer: Optimizer) -> None:
        """Drops those of the optimizer's parameters."""
        if self._expected:
            params = set(params_of(optimizer))
            for root in self.roots:
                drop(root, params)

    def check_reduced(self, optimizer: Optimizer, name_of: NameOf) -> None:
        """Raises `RuntimeError` when a step of `optimizer` would leave some out."""
        if not self._expected:
            return
        params = set(params_of(optimizer))
        held = [each.sharded_param for root in self.roots for each in handles(root) if _of(each)]
        names = [name_of(param) for param in held if param in params]
        if names:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() would leave out gradients that fabric.no_backward_sync holds back: "
                f"{listed(names, 5)}. Run the last backward of an accumulation outside of it, or drop them with "
                "zero_grad()"
            )
        self._expected = bool(held)


def handles(root: nn.Module) -> Iterator[Any]:
    """Yields what FSDP knows of each parameter in `root`, once: modules that are one group share it."""
    sharded = [each for each in root.modules() if isinstance(each, FSDPModule)]
    states: dict[int, Any] = {id(state): state for each in sharded for state in [each._get_fsdp_state()]}
    for state in states.values():
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.9 has one at most, of another name
        for group in [state._fsdp_param_group] if groups is None else groups:
            yield from group.fsdp_params if group is not None else ()


def drop(root: nn.Module, params: Container[Tensor] | None = None) -> None:
    """Drops what is held back in `root`, or of `params` in it."""
    for handle in handles(root):
        if params is None or handle.sharded_param in params:
            handle.unsharded_accumulated_grad = None
            if hasattr(handle, "_unsharded_param"):
                handle._unsharded_param.grad = None


def dropping(drop: Callable[[Any], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns what has the `zero_grad` of a model or an optimizer call `drop` with it, too."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
            drop(owner)
            return function(owner, *args, **kwargs)

        return zero_grad

    return make


def followed_by(closure: Callable[[], Any], check: Callable[[], None]) -> Callable[[], Any]:
    """Returns a closure that calls `check` when `closure` has run."""

    @functools.wraps(closure)
    def run() -> Any:
        result = closure()
        check()
        return result

    return run


def _of(handle: Any) -> list[Tensor]:
    """Those in the dtype of reduction and, where that is the gathered parameter's, in its `grad`."""
    unsharded = getattr(handle, "_unsharded_param", None)
    found = (handle.unsharded_accumulated_grad, None if unsharded is None else unsharded.grad)
    return [gradient for gradient in found if gradient is not None]
