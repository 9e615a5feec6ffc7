"""Overrides: bound methods put on one instance, named as what they replace.

That form, and no other that was tried, keeps everything a user does with a model: `fullgraph=True` compiles before and
after, export works, a deepcopy runs its own weights with the same precision, and a pickle gives back the plain object
(a bound method pickles as "the attribute of that name", which on the unpickled object is the class's own). A shallow
copy shares everything with its model, forward included.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import nn

_ORIGINAL = "_precision_original"
_PREVIOUS = "_precision_previous"
_made: ContextVar[list[Callable[[], None]] | None] = ContextVar("overrides made", default=None)


def override(obj: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Replaces the method `name` on `obj` by `make(function)` and returns what undoes it.

    `function(obj, ...)` is the method as it was, whoever put it there; `make` returns a function of the same form.
    What undoes it does not keep `obj` alive.
    """
    function = _unbound(obj, name)
    new = functools.wraps(function)(make(function))
    new.__name__ = name  # a bound method pickles by this name
    setattr(new, _ORIGINAL, function)
    if name in obj.__dict__:
        setattr(new, _PREVIOUS, obj.__dict__[name])
    obj.__dict__[name] = MethodType(new, obj)
    if not isinstance(obj, nn.Module):  # what stands in a module's dict goes into its pickle
        obj.__dict__[f"{_ORIGINAL}_{name}"] = MethodType(function, obj)
    obj_ref, new_ref = weakref.ref(obj), weakref.ref(new)

    def restore() -> None:
        obj, new = obj_ref(), new_ref()
        if obj is None or new is None:
            return
        obj.__dict__.pop(f"{_ORIGINAL}_{name}", None)
        if getattr(obj.__dict__.get(name), "__func__", None) is not new:
            return  # someone wrapped it since; who wraps must undo first
        if hasattr(new, _PREVIOUS):
            obj.__dict__[name] = getattr(new, _PREVIOUS)
        else:
            del obj.__dict__[name]

    if (made := _made.get()) is not None:
        made.append(restore)
    return restore


@contextmanager
def undone_on_error() -> Iterator[None]:
    """Context whose overrides, whoever makes them, are undone when it raises."""
    made: list[Callable[[], None]] = []
    token = _made.set(made)
    try:
        yield
    except BaseException:
        while made:
            made.pop()()
        raise
    finally:
        _made.reset(token)


def is_overridden(obj: Any, name: str) -> bool:
    """Whether `override` replaced the method `name` of `obj`, or of the module that `obj` is a copy of."""
    if isinstance(obj, nn.Module):
        return hasattr(obj.__dict__.get(name), _ORIGINAL)
    return f"{_ORIGINAL}_{name}" in obj.__dict__


def without_overrides(obj: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` less what `override` put into the dict of `obj`: torch's schedulers take their state from there.

    A value of the same name that is no method, as a scheduler of the user's may have one, stays.
    """
    ours = {name for name in obj.__dict__ if name.startswith(f"{_ORIGINAL}_")}
    ours |= {name.removeprefix(f"{_ORIGINAL}_") for name in ours}
    return {name: value for name, value in values.items() if not (name in ours and isinstance(value, MethodType))}


def original(obj: Any, name: str) -> Callable[..., Any]:
    """Returns the method `name` of an optimizer as it was before `override`, whoever wrapped it since."""
    method: Callable[..., Any] | None = obj.__dict__.get(f"{_ORIGINAL}_{name}")
    return getattr(obj, name) if method is None else method


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the module inside `torch.compile(module)`, where an override is traced; any other as it is."""
    if isinstance(model, torch.jit.ScriptModule):  # whose modules have no `get`
        return model
    inner = model._modules.get("_orig_mod")  # no getattr: a module takes long to say that it has no such attribute
    return model if inner is None else inner


def _unbound(obj: Any, name: str) -> Callable[..., Any]:
    method = getattr(obj, name)
    if isinstance(obj, torch.jit.ScriptModule):  # its methods are no functions, and a copy is to run its own

        @functools.wraps(method)
        def scripted(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.__getattr__(name)(*args, **kwargs)

        return scripted
    if getattr(method, "__self__", None) is obj:
        return method.__func__

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # a plain function that the user assigned to the instance
        return method(*args, **kwargs)

    return call
