"""Methods of the user's optimizer that have to reach the engine, overridden on the instance until teardown."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch.optim import Optimizer

from precision_deepspeed.engine import Engine


def bind(optimizer: Optimizer, engine: Engine) -> None:
    """Has `zero_grad()` discard the engine's gradients, and `add_param_group()` raise where it has to."""

    def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
        engine.drop()
        if not engine.steps_parameters:
            return  # the optimizer's parameters, and their gradients, are DeepSpeed's own tensors
        if any(param.grad is not None for group in self.param_groups for param in group["params"]):
            type(self).zero_grad(self, set_to_none)  # it is slow, and after most steps there is nothing to do

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        if not engine.steps_parameters:
            raise RuntimeError(
                "optimizer.add_param_group after fabric.setup: DeepSpeed's engine has copied the parameters into flat "
                "tensors. Add all groups before setup, with a learning rate of 0 for those that are to train later"
            )
        type(self).add_param_group(self, param_group)

    optimizer.__dict__["zero_grad"] = MethodType(zero_grad, optimizer)
    optimizer.__dict__["add_param_group"] = MethodType(add_param_group, optimizer)


def unbind(optimizer: Optimizer) -> None:
    """Restores the optimizer's own methods."""
    for name in ("zero_grad", "add_param_group"):
        optimizer.__dict__.pop(name, None)
