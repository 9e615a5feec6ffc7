"""A task for a trace: made without values where its code allows, with them where it does not, and without them after.

Under `FakeTensorMode` most code makes a model of any size in no memory. `from_pretrained` reads files in threads of its
own, where the mode is not, so its weights are real ones; other code fails for want of values, and runs again with them.
What is real in the end is replaced by tensors of the same shapes without values, and its bytes are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from precision_core.policy import map_tensors
from precision_lab.task import Task
from precision_lab.taskfile import TaskError


def made(make: Callable[[], Task]) -> tuple[Task, int]:
    """Returns the task, and the bytes of values that its model had in memory; to be called under `FakeTensorMode`.

    Raises:
        TaskError: the user's code raised, with values too.
        ValueError: the model has parameters of a class of their own, such as packed weights.
    """
    task = None
    with suppress(TaskError):
        task = make()
    if task is None:  # outside of the error, which would be shown as the reason of this one
        with _disable_current_modes():
            task = make()
    return task, _without_values(task)


def fake_batch(batch: Any) -> Any:
    """Returns the batch with new tensors of the same shapes, in place of those that have values."""
    return map_tensors(batch, lambda tensor: tensor if _is_fake(tensor) else torch.empty_like(tensor))


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _without_values(task: Task) -> int:
    """Replaces parameters, buffers and the optimizer's state; returns the bytes that they had."""
    found: dict[Tensor, Tensor] = {}
    optimizer: Any = task.optimizer
    groups = [group["params"] for group in optimizer.param_groups]
    tables: list[Any] = [each for module in task.model.modules() for each in (module._parameters, module._buffers)]
    for tensor in (*_values(tables), *(param for group in groups for param in group)):
        if not (_is_fake(tensor) or tensor.is_meta or tensor in found):
            found[tensor] = _like(tensor)
    for table in tables:
        table.update({name: found[each] for name, each in table.items() if each is not None and each in found})
    for group in groups:
        group[:] = [found.get(param, param) for param in group]
    for param in list(optimizer.state):  # Adagrad has some before the first step
        optimizer.state[found.get(param, param)] = fake_batch(optimizer.state.pop(param))
    return sum(tensor.nbytes for tensor in found)


def _values(tables: Iterable[Any]) -> list[Tensor]:
    return [tensor for table in tables for tensor in table.values() if tensor is not None]


def _like(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor).__name__
        raise ValueError(
            f"the model holds a {kind}, which cannot be had without values: estimate it as it is before layers are "
            "quantised, or measure it with precision compare"
        )
    new = torch.empty_like(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        vars(new).update(vars(tensor))
    return new
