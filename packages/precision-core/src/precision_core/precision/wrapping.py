"""Wrapping: a plugin that leaves to another one whatever it does not do itself, as backends leave to core's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from precision_core.precision.base import Precision
from precision_core.scaling.scaler import Scaler

if TYPE_CHECKING:
    from precision_core.strategies.base import Strategy

T = TypeVar("T")


class Wrapping(Precision):
    """Runs as `wrapped` does; a subclass makes that, takes its `policy`, and overrides what differs."""

    wrapped: Precision

    def connect(self, strategy: Strategy) -> None:
        """Connects `wrapped`."""
        self.wrapped.connect(strategy)

    def storage(self, param: nn.Parameter) -> torch.dtype | None:
        """Returns what `wrapped` says."""
        return self.wrapped.storage(param)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Converts as `wrapped` does, with its report; raises what that raises."""
        module = self.wrapped.convert_module(module)
        self.report = self.wrapped.report
        self.remember(module)
        return module

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Context in which modules are built as `wrapped` wants them."""
        return self.wrapped.module_init_context()

    def convert_input(self, data: T) -> T:
        """Returns what `wrapped` makes of it."""
        return self.wrapped.convert_input(data)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context in which forward runs: that of `wrapped`."""
        return self.wrapped.forward_context()

    def convert_output(self, data: T) -> T:
        """Returns what `wrapped` makes of it."""
        return self.wrapped.convert_output(data)

    @property
    def scaler(self) -> Scaler:
        """The loss scaler of `wrapped`."""
        return self.wrapped.scaler

    def register_optimizers(self, *optimizers: Optimizer) -> None:
        """Tells `wrapped` of the optimizers of the run; raises `ValueError` for one that it cannot run."""
        self.wrapped.register_optimizers(*optimizers)

    def teardown(self) -> None:
        """Gives back what `wrapped` put on the module."""
        self.wrapped.teardown()


@contextmanager
def hidden_parameters(module: nn.Module, hides: Callable[[nn.Parameter], bool]) -> Iterator[None]:
    """Context in which parameters that `hides` are none of the module's: no cast reaches them, and their order stays.

    For packed weights, which show a dtype that is not that of their values.
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
