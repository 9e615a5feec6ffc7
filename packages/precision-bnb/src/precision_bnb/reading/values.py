"""What expressions may be while code is followed: modules, containers of them, functions and plain settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from precision_bnb.reading.folding import Plain


class Bound(NamedTuple):
    """A function with the object that it is a method of."""

    owner: Any
    function: Any  # a function; not typed so, since type checkers would bind it


class Super(NamedTuple):
    """What `super()` is in a method that `kind` defines."""

    kind: type
    owner: Any


class First(NamedTuple):
    """The parameters of a module, of which code that asks for one takes the first."""

    module: nn.Module


class Nested(NamedTuple):
    """A function or lambda that the followed function defines: its node."""

    node: Any


def new(values: list[Any], held: list[Any]) -> list[Any]:
    """Returns values not held yet, without tensors and plain ones; each element of a container in one of its own.

    So a variable holds no more than there are modules and functions, however often it is packed and unpacked.
    """
    known = {identity(value) for value in held}
    found = []
    for value in values:
        if isinstance(value, (Tensor, *Plain)):
            continue
        if _is_sequence(value):
            inner = {identity(each): each for each in _flat(value)}
            parts = [each for mark, each in inner.items() if frozenset((mark,)) not in known]
            known |= {frozenset((identity(each),)) for each in parts}
            found += [(each,) for each in parts]
        elif identity(value) not in known:
            known.add(identity(value))
            found.append(value)
    return found


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and not isinstance(value, (Bound, Super, First, Nested))


def _flat(value: Any) -> list[Any]:
    if _is_sequence(value):
        return [each for part in value for each in _flat(part)]
    return [] if isinstance(value, (Tensor, *Plain)) else [value]


def identity(value: Any) -> Any:
    """Returns what tells values apart: containers by what is in them, for they are made anew each time."""
    if _is_sequence(value):
        return frozenset(map(identity, value))
    return tuple(map(id, value)) if isinstance(value, tuple) else id(value)


def firsts(values: list[Any]) -> list[First]:
    """Returns the parameters of modules among the values."""
    return [value for value in values if isinstance(value, First)]


def items(value: Any, index: Any) -> list[Any]:
    """Returns the element of a container by that index or name, all of them where it is not known."""
    if not isinstance(value, nn.Module):
        return elements([value])
    children = value._modules
    if index in children:
        return [children[index]]
    if isinstance(index, int) and -len(children) <= index < len(children):
        return [list(children.values())[index]]
    return elements([value])


def elements(values: list[Any]) -> list[Any]:
    """Returns what iterating over the values may yield."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, nn.Module):
            found += [child for child in value._modules.values() if child is not None]
        elif isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple, set)) and not isinstance(value, (Bound, Super, First, Nested)):
            found += value
    return found


def holds_module(values: list[Any]) -> bool:
    """Whether one of the values is a module."""
    return any(isinstance(value, nn.Module) for value in values)
