"""The arguments of a block as they were before it ran: backward recomputes its forward with the same ones.

Blocks change their arguments. A decoder's layer adds its keys and values to a cache, which holds all layers' by the
time that backward runs it again; others append to a list, or count in a dict. Tensors are shared, not copied: what is
written into one in place is written again with the same values.
"""

from __future__ import annotations

import copy
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_SHARED = (Tensor, nn.Module, ModuleType, type, FunctionType, BuiltinFunctionType, MethodType)
_VALUES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def unchanged(given: T) -> T:
    """Returns `given` with new lists, dicts, sets and objects, whatever their nesting; the rest is shared."""
    return _copied(given, {})


def _copied(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, (*_VALUES, *_SHARED)):
        return value
    if id(value) in done:
        return done[id(value)][1]
    if type(value) is tuple:
        return tuple(_copied(each, done) for each in value)
    try:
        new = copy.copy(value)
    except Exception:  # an object that has no copies (a lock, an open file) is shared
        return value
    if new is value:
        return value
    done[id(value)] = value, new  # and keeps `value` alive, whose id would be another's else
    if isinstance(new, list):
        new[:] = [_copied(each, done) for each in value]
    elif isinstance(new, dict):
        for key in value:
            new[key] = _copied(value[key], done)
    for name, each in getattr(value, "__dict__", {}).items():
        new.__dict__[name] = _copied(each, done)
    return new
