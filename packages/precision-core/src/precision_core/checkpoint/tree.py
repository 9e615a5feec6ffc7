"""A checkpoint's content as a tree: nested dicts, lists and tuples, and the key paths of what they hold."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

KeyPath = tuple[Any, ...]
"""The keys and indices that lead to a leaf."""


def paths(tree: Any, wanted: Callable[[Tensor], bool]) -> list[tuple[KeyPath, Tensor]]:
    """Returns the tensors in `tree` that are `wanted`, with their key paths."""
    found: list[tuple[KeyPath, Tensor]] = []
    map_leaves(
        tree, lambda path, leaf: found.append((path, leaf)) if isinstance(leaf, Tensor) and wanted(leaf) else None
    )
    return found


def named(tensors: list[tuple[KeyPath, Any]]) -> dict[str, Any]:
    """Returns the values by unique dotted name ("model.layer.weight"), as torch.distributed.checkpoint has them."""
    names: dict[str, Any] = {}
    for path, value in tensors:
        name = ".".join(map(str, path))
        while name in names:
            name += "~"
        names[name] = value
    return names


def map_leaves(tree: Any, function: Callable[[KeyPath, Any], Any], path: KeyPath = ()) -> Any:
    """Returns a copy of `tree` with every leaf (not a dict, list or tuple) replaced by `function(path, leaf)`."""
    kind = type(tree)
    if kind in (dict, OrderedDict):
        new = copy.copy(tree)  # with what is set on an OrderedDict: modules keep their versions there
        new.update((key, map_leaves(value, function, (*path, key))) for key, value in tree.items())
        return new
    if kind in (list, tuple):
        return kind(map_leaves(value, function, (*path, index)) for index, value in enumerate(tree))
    return function(path, tree)
