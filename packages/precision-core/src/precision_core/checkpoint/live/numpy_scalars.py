"""numpy's scalars (`numpy.mean(losses)`, a scheduler's best metric) as Python's own, which a safe load takes."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

_PYTHONS = (bool, int, float, complex, str, bytes)


def as_python(tree: Any) -> Any:
    """Returns `tree` with each numpy scalar in its dicts, lists and tuples as a number or text of the same value.

    Keys too. What has no value in Python (datetime64, longdouble) stays; containers without any are returned as they
    are, and one that stands in several places stays one.
    """
    numpy = sys.modules.get("numpy")  # nobody has its scalars who has not imported it
    return tree if numpy is None else _as_python(tree, numpy.generic, {})


def _as_python(tree: Any, scalar: type, done: dict[int, Any]) -> Any:
    if isinstance(tree, scalar):
        value = tree.item()  # type: ignore[attr-defined]
        return value if type(value) in _PYTHONS else tree
    if isinstance(tree, Tensor) or not isinstance(tree, (dict, list, tuple)):
        return tree
    if id(tree) in done:
        return done[id(tree)]
    done[id(tree)] = tree  # of one that contains itself: it is refused later
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
    """Returns a container of the same type, with what is set on it (the versions in a module's state)."""
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
