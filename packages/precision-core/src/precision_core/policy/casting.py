"""Casting trees of tensors: batches and outputs as users build them.

A tree is a tensor in any nesting of dicts, lists, tuples, namedtuples, dataclasses (frozen too) and mappings such as
transformers' ModelOutput. Whatever is none of these is a leaf and passes through as the same object. A container in
which nothing changes comes back as it was, and a tensor that occurs twice is cast once.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from precision_core.policy.dtypes import FLOAT_DTYPES

T = TypeVar("T")

_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


def cast_dtype(current: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Returns what a tensor of dtype `current` becomes when floats are cast to `dtype`.

    Complex becomes complex128 under float64 and complex64 under float32; narrower floats have no complex partner and
    leave it alone. Integers, bool, float8 and quantised dtypes stay what they are.
    """
    if current in FLOAT_DTYPES:
        return dtype
    if current in (torch.complex64, torch.complex128):
        return _COMPLEX.get(dtype, current)
    return current


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `tensor` in `cast_dtype(tensor.dtype, dtype)`, the same object when that is its own."""
    wanted = cast_dtype(tensor.dtype, dtype)
    return tensor if tensor.dtype is wanted else tensor.to(wanted)


def cast(tree: T, dtype: torch.dtype) -> T:
    """Returns `tree` with its floating tensors in `dtype`, by `cast_tensor`."""
    if isinstance(tree, Tensor):  # the common case: a model that returns one tensor
        return cast_tensor(tree, dtype)  # type: ignore[return-value]
    return map_tensors(tree, lambda tensor: cast_tensor(tensor, dtype))


def map_tensors(tree: T, function: Callable[[Tensor], Tensor]) -> T:
    """Returns `tree` with every tensor replaced by `function(tensor)`; one that changes is replaced only once."""
    return _map(tree, function, {})[0]


def holds(tree: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype is in `tree`."""
    if isinstance(tree, Tensor):
        return tree.dtype is dtype
    if isinstance(tree, (list, tuple)):
        return any(holds(value, dtype) for value in tree)
    if type(tree) is dict or isinstance(tree, Mapping):
        return any(holds(value, dtype) for value in tree.values())
    if dataclasses.is_dataclass(type(tree)):
        return any(holds(getattr(tree, field.name, None), dtype) for field in dataclasses.fields(tree))
    return False


def move(tree: T, device: torch.device) -> T:
    """Returns `tree` with its tensors on `device`, and with other objects that have a `to` method, but modules.

    That is how batches of other libraries move (graphs, ragged tensors).
    """
    return _map(tree, lambda tensor: tensor.to(device, non_blocking=True), {}, lambda leaf: _move_leaf(leaf, device))[0]


def _move_leaf(leaf: Any, device: torch.device) -> Any:
    to = getattr(leaf, "to", None)
    if isinstance(leaf, (type, nn.Module)) or not callable(to):
        return leaf
    takes = _parameters(to)
    return to(device, non_blocking=True) if "non_blocking" in takes or "kwargs" in takes else to(device)


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, and it does not say
        return set()
    return {"kwargs" if parameter.kind is parameter.VAR_KEYWORD else parameter.name for parameter in parameters}


def _map(
    tree: Any,
    function: Callable[[Tensor], Tensor],
    done: dict[Tensor, Tensor],
    other: Callable[[Any], Any] | None = None,
) -> tuple[Any, bool]:
    """Returns the new tree and whether it is one: torch.compile cannot tell two containers apart by `is`."""
    if isinstance(tree, Tensor):
        if done and tree in done:  # tensors hash by identity
            return done[tree], True
        new = function(tree)
        if new is tree:  # nothing to remember; asking again costs less
            return tree, False
        done[tree] = new
        return new, True
    if tree is None or isinstance(tree, (str, int, float)):
        return tree, False
    if isinstance(tree, (list, tuple)):
        pairs = [_map(value, function, done, other) for value in tree]
        changed = any(is_new for _, is_new in pairs)
        return (_rebuild_sequence(tree, [value for value, _ in pairs]), True) if changed else (tree, False)
    if type(tree) is dict or isinstance(tree, Mapping):
        items = _map_items(tree.items(), function, done, other)
        return (_rebuild_mapping(tree, items), True) if items else (tree, False)
    if dataclasses.is_dataclass(type(tree)):
        fields = [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]
        items = _map_items([(name, getattr(tree, name)) for name in fields], function, done, other)
        return (_rebuild_dataclass(tree, items), True) if items else (tree, False)
    new = tree if other is None else other(tree)
    return new, new is not tree


def _map_items(
    items: Iterable[tuple[Any, Any]],
    function: Callable[[Tensor], Tensor],
    done: dict[Tensor, Tensor],
    other: Callable[[Any], Any] | None,
) -> dict[Any, Any]:
    """Returns the new values of those keys whose value is new."""
    pairs = {key: _map(value, function, done, other) for key, value in items}
    return {key: value for key, (value, is_new) in pairs.items() if is_new}


def _rebuild_sequence(tree: Any, values: list[Any]) -> Any:
    kind = type(tree)
    if kind in (list, tuple):
        return kind(values)
    if isinstance(tree, list):
        new = copy.copy(tree)
        new[:] = values
        return new
    if hasattr(kind, "_make"):  # a namedtuple, whose own __new__ may want other arguments than its fields
        return kind._make(values)
    return kind(values)  # torch.return_types and other tuples take one sequence


def _rebuild_mapping(tree: Any, new: dict[Any, Any]) -> Any:
    if type(tree) is dict or not isinstance(tree, MutableMapping):
        return type(tree)({**tree, **new})
    result = copy.copy(tree)  # OrderedDict, defaultdict, UserDict, ModelOutput: a copy keeps what else they hold
    for key, value in tree.items():  # all of them: what torch.compile makes of copy.copy has lost a subclass's items
        result[key] = new.get(key, value)
    return result


def _rebuild_dataclass(tree: Any, new: dict[str, Any]) -> Any:
    result = copy.copy(tree)  # not dataclasses.replace: that would run __post_init__ again
    for name, value in new.items():
        object.__setattr__(result, name, value)  # frozen ones too
    return result
