"""Recast: a model that the user casts after setup, or a copy of one: `copy.deepcopy(model).float()`, an EMA of weights.

Forward casts inputs, or runs autocast, as the mode says, and weights of another dtype do not fit either. So a model
that was cast runs in the true mode of its new dtype: inputs, created tensors and outputs. It does not train where the
mode promises float32 parameters, or where its optimizer's state is of another dtype. A part of it that was cast
(`model.head.half()`) does not train either, and is named where forward fails of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.policy.dtypes import FLOAT_DTYPES, HALF_DTYPES, dtype_name
from precision_core.policy.messages import listed
from precision_core.policy.policy import MODES, Policy
from precision_core.scaling.gradients import params_of

_CAST = "_precision_cast"

_at_setup: WeakKeyDictionary[nn.Module, dict[str, torch.dtype]] = WeakKeyDictionary()
"""Model -> the floating dtypes of its parameters, by name, as setup left them."""


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
        has_old_state = any(_has_state(optimizer, param, policy.params) for param in held)
        stores_wide = policy.mixed or policy.master is not None
        if held and (stores_wide or has_old_state):
            name, params = type(optimizer).__name__, dtype_name(policy.params)
            true = next(mode for mode, each in MODES.items() if mode.endswith("-true") and each.params is cast)
            reason = f"{policy.flat} trains {params} parameters" if stores_wide else f"{name}'s state is in {params}"
            raise RuntimeError(
                f"this {type(module).__name__} was cast to {dtype_name(cast)} after fabric.setup, and {reason}: cast "
                f'it back with model.to(torch.{params}), or train it in Fabric(precision="{true}"). To evaluate it as '
                "it is, run it under torch.no_grad() [cast-after-setup]"
            )


def forget_cast(module: nn.Module) -> None:
    """Deletes the record, for a model that is set up again or was cast back."""
    module.__dict__.pop(_CAST, None)


# ---------------------------------------------------------------- parts of a model


def remember_dtypes(module: nn.Module) -> None:
    """Records the dtypes of a model that was set up, so that `explained` finds what was cast since."""
    _at_setup[module] = {name: p.dtype for name, p in module.named_parameters() if p.dtype in FLOAT_DTYPES}


def explained(error: Exception, root: nn.Module, policy: Policy) -> RuntimeError | None:
    """Returns an error that names parameters which were cast after setup, where `error` is of dtypes; else None.

    Args:
        error: what a forward of `root` raised.
        root: the model that was set up.
        policy: in which it runs.
    """
    text = str(error)
    from precision_core.precision.model.integer_inputs import SAYS_DTYPES  # what training does not need: late

    if root not in _at_setup or not SAYS_DTYPES.search(text) or "was cast" in text:  # a backend's layer says it better
        return None
    was = _at_setup[root]
    cast = {name: param for name, param in root.named_parameters() if param.dtype is not was.get(name, param.dtype)}
    return RuntimeError(_message(policy, cast.items(), was[next(iter(cast))])) if cast else None


class OptimizerDtypes:
    """The dtypes of what each optimizer steps, as setup left them; it keeps no optimizer and no parameter alive."""

    def __init__(self, policy: Callable[[], Policy], name_of: Callable[[Tensor], str]) -> None:
        self._policy = policy
        self._name_of = name_of
        self._listed: WeakKeyDictionary[Optimizer, list[torch.dtype]] = WeakKeyDictionary()
        self._dtypes = WeakIdKeyDictionary()  # parameter -> dtype

    def remember(self, optimizer: Optimizer) -> None:
        """Records the dtypes of parameters that are not known yet."""
        self._listed[optimizer] = [self._dtypes.setdefault(param, param.dtype) for param in params_of(optimizer)]

    def check(self, optimizer: Optimizer) -> None:
        """Raises `RuntimeError` where the step would be in another dtype than promised: of a layer that was cast.

        Two lists of dtypes are all that is compared in a step: 20 us for 400 parameters.
        """
        now = [param.dtype for group in optimizer.param_groups for param in group["params"]]
        if now == self._listed.get(optimizer):
            return
        policy = self._policy()
        trained = [param for param in params_of(optimizer) if param.requires_grad]
        was = {id(param): self._dtypes.get(param, param.dtype) for param in trained}
        cast = [
            param
            for param in trained
            if param.dtype is not was[id(param)] and (policy.mixed or _has_state(optimizer, param, was[id(param)]))
        ]
        if cast:
            raise RuntimeError(_message(policy, [(self._name_of(param), param) for param in cast], was[id(cast[0])]))
        for param in trained:
            self._dtypes[param] = param.dtype
        self.remember(optimizer)


def _has_state(optimizer: Optimizer, param: Tensor, dtype: torch.dtype) -> bool:
    """Whether an optimizer of torch's has state for `param` in `dtype`."""
    return type(optimizer).__module__.startswith("torch.") and any(
        isinstance(value, Tensor) and value.dim() and value.dtype is dtype
        for value in optimizer.state.get(param, {}).values()
    )


def _message(policy: Policy, cast: Iterable[tuple[str, Tensor]], was: torch.dtype) -> str:
    cast, before = list(cast), dtype_name(was)
    names = listed(f"{name} ({dtype_name(param.dtype)})" for name, param in cast)
    message = (
        f"{names} {'were' if len(cast) > 1 else 'was'} cast after fabric.setup, which left {before} for {policy.flat}: "
        f"cast back with .to(torch.{before})"
    )
    layer, dtype = cast[0][0].rpartition(".")[0], cast[0][1].dtype
    if not layer or dtype is torch.float64:
        return message
    base = policy if policy.params in HALF_DTYPES or policy.mixed else MODES["bf16-mixed"]  # others have no exceptions
    true = {each.params: mode for mode, each in MODES.items() if mode.endswith("-true")}
    mode = "bf16-true" if base.scale and dtype is torch.float16 else true[dtype]
    return f'{message}, or name the layer in the mode: Fabric(precision="{base.flat}; {layer}: {mode}")'
