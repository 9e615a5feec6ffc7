"""Wrapping: a plugin that forwards to another one, core's for example, whatever it does not do itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.precision.base import Precision
from precision_core.precision.masters import Masters
from precision_core.scaling.scaler import Scaler

if TYPE_CHECKING:
    from precision_core.strategies.base import Strategy

T = TypeVar("T")


class Wrapping(Precision):
    """Forwards every hook to `wrapped`; a subclass makes that, takes its `policy`, and overrides what differs."""

    wrapped: Precision

    def connect(self, strategy: Strategy) -> None:
        self.wrapped.connect(strategy)

    def storage(self, param: nn.Parameter) -> torch.dtype | None:
        return self.wrapped.storage(param)

    def convert_module(self, module: nn.Module) -> nn.Module:
        module = self.wrapped.convert_module(module)
        self.report = self.wrapped.report
        self.remember(module)
        return module

    def placed(self, module: nn.Module, strategy: Strategy) -> None:
        self.wrapped.placed(module, strategy)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.wrapped.module_init_context()

    def convert_input(self, data: T) -> T:
        return self.wrapped.convert_input(data)

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.wrapped.forward_context()

    def accumulation_context(self, enabled: bool) -> AbstractContextManager[Any]:
        """Context of `fabric.no_backward_sync`: that of `wrapped`."""
        return self.wrapped.accumulation_context(enabled)

    def convert_output(self, data: T) -> T:
        return self.wrapped.convert_output(data)

    @property
    def scaler(self) -> Scaler:
        return self.wrapped.scaler

    def register_optimizers(self, *optimizers: Optimizer) -> None:
        self.wrapped.register_optimizers(*optimizers)

    def adopt(self, optimizer: Optimizer) -> None:
        self.wrapped.adopt(optimizer)

    def state_dtype(self, param: Tensor) -> torch.dtype:
        return self.wrapped.state_dtype(param)

    @property
    def masters(self) -> Masters:
        return self.wrapped.masters

    @property
    def swallowed_updates(self) -> float | None:
        return self.wrapped.swallowed_updates

    def stepping(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        return self.wrapped.stepping(optimizer)

    def teardown(self) -> None:
        self.wrapped.teardown()


@contextmanager
def hidden_parameters(module: nn.Module, hides: Callable[[nn.Parameter], bool]) -> Iterator[None]:
    """Context in which the module lacks the parameters that `hides` says yes to: no cast reaches them, order is kept.

    For packed weights, whose dtype is not that of their values.
    """
    tables = [layer._parameters for layer in module.modules()]
    kept = [(table, key, param) for table in tables for key, param in table.items() if param is not None]
    kept = [(table, key, param) for table, key, param in kept if hides(param)]
    for table, key, _ in kept:
        table[key] = None
    try:
        yield
    finally:
        for table, key, param in kept:
            table[key] = param
