"""Tensors that live on from step to step: parameters, buffers, and what an optimizer keeps for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from precision_lab.auditing.holds import HALVES, holds
from precision_lab.auditing.names import Names, clean
from precision_lab.auditing.record import Stored
from precision_lab.auditing.sample import local

MASTERS = ("master_rest", "master_weight", "master_param", "master_params", "fp32_param")
"""Keys under which optimizers keep a more exact value of the parameter beside it."""


def read_stored(names: Names, optimizers: list[Optimizer]) -> Iterator[Stored]:
    """Yields each parameter, buffer and state once."""
    seen: set[int] = set()
    for root in names.roots:
        for name, param in root.named_parameters():
            if id(param) not in seen:
                seen.add(id(param))
                yield _stored(
                    "params" if param.requires_grad else "frozen", names.param(param) or clean(name), "", param
                )
        for name, buffer in root.named_buffers():
            if id(buffer) not in seen and isinstance(buffer, Tensor):
                seen.add(id(buffer))
                yield _stored("buffers", clean(name), "", buffer)
        for path, module in root.named_modules():
            for key, value in vars(module).items():  # tables that are no buffers
                if isinstance(value, Tensor) and id(value) not in seen and holds(value):
                    seen.add(id(value))
                    yield _stored("buffers", clean(f"{path}.{key}"), "", value)
    for optimizer in optimizers:
        known = {id(param) for root in names.roots for param in root.parameters()}
        for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
            name = names.param(param) or f"parameter {number} of {type(optimizer).__name__}"
            if id(param) not in known and id(param) not in seen:  # a copy that the optimizer steps instead
                seen.add(id(param))
                yield _stored("master", name, "param", param)
            for key, value in _tensors(optimizer.state.get(param, {})):
                kind = "master" if key.rpartition(".")[2] in MASTERS else "state"
                counts = not local(value).dim()  # a step count is a tensor of one value
                if not counts and (kind == "master" or value.is_floating_point()):
                    yield _stored(kind, name, key, value)


def _tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")


def _stored(kind: str, name: str, key: str, tensor: Tensor) -> Stored:
    part = local(tensor)
    try:
        size = part.untyped_storage().nbytes() if type(part) is not Tensor else part.numel() * part.element_size()
    except (RuntimeError, NotImplementedError):
        size = part.numel() * part.element_size()
    found = Stored(kind, name, key, part.dtype, min(size, part.numel() * max(part.element_size(), 1)), part.numel())
    if kind == "buffers":
        found.holds = holds(part, name)
    elif kind == "state" and type(part) is Tensor and part.dtype in HALVES and part.numel():
        found.zeros = float((part == 0).float().mean())
        found.finite = bool(part.isfinite().all())
    return found
