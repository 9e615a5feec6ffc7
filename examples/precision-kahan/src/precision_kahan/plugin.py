"""The plugin: bf16-true whose parameters do not lose small updates."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from precision_core import HalfPrecision, SingleDeviceStrategy
from precision_kahan.compensation import Compensation, lost_by_cast
from precision_kahan.stand_ins import stand_ins
from precision_kahan.support import MODE, ONE_DEVICE

if TYPE_CHECKING:
    from precision_core import Strategy

_KEY = "compensation"


class KahanPrecision(HalfPrecision):
    """`bf16-kahan`: as bf16-true, and each parameter has a bfloat16 compensation that holds what rounding took.

    Args:
        mode: `"bf16-kahan"`, or with exceptions: `"bf16-kahan; *.norm: 32-true"`.
        buffers: as for `HalfPrecision`.

    Raises:
        ValueError: any other mode.
    """

    def __init__(self, mode: str = MODE, *, buffers: str | torch.dtype | Iterable[str] | None = None) -> None:
        base, *exceptions = str(mode).split(";")
        if base.strip() != MODE:
            raise ValueError(f'KahanPrecision({mode!r}): expected "{MODE}", or "{MODE}; <pattern>: <mode>; ..."')
        super().__init__(";".join(["bf16-true", *exceptions]), buffers=buffers)
        self._compensation = Compensation()
        self._models: list[weakref.ref[nn.Module]] = []  # in the order in which they were converted
        self._waiting: dict[str, Tensor] = {}  # loaded, for models that are yet to be converted

    @property
    def mode(self) -> str:
        """`"bf16-kahan"` and the exceptions."""
        return MODE + str(self.policy).removeprefix(str(self.policy.flat))

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why it cannot run under `strategy`: more than one device, or one without bfloat16."""
        return super().refuses(strategy) if isinstance(strategy, SingleDeviceStrategy) else ONE_DEVICE

    # ---------------------------------------------------------------- set-up

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts as bf16-true does; what that takes from wider parameters goes into their compensation.

        Raises:
            ValueError: a state was loaded before, and it is not of this model; nothing was changed.
        """
        index = next((i for i, model in enumerate(self._models) if model() is module), len(self._models))
        _check_fits(self._waiting, _names(index, module), index)
        lost = {
            param: lost_by_cast(param)
            for param in module.parameters()
            if param.requires_grad and param.is_floating_point() and param.dtype is not torch.bfloat16
            if not (param.is_meta or is_lazy(param) or self.storage(param) is None)
        }
        super().convert_module(module)
        if index == len(self._models):
            self._models.append(weakref.ref(module))
        for param, value in lost.items():
            if param.dtype is torch.bfloat16:  # else it is an exception
                self._compensation.put(param, value)
        self._hand_out()
        size = sum(param.nbytes for param in module.parameters() if param.dtype is torch.bfloat16)
        note = f"what rounding takes from parameters is kept beside them in bfloat16: up to {size:,} bytes more"
        self.report = replace(self.report, notes=(note,))
        return module

    # ---------------------------------------------------------------- step

    def register_optimizers(self, *optimizers: Optimizer) -> None:
        """Takes note of the optimizers of the run; raises `ValueError` for one that it cannot step."""
        for optimizer in optimizers:
            _check_optimizer(optimizer)
        super().register_optimizers(*optimizers)

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module | None, closure: Callable[[], Any] | None, **kwargs: Any
    ) -> Any:
        """Steps `optimizer` in float32 and rounds the result; the closure runs before that, in bfloat16.

        Raises:
            ValueError: an optimizer that evaluates the closure more than once.
        """
        _check_optimizer(optimizer)
        if closure is not None:
            closure = _evaluated(closure, optimizer)
        with stand_ins(optimizer, self._compensation):
            return super().optimizer_step(optimizer, model, closure, **kwargs)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns bf16-true's state, and the compensation by `<number of the model>.<name of the parameter>`.

        Models are numbered as they were converted. A parameter that is in none of them has no name: a note says so.
        """
        known = {name: self._compensation.of(param) for name, param in self._parameters().items()}
        named = self._waiting | {name: lost for name, lost in known.items() if lost is not None}
        unnamed = len(self._compensation) - (len(named) - len(self._waiting))
        if unnamed:
            self.note(f"the state leaves out the compensation of {unnamed} parameters that are in no converted model")
        return {**super().state_dict(), _KEY: named}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, before or after the models are converted.

        From another mode compensation starts at zero, which a note in `report` and in the log says.

        Raises:
            ValueError: for anything that no plugin's `state_dict` returned, or that is of other models; nothing
                changes.
        """
        lost = _check_compensation(state_dict)
        for index, model in enumerate(self._models):
            if (module := model()) is not None:
                _check_fits(lost, _names(index, module), index)
        super().load_state_dict(state_dict)
        self._compensation.clear()
        self._waiting = dict(lost)
        self._hand_out()
        if _KEY not in state_dict:
            self.note(f"the state of {state_dict['mode']!r} has no compensation: it starts at zero")

    # ---------------------------------------------------------------- helpers

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Returns every parameter of the models by its name in the state; one that two of them share once."""
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for index, model in enumerate(self._models):
            module = model()
            for name, param in _names(index, module).items() if module is not None else ():
                if id(param) not in seen:
                    found[name] = param
                    seen.add(id(param))
        return found

    def _hand_out(self) -> None:
        """Gives what was loaded to the parameters that there are."""
        for name, param in self._parameters().items():
            if name in self._waiting:
                lost = self._waiting.pop(name)
                if param.dtype is torch.bfloat16:
                    self._compensation.put(param, lost, restored=True)


def _names(index: int, module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the model's parameters by their names in the state, which are the same when parts are compiled."""
    return {f"{index}.{name.replace('_orig_mod.', '')}": param for name, param in module.named_parameters()}


def _check_fits(lost: dict[str, Tensor], params: dict[str, nn.Parameter], index: int) -> None:
    for name, value in lost.items():
        if name.partition(".")[0] != str(index):
            continue
        if name not in params:
            raise ValueError(f"the state has a compensation for {name}, which model {index} does not have")
        if not is_lazy(params[name]) and params[name].shape != value.shape:
            shapes = f"{tuple(value.shape)} in the state, {tuple(params[name].shape)} in the model"
            raise ValueError(f"the compensation of {name} has shape {shapes}")


def _check_compensation(state: Any) -> dict[str, Tensor]:
    """Returns the compensation in a state; raises `ValueError` when it is none, or missing in a state of this mode."""
    if not isinstance(state, dict) or (_KEY not in state and not str(state.get("mode")).startswith(MODE)):
        return {}  # another mode's, or garbage, which the base class refuses
    lost = state.get(_KEY)
    if not isinstance(lost, dict) or not all(
        isinstance(name, str) and type(value) is Tensor and value.dtype is torch.bfloat16
        for name, value in lost.items()
    ):
        raise ValueError(f"this is no state of {MODE}: {_KEY} is no dict of bfloat16 tensors by name")
    return lost


def _check_optimizer(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS):
        raise ValueError(_several_evaluations(optimizer))


def _evaluated(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """Runs the closure, and returns one that gives its result, once."""
    with torch.enable_grad():
        results = [closure()]

    def once() -> Any:
        if not results:
            raise ValueError(_several_evaluations(optimizer))
        return results.pop()

    return once


def _several_evaluations(optimizer: Optimizer) -> str:
    return (
        f"{MODE} cannot step {type(optimizer).__name__}, which evaluates its closure again in the middle of a step, "
        "where the model still has the old parameters: use bf16-true or 32-true with it"
    )
