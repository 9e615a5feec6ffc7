"""Moving a module to an XLA device: torch makes new parameters for that, and loses ties, hooks and attributes.

A parameter cannot become an XLA tensor in place (`param.data = ...` refuses another kind of device), so that
`module.to("xla")` replaces each of them, a tied one by several. Here ties, hooks and attributes are restored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.policy import listed

Slot = tuple[nn.Module, str]


def check_movable(module: nn.Module) -> None:
    """Raises `ValueError` for parameters and buffers without values and for sparse gradients, naming them."""
    named = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"{listed(lazy, 5)} have no shape yet: run one batch through the model on the CPU, then set it up"
        )
    meta = [name for name, tensor in named if tensor.is_meta]
    if meta:
        raise ValueError(
            f"{listed(meta, 5)} are on the meta device and have no values: build the model on the CPU or in "
            "fabric.init_module(), or call to_empty(device='cpu') and initialise or load it first"
        )
    sparse = [
        name or type(child).__name__
        for name, child in module.named_modules()
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse and child.weight.requires_grad
    ]
    if sparse:
        raise ValueError(
            f"{listed(sparse, 5)} would have sparse gradients, and XLA has no sparse tensors: make it with sparse=False"
        )


@torch.no_grad()
def move(module: nn.Module, device: torch.device, before: WeakIdKeyDictionary) -> WeakIdKeyDictionary:
    """Moves the module in place and returns old -> new parameter, old ones held weakly.

    Classes, attributes, gradients, hooks (with the handles that remove them) and ties are kept, those of buffers too,
    and ties to a module that was moved earlier: `before` is what moving that returned.
    """
    for old, slots in _slots(module, "_parameters"):
        if old in before:
            _tie(slots, before[old])
    params, buffers = _slots(module, "_parameters"), _slots(module, "_buffers")
    module.to(device)
    moved = WeakIdKeyDictionary()
    for old, slots in params:
        owner, name = slots[0]
        new = owner._parameters[name]
        if new is old or new is None:
            continue
        _take_over(old, new)
        _tie(slots[1:], new)
        moved[old] = new
    for _, slots in buffers:
        owner, name = slots[0]
        if len(slots) > 1 and (buffer := owner._buffers[name]) is not None:
            _tie(slots[1:], buffer)
    return moved


def move_state(optimizer: Optimizer, moved: WeakIdKeyDictionary) -> None:
    """Hands state that the optimizer has for a parameter to the one that it was moved to; values move at setup."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            new = moved.get(param)
            if new is not None and param in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(param)


def _slots(module: nn.Module, kind: str) -> list[tuple[Tensor, list[Slot]]]:
    """Returns each distinct tensor of `kind` with the (module, name) pairs that hold it."""
    found: dict[int, tuple[Tensor, list[Slot]]] = {}
    for owner in module.modules():
        for name, tensor in getattr(owner, kind).items():
            if tensor is not None:
                found.setdefault(id(tensor), (tensor, []))[1].append((owner, name))
    return list(found.values())


def _tie(slots: list[Slot], tensor: Tensor) -> None:
    for owner, name in slots:
        setattr(owner, name, tensor)  # not into the dict: recurrent layers keep a list of their weights


def _take_over(old: Tensor, new: Tensor) -> None:
    """Gives the new parameter the old one's class, attributes and hooks."""
    if type(new) is not type(old):
        new.__class__ = type(old)
    new.__dict__.update(old.__dict__)
    if old._backward_hooks:
        new._backward_hooks = old._backward_hooks
    if old._post_accumulate_grad_hooks:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
