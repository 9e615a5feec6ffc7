"""The graph that autograd built: what the loss was multiplied with, and what is kept for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from precision_lab.auditing.record import Saved
from precision_lab.auditing.where import Line

_NODES = 200_000
_ENDS = 64


_LINEAR = ("DivBackward0", "ToCopyBackward0", "CloneBackward0", "ViewBackward0", "AliasBackward0", "UnsqueezeBackward0",
           "SqueezeBackward0", "SqueezeBackward1", "SumBackward0", "SumBackward1", "MeanBackward0", "StackBackward0",
           "CatBackward0", "AddBackward0", "SubBackward0", "NegBackward0", "SelectBackward0", "ReshapeAliasBackward0",
           "ExpandBackward0", "UnbindBackward0", "UnsafeViewBackward0")  # fmt: skip


@dataclass
class LossScale:
    """What losses were multiplied with before backward."""

    factor: float  # by a scaler, else the constants on top of the graph; divisions (by micro-batches) are passed over
    scaler: int | None = None  # that scaled the loss
    partly: bool = False  # a part of the loss was not scaled by it


def loss_scale(roots: list[Tensor], scaled: dict[int, tuple[int, float]]) -> LossScale:
    """Returns how the losses were scaled; `scaled`: number of the node of what a scaler returned -> scaler, scale."""
    ends: list[tuple[float, int | None]] = []
    waiting = [(root.grad_fn, 1.0, 0) for root in roots if root.grad_fn is not None]
    while waiting and len(ends) < _ENDS:
        node, factor, depth = waiting.pop()
        if node._sequence_nr() in scaled:
            scaler, scale = scaled[node._sequence_nr()]
            ends.append((scale * _scaled_before(node, scaled), scaler))
            continue
        name = node.name()
        following = [each for each, _ in node.next_functions if each is not None]
        constant = name == "MulBackward0" and len(following) == 1
        if constant:
            with _disable_current_modes():  # a number that was wrapped as a tensor comes to a mode as a number
                factor *= _constant(node)
        if not following or depth >= 24 or not (constant or name in _LINEAR):
            ends.append((factor, None))
            continue
        waiting += [(each, factor, depth + 1) for each in following]
    by_scaler = [(factor, scaler) for factor, scaler in ends if scaler is not None]
    if by_scaler:
        factor, scaler = max(by_scaler)
        return LossScale(factor, scaler, partly=len(by_scaler) < len(ends))
    return LossScale(min((factor for factor, _ in ends), key=abs, default=1.0))


def _scaled_before(node: Any, scaled: dict[int, tuple[int, float]]) -> float:
    """Returns what a scaled loss had been multiplied with by scalers before: 1 but for a mistake."""
    factor = 1.0
    for _ in range(8):
        following = [each for each, _ in node.next_functions if each is not None]
        if len(following) != 1:
            break
        node = following[0]
        factor *= scaled.get(node._sequence_nr(), (0, 1.0))[1]
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
