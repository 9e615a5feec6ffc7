"""Unmarked methods: others than forward run in float32 under mixed modes; a warning says so once per class.

Each public method of the model's own classes is wrapped: while one runs, a hook checks whether a layer of the model
computes without autocast. Forward is not wrapped.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_NOT_THE_USERS = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.utils")
_WATCH = "_precision_watch"

_said: weakref.WeakSet[type] = weakref.WeakSet()


def methods(module: nn.Module) -> Iterator[str]:
    """Yields the names of the public methods of a model's own classes, without forward and what nn.Module has."""
    seen = set(dir(nn.Module))
    for kind in type(module).__mro__:
        if kind.__module__.startswith(_NOT_THE_USERS) or kind in (nn.Module, object):
            continue
        for name, value in vars(kind).items():
            is_async = inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value)
            if isinstance(value, FunctionType) and not is_async and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name


def watching(name: str, device_type: str, mode: str) -> Callable[..., Callable[..., Any]]:
    """Returns a decorator for the method `name` of a model that is set up in `mode`."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def watch(self: nn.Module, cure: str) -> Iterator[None]:
            parts = {id(module) for module in self.modules()} - {id(self)}
            outside = False

            def look(module: nn.Module, inputs: Any) -> None:
                nonlocal outside
                outside = outside or (id(module) in parts and not torch.is_autocast_enabled(device_type))

            handle = register_module_forward_pre_hook(look)
            try:
                yield
            finally:
                handle.remove()
                if outside and type(self) not in _said:
                    _said.add(type(self))
                    warnings.warn(
                        f"{type(self).__name__}.{name} runs its layers in float32, since only forward runs in {mode}: "
                        f"{cure}, or run it in `with fabric.autocast():` [unmarked-method]",
                        stacklevel=4,  # past contextlib and the wrapper
                    )

        def is_silent(self: nn.Module) -> bool:
            return torch.compiler.is_compiling() or type(self) in _said or torch.is_autocast_enabled(device_type)

        def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_silent(self):
                return function(self, *args, **kwargs)
            with watch(self, f'call fabric.mark_forward_method(model, "{name}") after setup'):
                return function(self, *args, **kwargs)

        def watched_generator(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
            if is_silent(self):
                return (yield from function(self, *args, **kwargs))
            with watch(self, "have it call a method that fabric.mark_forward_method has marked"):
                return (yield from function(self, *args, **kwargs))

        new: Callable[..., Any] = watched_generator if inspect.isgeneratorfunction(function) else watched
        setattr(new, _WATCH, new)  # itself: who wraps it takes over its attributes
        return new

    return make


def is_watched(module: nn.Module, name: str) -> bool:
    """Whether the method `name` was overridden by `watching` alone."""
    function = getattr(module.__dict__.get(name), "__func__", None)
    return function is not None and getattr(function, _WATCH, None) is function
