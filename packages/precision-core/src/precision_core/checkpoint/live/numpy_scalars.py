"""numpy's scalars (`numpy.mean(losses)`, a scheduler's best metric) as Python's, which weights_only loads take."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

_PYTHONS = (bool, int, float, complex, str, bytes)


def as_python(tree: Any) -> Any:
    """Returns `tree` with each numpy scalar in its dicts (keys too), lists and tuples as Python's of the same value.

    What has no equal in Python (datetime64, longdouble) stays. Containers without numpy scalars are returned as they
    are, and a container that occurs several times stays one object.
    """
    numpy = sys.modules.get("numpy")  # without the import there are no scalars of it
    return tree if numpy is None else _as_python(tree, numpy.generic, {})


def _as_python(tree: Any, scalar: type, done: dict[int, Any]) -> Any:
    if isinstance(tree, scalar):
        value = tree.item()  # type: ignore[attr-defined]
        return value if type(value) in _PYTHONS else tree
    if isinstance(tree, Tensor) or not isinstance(tree, (dict, list, tuple)):
        return tree
    if id(tree) in done:
        return done[id(tree)]
    done[id(tree)] = tree  # for one that contains itself: an error later
    if isinstance(tree, dict):
        items = [(_as_python(key, scalar, done), _as_python(value, scalar, done)) for key, value in tree.items()]
        old: list[Any] = [each for item in tree.items() for each in item]
        new = [each for item in items for each in item]
    else:
        old, new = list(tree), [_as_python(value, scalar, done) for value in tree]
    if any(a is not b for a, b in zip(old, new, strict=True)):
        done[id(tree)] = _like(tree, items if isinstance(tree, dict) else new)
    return done[id(tree)]


def _like(tree: Any, content: list[Any]) -> Any:
    """Returns a container of the same type, with the attributes of `tree` (a module state's `_metadata`)."""
    if isinstance(tree, dict):
        new = tree.copy()
        new.clear()
        new.update(content)
    elif hasattr(tree, "_fields"):
        return type(tree)(*content)
    else:
        new = type(tree)(content)
    if getattr(tree, "__dict__", None):
        vars(new).update(vars(tree))
    return new
