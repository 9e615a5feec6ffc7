"""Tensors that are more than one block of memory: DTensors, and subclasses made of parts, with deep copies of these.

Subclasses without a `clone`, as torchao's quantised optimizer states are, are copied by the parts that they flatten to
for torch.compile; any other knows how it is copied.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from precision_core.policy.casting import map_tensors


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether it is a DTensor, without the import of that class, which takes over a second."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_made_of_parts(tensor: Tensor) -> bool:
    """Whether a tensor has no memory of its own, but is a wrapper around other tensors; a DTensor does not count."""
    return hasattr(type(tensor), "__tensor_flatten__") and not is_sharded(tensor)


def copy_of(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Returns a copy, by parts where the subclass has no way of its own; these on `device`, None: where they are."""
    if not is_made_of_parts(tensor):
        return copy.deepcopy(tensor)
    try:
        return copy.deepcopy(tensor)
    except (NotImplementedError, RuntimeError, TypeError):
        kind: Any = type(tensor)
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(tensor, name).detach().to(device, copy=True) for name in names}
        made: Tensor = kind.__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
        return made.requires_grad_(tensor.requires_grad)


def deep_copied(tree: Any, memo: dict[int, Any] | None = None, device: torch.device | str | None = None) -> Any:
    """Returns `copy.deepcopy(tree, memo)`, which such subclasses would fail."""
    copies = {} if memo is None else memo

    def keep(tensor: Tensor) -> Tensor:
        if is_made_of_parts(tensor) and id(tensor) not in copies:
            copies[id(tensor)] = copy_of(tensor, device)
        return tensor

    map_tensors(tree, keep)
    return copy.deepcopy(tree, copies)
