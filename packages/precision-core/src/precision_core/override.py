"""Overrides: bound methods put on one instance, named as what they replace.

That form, and no other that was tried, keeps everything a user does with a model: `fullgraph=True` compiles before and
after, export works, a deepcopy runs its own weights with the same precision, and a pickle gives back the plain object
(a bound method pickles as "the attribute of that name", which on the unpickled object is the class's own).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

_ORIGINAL = "_precision_original"
_MISSING: Any = object()


def override(obj: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Replaces the method `name` on `obj` by `make(function)` and returns what undoes it.

    `function(obj, ...)` is the method as it was, whoever put it there; `make` returns a function of the same form.
    """
    previous = obj.__dict__.get(name, _MISSING)
    function = _unbound(obj, name)
    new = functools.wraps(function)(make(function))
    new.__name__ = name  # a bound method pickles by this name
    setattr(new, _ORIGINAL, function)
    obj.__dict__[name] = MethodType(new, obj)

    def restore() -> None:
        current = obj.__dict__.get(name)
        if getattr(current, "__func__", None) is not new:
            return  # someone wrapped it since; who wraps must undo first
        if previous is _MISSING:
            del obj.__dict__[name]
        else:
            obj.__dict__[name] = previous

    return restore


def is_overridden(obj: Any, name: str) -> bool:
    """Whether `override` replaced the method `name` of `obj`, directly or under someone's wrapper."""
    return hasattr(obj.__dict__.get(name), _ORIGINAL)


def original(obj: Any, name: str) -> Callable[..., Any]:
    """Returns the method `name` of `obj` as it was before `override`, bound to `obj`."""
    function = getattr(obj.__dict__.get(name), _ORIGINAL, None)
    return MethodType(function, obj) if function is not None else getattr(obj, name)


def _unbound(obj: Any, name: str) -> Callable[..., Any]:
    method = getattr(obj, name)
    if getattr(method, "__self__", None) is obj:
        return method.__func__

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # a plain function that the user assigned to the instance
        return method(*args, **kwargs)

    return call
