"""`keep=True`: copies of what the last optimizer step began with, into the same memory step after step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_lab.explaining.before import Before, Param
from precision_lab.explaining.numbers import local
from precision_lab.watching.batch import Batch

_RATES = 64
"""Steps whose learning rates are remembered."""


class Kept:
    """Parameters, gradients and state of each optimizer from before its last step, and the batch of that step."""

    def __init__(self, name_of: Callable[[Tensor], str | None]) -> None:
        self._name_of = name_of
        self._before: dict[int, Before] = {}
        self._rates: dict[int, deque[list[float]]] = {}
        self.batch: Batch | None = None
        self.scale = 1.0

    @property
    def bytes(self) -> int:
        """Of all copies."""
        return sum(
            value.numel() * value.element_size()
            for before in self._before.values()
            for each in before.params
            for value in (each.value, each.gradient, *each.state.values())
            if isinstance(value, Tensor)
        )

    @property
    def steps(self) -> list[Before]:
        """What the last step of each optimizer began with."""
        return list(self._before.values())

    @torch.no_grad()
    def take(self, optimizer: Optimizer, batch: Batch | None, scale: float) -> None:
        """Called before an optimizer's step."""
        old = self._before.get(id(optimizer))
        olds = {id(each.live): each for each in old.params} if old is not None else {}
        params: list[Param] = []
        for number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                was = olds.get(id(param))
                state = optimizer.state.get(param, {})
                params.append(
                    Param(
                        self._name_of(param) or f"a parameter of {type(optimizer).__name__}",
                        param,
                        _copied(param, was.value if was else None),
                        None if param.grad is None else _copied(param.grad, was.gradient if was else None),
                        {key: _copied(value, was.state.get(key) if was else None) for key, value in state.items()},
                        number,
                    )
                )
        rates = self._rates.setdefault(id(optimizer), deque(maxlen=_RATES))
        options = [
            {key: _copied(value) for key, value in each.items() if key != "params"} for each in optimizer.param_groups
        ]
        before = Before(optimizer, params, options, [list(each) for each in zip(*rates, strict=False)])
        rates.append([float(each.get("lr", 0.0)) for each in optimizer.param_groups])
        self._before[id(optimizer)] = before
        self.batch, self.scale = batch, scale


def _copied(value: Any, old: Any = None) -> Any:
    if not isinstance(value, Tensor):
        return dict(value) if type(value) is dict else list(value) if type(value) is list else value
    value = local(value.detach())
    if isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype:
        return old.copy_(value)
    return value.clone()
