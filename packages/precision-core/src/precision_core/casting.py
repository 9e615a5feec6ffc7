"""Casting trees of tensors: batches and outputs as users build them.

A tree is a tensor in any nesting of dicts, lists, tuples, namedtuples, dataclasses (frozen too) and mappings such as
transformers' ModelOutput. Whatever is none of these is a leaf and passes through as the same object. A container in
which nothing changes comes back as it was, and a tensor that occurs twice is cast once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from precision_core.dtypes import FLOAT_DTYPES

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
    return tensor if tensor.dtype is dtype else tensor.to(cast_dtype(tensor.dtype, dtype))


def cast(tree: T, dtype: torch.dtype) -> T:
    """Returns `tree` with its floating tensors in `dtype`, by `cast_tensor`."""
    if isinstance(tree, Tensor):  # the common case: a model that returns one tensor
        return cast_tensor(tree, dtype)  # type: ignore[return-value]
    return map_tensors(tree, lambda tensor: cast_tensor(tensor, dtype))


def map_tensors(tree: T, function: Callable[[Tensor], Tensor]) -> T:
    """Returns `tree` with every tensor replaced by `function(tensor)`, each distinct tensor only once."""
    return _map(tree, function, {})


def _map(tree: Any, function: Callable[[Tensor], Tensor], done: dict[Tensor, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        if tree not in done:  # tensors hash by identity
            done[tree] = function(tree)
        return done[tree]
    kind = type(tree)
    if kind is dict:
        new: Any = {key: _map(value, function, done) for key, value in tree.items()}
        return new if any(new[key] is not tree[key] for key in tree) else tree
    if isinstance(tree, (list, tuple)):
        values = [_map(value, function, done) for value in tree]
        if all(new is old for new, old in zip(values, tree, strict=True)):
            return tree
        return _rebuild_sequence(tree, values)
    if isinstance(tree, Mapping):  # OrderedDict, defaultdict, UserDict, ModelOutput: a copy keeps what else they hold
        changed = {key: _map(value, function, done) for key, value in tree.items()}
        changed = {key: value for key, value in changed.items() if value is not tree[key]}
        if not changed:
            return tree
        new = copy.copy(tree)
        for key, value in changed.items():
            new[key] = value
        return new
    if dataclasses.is_dataclass(kind):
        return _map_dataclass(tree, function, done)
    return tree


def _rebuild_sequence(tree: Any, values: list[Any]) -> Any:
    kind = type(tree)
    if kind in (list, tuple):
        return kind(values)
    if isinstance(tree, list):
        new = copy.copy(tree)
        new[:] = values
        return new
    if hasattr(kind, "_fields"):  # a namedtuple takes its fields one by one
        return kind(*values)
    return kind(values)  # torch.return_types and other tuples take one sequence


def _map_dataclass(tree: Any, function: Callable[[Tensor], Tensor], done: dict[Tensor, Tensor]) -> Any:
    old = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if hasattr(tree, field.name)}
    new = {name: _map(value, function, done) for name, value in old.items()}
    changed = {name: value for name, value in new.items() if value is not old[name]}
    if not changed:
        return tree
    result = copy.copy(tree)  # not dataclasses.replace: that would run __post_init__ again
    for name, value in changed.items():
        object.__setattr__(result, name, value)  # frozen ones too
    return result
