"""Recast: a model that the user casts after setup, or a copy of one: `copy.deepcopy(model).float()`, an EMA of weights.

Forward casts inputs, or runs autocast, as the mode says, and weights of another dtype do not fit either. So a model
that was cast runs in the true mode of its new dtype: inputs, created tensors and outputs. It does not train where the
mode promises float32 parameters, or where its optimizer's state is of another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.policy.dtypes import FLOAT_DTYPES, dtype_name
from precision_core.policy.policy import MODES, Policy
from precision_core.scaling.gradients import params_of

_CAST = "_precision_cast"


def following_casts(dtype: torch.dtype) -> Callable[..., Callable[..., Any]]:
    """Returns a decorator for `_apply` of a module whose parameters are in `dtype`: it records casts."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            was, before = cast_to(self) or dtype, [param.dtype for param in self.parameters()]
            result = function(self, *args, **kwargs)
            for old, param in zip(before, self.parameters(), strict=False):
                if old is was and param.dtype is not was and param.dtype in FLOAT_DTYPES:
                    forget_cast(self)
                    if param.dtype is not dtype:
                        self.__dict__[_CAST] = param.dtype
                    break
            return result

        return _apply

    return make


def cast_to(module: nn.Module) -> torch.dtype | None:
    """Returns the dtype to which a model was cast after setup; None: it is in its mode's."""
    return module.__dict__.get(_CAST)


def check_trains(module: nn.Module, cast: torch.dtype, policy: Policy, optimizers: Iterable[Optimizer]) -> None:
    """Raises `RuntimeError` where `optimizers` would train `module`, cast after setup, in another dtype than promised.

    Copies, whose parameters no optimizer holds, run as they are; so does a forward without gradients.
    """
    if not torch.is_grad_enabled():
        return
    mine = {id(param) for param in module.parameters() if param.requires_grad}
    for optimizer in optimizers:
        held = [param for param in params_of(optimizer) if id(param) in mine]
        has_old_state = type(optimizer).__module__.startswith("torch.") and any(
            isinstance(value, Tensor) and value.dim() and value.dtype is policy.params
            for param in held
            for value in optimizer.state.get(param, {}).values()
        )
        if held and (policy.mixed or has_old_state):
            name, params = type(optimizer).__name__, dtype_name(policy.params)
            true = next(mode for mode, each in MODES.items() if not each.mixed and each.params is cast)
            reason = f"{policy.flat} trains {params} parameters" if policy.mixed else f"{name}'s state is in {params}"
            raise RuntimeError(
                f"this {type(module).__name__} was cast to {dtype_name(cast)} after fabric.setup, and {reason}: cast "
                f'it back with model.to(torch.{params}), or train it in Fabric(precision="{true}"). To evaluate it as '
                "it is, run it under torch.no_grad() [cast-after-setup]"
            )


def forget_cast(module: nn.Module) -> None:
    """Deletes the record, for a model that is set up again or was cast back."""
    module.__dict__.pop(_CAST, None)
