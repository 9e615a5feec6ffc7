"""Unsynced gradients: what FSDP2 accumulates unsharded under `no_backward_sync`, where `p.grad` does not show it.

FSDP2 adds them to the gradients of the next backward that reduces. So zeroing, unscaling and stepping have to look
here, too. torch has no public name for them: all that this package reads of FSDP2's private state is read here, and
tests/test_unsynced.py lists it. A name that torch no longer has is a `RuntimeError` at setup.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from precision_core.policy import listed
from precision_core.scaling import NameOf, Scaler, params_of

_GROUPS = ("_fsdp_param_groups", "_fsdp_param_group")
"""Of a module's FSDP state: the list of its groups; before that was a list, torch 2.9, its only group or None."""


class Unsynced:
    """The unsynced gradients of a run's sharded models."""

    def __init__(self) -> None:
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._expected = False  # that there are any: else nobody has to look for them

    def __reduce__(self) -> tuple[type[Unsynced], tuple[()]]:
        return Unsynced, ()  # in a process that is started with the strategy nothing is accumulated yet

    def add(self, root: nn.Module) -> None:
        """Takes a model that was sharded; raises `RuntimeError` where torch lacks a private name that is read here."""
        for handle in handles(root):
            _read(handle, "sharded_param"), _of(handle)
        self.roots.add(root)

    def expect(self, scaler: Scaler) -> None:
        """Takes note that there will be some; when its scale changes, `scaler` rescales them as it does `p.grad`."""
        self._expected = True
        scaler.unsynced = self._gradients

    def _gradients(self) -> list[Tensor]:
        return [gradient for root in self.roots for handle in handles(root) for gradient in _of(handle)]

    def drop(self, optimizer: Optimizer) -> None:
        """Drops the unsynced gradients of the optimizer's parameters."""
        if self._expected:
            params = set(params_of(optimizer))
            for root in self.roots:
                drop(root, params)

    def check_reduced(self, optimizer: Optimizer, name_of: NameOf) -> None:
        """Raises `RuntimeError` when parameters of `optimizer` have unsynced gradients, which its step would ignore."""
        if not self._expected:
            return
        params = set(params_of(optimizer))
        held = [_read(each, "sharded_param") for root in self.roots for each in handles(root) if _of(each)]
        names = [name_of(param) for param in held if param in params]
        if names:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() would ignore unsynced gradients, accumulated in "
                f"fabric.no_backward_sync: {listed(names, 5)}. Run the last backward of an accumulation outside of it, "
                "or drop them with zero_grad() [unsynced-gradients]"
            )
        self._expected = bool(held)


def groups_of(root: nn.Module) -> Iterator[Any]:
    """Yields torch's `FSDPParamGroup`s in `root`, each once: modules that are one group share a state."""
    sharded = [each for each in root.modules() if isinstance(each, FSDPModule)]
    states: dict[int, Any] = {id(state): state for each in sharded for state in [_read(each, "_get_fsdp_state")()]}
    for state in states.values():
        groups = _read(state, *_GROUPS)
        yield from (group for group in (groups if isinstance(groups, list) else [groups]) if group is not None)


def handles(root: nn.Module) -> Iterator[Any]:
    """Yields torch's `FSDPParam` of each parameter in `root`, once."""
    for group in groups_of(root):
        yield from _read(group, "fsdp_params")


def drop(root: nn.Module, params: Container[Tensor] | None = None) -> None:
    """Drops the unsynced gradients in `root`, or those of `params` in it."""
    for handle in handles(root):
        if params is None or _read(handle, "sharded_param") in params:
            if "unsharded_accumulated_grad" in vars(handle):  # in torch 2.15 a property: the `grad` below
                handle.unsharded_accumulated_grad = None
            if (unsharded := _unsharded(handle)) is not None:
                unsharded.grad = None


def dropping(drop: Callable[[Any], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator for the `zero_grad` of a model or an optimizer that calls `drop` with it first."""

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
    """Returns the unsynced gradients, each once: in the reduce dtype, and the unsharded parameter's `grad`.

    torch up to 2.14 may have both; in 2.15 they are one tensor.
    """
    unsharded = _unsharded(handle)
    found = (_read(handle, "unsharded_accumulated_grad"), None if unsharded is None else unsharded.grad)
    return list({id(gradient): gradient for gradient in found if gradient is not None}.values())


def _unsharded(handle: Any) -> nn.Parameter | None:
    """Returns the gathered parameter, which torch declares in the class and makes in the first gather."""
    name = "_unsharded_param"
    return None if name in type(handle).__annotations__ and name not in vars(handle) else _read(handle, name)


def _read(owner: Any, *names: str) -> Any:
    """Returns the first of these private attributes that there is; raises `RuntimeError` where torch has none."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise RuntimeError(
        f"torch {torch.__version__} has no {type(owner).__name__}.{' or '.join(names)}, a private name that "
        "FSDPStrategy reads for the gradients that fabric.no_backward_sync accumulates: use a torch that "
        "precision-fsdp was run with (its README says which), or a newer precision-fsdp"
    )
