"""The optimizer's own methods that do not reach the engine, bound to it on the user's object until teardown."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch.optim import Optimizer

from precision_deepspeed.engine import Engine


def bind(optimizer: Optimizer, engine: Engine) -> None:
    """Has `zero_grad()` drop what the engine holds, and `add_param_group()` refuse what the engine cannot step."""

    def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
        engine.drop()
        if not engine.steps_parameters:
            return  # the optimizer holds tensors of DeepSpeed's, gradients and all
        if any(param.grad is not None for group in self.param_groups for param in group["params"]):
            type(self).zero_grad(self, set_to_none)  # takes its time where a step has left nothing to do, as most do

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        if not engine.steps_parameters:
            raise RuntimeError(
                "optimizer.add_param_group after fabric.setup: DeepSpeed's engine has laid out what it steps. Give the "
                "optimizer all groups before, with a learning rate of 0 for those that are to train later"
            )
        type(self).add_param_group(self, param_group)

    optimizer.__dict__["zero_grad"] = MethodType(zero_grad, optimizer)
    optimizer.__dict__["add_param_group"] = MethodType(add_param_group, optimizer)


def unbind(optimizer: Optimizer) -> None:
    """Gives the optimizer its own methods back."""
    for name in ("zero_grad", "add_param_group"):
        optimizer.__dict__.pop(name, None)
