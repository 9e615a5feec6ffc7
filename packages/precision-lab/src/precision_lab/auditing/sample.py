"""What a step does to some elements of each half parameter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_lab.auditing.names import Names
from precision_lab.auditing.record import Record, Stored, Updates

ELEMENTS = 256
_HALVES = (torch.bfloat16, torch.float16)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def updates_of(record: Record, name: str, dtype: torch.dtype) -> Updates:
    """Returns the row that counts a parameter's updates."""
    found = next((each for each in record.updates if each.name == name), None)
    if found is None:
        found = Updates(name, dtype)
        record.updates.append(found)
    return found


class Sample:
    """Taken before a step: dtypes of gradients, and some elements of each half parameter."""

    def __init__(self, optimizer: Optimizer, names: Names, record: Record) -> None:
        self._record = record
        self._taken: list[tuple[str, Tensor, Tensor, Tensor]] = []
        had = {(each.name, each.dtype) for each in record.stored if each.kind == "grads"}
        still = {id(param) for group in optimizer.param_groups if not group.get("lr", 1) for param in group["params"]}
        for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
            if param.grad is None:
                continue
            name = names.param(param) or f"parameter {number} of {type(optimizer).__name__}"
            gradient = local(param.grad)
            if (name, gradient.dtype) not in had:
                size = gradient.numel() * gradient.element_size()
                record.stored.append(Stored("grads", name, "", gradient.dtype, size, gradient.numel()))
            if id(param) in still:  # a warm-up's first step has a learning rate of zero
                continue
            value = local(param.detach())
            if value.dtype not in _HALVES or gradient.layout is not torch.strided or not value.numel():
                continue
            if value.is_contiguous() and gradient.is_contiguous() and value.shape == gradient.shape:
                here = slice(0, None, max(value.numel() // ELEMENTS, 1))
                part = value.view(-1)[here]
                self._taken.append((name, part, part.clone(), gradient.view(-1)[here] != 0))

    def compare(self) -> None:
        """Called after the step: counts what stayed as it was."""
        for name, part, old, moved in self._taken:
            found = updates_of(self._record, name, part.dtype)
            found.seen += int(moved.sum())
            found.unchanged += int(((part == old) & moved).sum())
