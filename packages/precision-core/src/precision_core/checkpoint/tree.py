"""The content of a checkpoint folder as tensors with names, which are sharded, and the structure that they stand in.

The structure is the content with a meta tensor in the place of each. It keeps keys and types, where
torch.distributed.checkpoint alone turns an optimizer's integer keys into strings and loses tuples, and it tells shapes
and dtypes before a tensor is read.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from precision_core.checkpoint.tensors import is_sharded

Path = tuple[Any, ...]
"""The keys and indices that lead to a leaf."""


def split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the structure of `content` and its tensors by name; sparse and other odd ones stay in the structure.

    Raises:
        ValueError: it contains itself, or a tensor on the meta device.
    """
    tensors: list[tuple[Path, Tensor]] = []

    def take(path: Path, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise ValueError(f"cannot save {'.'.join(map(str, path))}: it is on the meta device and has no values")
        if not _is_sharded_or_plain(leaf):
            return leaf
        tensors.append((path, leaf.detach()))
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    try:
        structure = map_leaves(content, take)
    except RecursionError as error:
        raise ValueError("cannot save the state: it contains itself, or is nested too deep") from error
    return structure, named(tensors)


def paths(tree: Any, wanted: Callable[[Tensor], bool]) -> list[tuple[Path, Tensor]]:
    """Returns the tensors in `tree` that are `wanted`, with where they are."""
    found: list[tuple[Path, Tensor]] = []
    map_leaves(
        tree, lambda path, leaf: found.append((path, leaf)) if isinstance(leaf, Tensor) and wanted(leaf) else None
    )
    return found


def named(tensors: list[tuple[Path, Any]]) -> dict[str, Any]:
    """Returns them by name, "model.layer.weight", as torch.distributed.checkpoint has it; names are made unique."""
    names: dict[str, Any] = {}
    for path, value in tensors:
        name = ".".join(map(str, path))
        while name in names:
            name += "~"
        names[name] = value
    return names


def map_leaves(tree: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Returns a copy of `tree` with every leaf, what is no dict, list or tuple, replaced by `function(path, leaf)`."""
    kind = type(tree)
    if kind in (dict, OrderedDict):
        new = copy.copy(tree)  # with what is set on an OrderedDict: modules keep their versions there
        new.update((key, map_leaves(value, function, (*path, key))) for key, value in tree.items())
        return new
    if kind in (list, tuple):
        return kind(map_leaves(value, function, (*path, index)) for index, value in enumerate(tree))
    return function(path, tree)


def _is_sharded_or_plain(leaf: Any) -> bool:
    if isinstance(leaf, Tensor) and is_sharded(leaf):
        return True
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and not vars(leaf)
    return plain and not (leaf.is_quantized or leaf.is_conj() or leaf.is_neg())


def look_up(tree: dict[str, Any], path: Path) -> Any:
    """Returns what stands at `path`."""
    value: Any = tree
    for key in path:
        value = value[key]
    return value


def leads_to(path: Path, tree: Any) -> bool:
    """Whether something stands at `path`."""
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True
