"""What an optimizer's step began with, and the step once more on copies of it."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_lab.explaining.numbers import local

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass
class Param:
    """One parameter, as it was before the step. Of one that is spread over ranks it is this rank's part."""

    name: str
    live: Tensor
    value: Tensor
    gradient: Tensor | None
    state: dict[str, Any]
    group: int


@dataclass
class Twin:
    """An optimizer of its own parameters, whose bare step may be run."""

    optimizer: Optimizer
    params: list[Tensor]

    def step(self) -> None:
        """The optimizer's own step."""
        step: Callable[..., Any] = inspect.unwrap(type(self.optimizer).step)
        with torch.no_grad():
            step(self.optimizer)


@dataclass
class Before:
    """All of an optimizer's; `options` has each group's, and `rates` the learning rates of steps before, per group."""

    optimizer: Optimizer
    params: list[Param]
    options: list[dict[str, Any]]
    rates: list[list[float]] = field(default_factory=list)

    def after(self) -> list[Tensor]:
        """Returns the parameters as they are now."""
        return [local(each.live.detach()) for each in self.params]

    def run(self, dtype: torch.dtype | None = None, options: Mapping[str, Any] | None = None) -> list[Tensor]:
        """Returns the parameters after the optimizer's own step: in another dtype, or with other options, by choice."""
        twin = self.twin(dtype, options)
        twin.step()
        return [each.detach() for each in twin.params]

    def twin(self, dtype: torch.dtype | None = None, options: Mapping[str, Any] | None = None) -> Twin:
        """Returns an optimizer of copies. What a library has put around the step is not run, and no hook."""

        def cast(value: Tensor) -> Tensor:
            return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()

        twin = object.__new__(type(self.optimizer))
        twin.__dict__ = {key: value for key, value in vars(self.optimizer).items() if key != "step"}
        twin.__dict__ |= {key: OrderedDict() for key in _HOOKS}
        twin.state = defaultdict(dict)
        twin.param_groups = [{**_own(each), **(options or {}), "params": []} for each in self.options]
        made: list[Tensor] = []
        for each in self.params:
            param = nn.Parameter(cast(each.value), requires_grad=each.value.is_floating_point())
            if each.gradient is not None:
                param.grad = cast(each.gradient)
            made.append(param)
            twin.param_groups[each.group]["params"].append(param)
            if each.state:
                twin.state[param] = {
                    key: (value.clone() if key == "step" else cast(value)) if isinstance(value, Tensor) else _own(value)
                    for key, value in each.state.items()
                }
        return Twin(twin, made)

    def largest_update(self, after: list[Tensor]) -> float:
        """Returns the largest absolute change of an element; inf where one is not finite."""
        found = 0.0
        for each, new in zip(self.params, after, strict=True):
            if each.value.numel():
                change = (new.to(torch.float64) - each.value.to(torch.float64)).abs().max()
                found = max(found, float(change) if bool(change.isfinite()) else float("inf"))
        return found


def _own(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list)) else value
