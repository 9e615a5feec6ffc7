"""Calls of torch that a step consists of, replaced within the `with`: backward, scaling, clipping, a scaler's step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_core import Precision

if TYPE_CHECKING:
    from precision_lab.watching.watch import Watch

Around = Callable[..., Any]


@contextmanager
def replaced(watch: Watch) -> Iterator[None]:
    """Context in which the calls tell the watch; afterwards everything is as it was."""
    undo: list[Callable[[], None]] = []
    try:
        for owner, name, around in _calls():
            original = owner.__dict__[name]
            setattr(owner, name, _wrap(original, around, watch))
            undo.append(functools.partial(setattr, owner, name, original))
        undo += [_own_step(watch, each) for each in watch.optimizers if "step" in vars(each)]
        yield
    finally:
        while undo:
            undo.pop()()


def _wrap(original: Any, around: Around, watch: Watch) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        # One that somebody imported while it was in place does nothing later.
        return around(watch, original, *args, **kwargs) if watch.running else original(*args, **kwargs)

    return call


def _calls() -> Iterator[tuple[Any, str, Around]]:
    yield torch.Tensor, "backward", _backward
    yield torch.autograd, "backward", _backward
    for scaler in _with_subclasses(torch.amp.GradScaler):
        if "scale" in vars(scaler):
            yield scaler, "scale", _scale
        if "step" in vars(scaler):
            yield scaler, "step", _scaler_step
    yield torch.nn.utils.clip_grad, "clip_grad_norm_", _clip
    yield torch.nn.utils, "clip_grad_norm_", _clip
    for plugin in _with_subclasses(Precision):
        if "pre_backward" in vars(plugin):
            yield plugin, "pre_backward", _pre_backward
        if "clip_gradients" in vars(plugin):
            yield plugin, "clip_gradients", _clip


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _backward(watch: Watch, original: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    if watch.in_backward:
        return original(tensors, *args, **kwargs)
    first = (
        tensors if isinstance(tensors, Tensor) else next((each for each in tensors if isinstance(each, Tensor)), None)
    )
    watch.before_backward(first)
    watch.in_backward += 1
    try:
        return original(tensors, *args, **kwargs)
    finally:
        watch.in_backward -= 1


def _scale(watch: Watch, original: Any, scaler: Any, outputs: Any) -> Any:
    result = original(scaler, outputs)
    if scaler.is_enabled():
        watch.scaled(scaler, outputs, result)
    return result


def _scaler_step(watch: Watch, original: Any, scaler: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    return watch.around_step(optimizer, lambda: original(scaler, optimizer, *args, **kwargs), scaler.is_enabled())


def _pre_backward(watch: Watch, original: Any, plugin: Precision, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = original(plugin, tensor, *args, **kwargs)
    if result is not tensor:
        watch.scaled(getattr(plugin.scaler, "torch_scaler", None), tensor, result)
    return result


def _clip(watch: Watch, original: Any, *args: Any, **kwargs: Any) -> Any:
    norm = original(*args, **kwargs)
    if isinstance(norm, Tensor):
        watch.clipped(norm)
    return norm


def _own_step(watch: Watch, optimizer: Optimizer) -> Callable[[], None]:
    """Wraps the step that an engine, our Fabric's say, has put on one optimizer: it may leave out torch's own."""
    before = vars(optimizer)["step"]

    @functools.wraps(before)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not watch.running:
            return before(*args, **kwargs)
        return watch.around_step(self, lambda: before(*args, **kwargs), watch.current.is_scaled)

    mine = MethodType(step, optimizer)
    vars(optimizer)["step"] = mine

    def restore() -> None:
        if vars(optimizer).get("step") is mine:  # else somebody wrapped it since, and mine does nothing any more
            vars(optimizer)["step"] = before

    return restore
