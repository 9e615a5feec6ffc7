"""The graph that autograd built: what the loss was multiplied with, and what is kept for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precision_lab.auditing.record import Saved
from precision_lab.auditing.where import Line

_NODES = 200_000


def loss_factor(loss: Tensor) -> float:
    """Returns what the loss was multiplied with last, as scalers do: the product of the constant factors on top.

    Divisions, as by a number of micro-batches, are passed over.
    """
    factor, node = 1.0, loss.grad_fn
    for _ in range(8):
        if node is None:
            break
        name = node.name()
        following = [each for each, _ in node.next_functions if each is not None]
        if name == "MulBackward0" and len(following) == 1:
            factor *= _constant(node)
        elif name not in ("DivBackward0", "ToCopyBackward0", "CloneBackward0", "ViewBackward0", "AliasBackward0"):
            break
        node = following[0] if len(following) == 1 else None
    return factor


def _constant(node: Any) -> float:
    """Returns the factor without gradients of a product."""
    for name in ("_saved_other", "_saved_self"):
        value = getattr(node, name, None)
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        if isinstance(value, (int, float)):
            return float(value)
    return 1.0


def saved_activations(roots: list[Tensor], origin: dict[int, tuple[str, Line | None]], stored: set[int]) -> list[Saved]:
    """Returns the bytes that the graph of `roots` keeps for backward, by module and dtype, each storage once.

    Storages in `stored` (parameters) are left out. Reads `_saved_*` of torch's own nodes, which must not be done under
    hooks for saved tensors: they would run, and recompute.
    """
    found: dict[tuple[str, torch.dtype], Saved] = {}
    seen_nodes: set[Any] = set()
    storages = set(stored)
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    while waiting and len(seen_nodes) < _NODES:
        node = waiting.pop()
        if node in seen_nodes:
            continue
        seen_nodes.add(node)
        waiting.extend(each for each, _ in node.next_functions if each is not None)
        module = origin.get(node._sequence_nr(), ("", None))[0]
        for tensor in _saved(node):
            try:
                pointer = tensor.untyped_storage().data_ptr()
            except (RuntimeError, NotImplementedError):
                continue
            if pointer in storages:
                continue
            storages.add(pointer)
            key = module, tensor.dtype
            found.setdefault(key, Saved(*key)).bytes += tensor.numel() * tensor.element_size()
    return list(found.values())


def _saved(node: Any) -> list[Tensor]:
    if hasattr(node, "saved_tensors"):  # a Function of Python
        try:
            return [each for each in node.saved_tensors if isinstance(each, Tensor)]
        except RuntimeError:
            return []
    values = []
    for name in dir(node):
        if name.startswith("_saved_"):
            try:
                value = getattr(node, name)
            except RuntimeError:  # changed in place since, or freed
                continue
            values += [value] if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else []
    return [value for value in values if isinstance(value, Tensor)]
