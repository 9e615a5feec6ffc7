"""Precision: the plugin. The base class is a complete float32 plugin; a subclass overrides what differs.

Hooks in the order in which they run. A strategy calls them, or a hand-written loop does:

    module = precision.convert_module(module)           once
    data = precision.convert_input(data)                every forward
    with precision.forward_context(): ...
    output = precision.convert_output(output)
    loss = precision.pre_backward(loss, module)         every backward
    precision.backward(loss, module)
    loss = precision.post_backward(loss, module)
    precision.clip_gradients(module, optimizer, max_norm=1.0)
    precision.optimizer_step(optimizer, module, None)   every step
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.hardware import FORMATS, by_dtypes
from precision_core.policy.casting import cast, map_tensors
from precision_core.policy.dtypes import FLOAT_DTYPES
from precision_core.policy.messages import listed
from precision_core.policy.policy import MODES, Policy
from precision_core.precision.masters import NO_MASTERS, Masters
from precision_core.precision.model.cast_module import cast_buffers, cast_parameters, packed_parameters, parameters_in
from precision_core.precision.model.default_dtype import created_as
from precision_core.precision.model.report import Item, Report, module_bytes
from precision_core.precision.runnable import check_runnable
from precision_core.precision.state import STATE_VERSION, check_state, what_of_scale
from precision_core.scaling.clipping import make_clip
from precision_core.scaling.gradients import params_of
from precision_core.scaling.scaler import Scaler

if TYPE_CHECKING:
    from precision_core.strategies.base import Strategy

T = TypeVar("T")

_NO_CONTEXT = nullcontext()

_log = logging.getLogger(__name__)


class Precision:
    """Float32 throughout: parameters, buffers and inputs are cast to float32, outputs are unchanged.

    `policy` says what the plugin does, `report` what the last `convert_module` did.
    """

    policy: Policy = MODES["32-true"]
    _report: Report | None = None

    def __init__(self, *, policy: Policy | str | int | None = None) -> None:
        if policy is not None:
            self.policy = self.check_policy(Policy.parse(policy))

    _runs: tuple[torch.dtype, ...] = (torch.float32,)  # what params and compute may be, alike; plugins.py finds it by
    _applies_exceptions = False
    _aligns = False  # whether products cast operands of several dtypes, since a model has parameters of several

    def check_policy(self, policy: Policy) -> Policy:
        """Returns `policy`; raises `ValueError` when this class cannot run it, naming what does."""
        check_runnable(policy)
        name = f"{type(self).__name__}({str(policy)!r})"
        if policy.mixed or policy.params not in self._runs:
            from precision_core.precision.plugins import class_for  # which imports the subclasses of this class

            modes = [mode for mode, known in MODES.items() if known.params in self._runs and not known.mixed]
            right = class_for(policy).__name__
            raise ValueError(f"{name}: this plugin runs {listed(modes)}; for this policy there is {right}")
        if policy.exceptions and not self._applies_exceptions:
            raise ValueError(f"{name}: this plugin applies no exceptions; bf16-true, 16-true and the mixed modes do")
        return policy

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.mode}>"

    # ---------------------------------------------------------------- set-up

    @property
    def report(self) -> Report:
        """What the last `convert_module` did; before that, what will be computed in what."""
        return self._report or Report(self.mode, policy=self.policy, is_set_up=False)

    @report.setter
    def report(self, report: Report) -> None:
        self._report = report if report.policy is not None else replace(report, policy=self.policy)

    @property
    def mode(self) -> str:
        """What users ask for this plugin by: the policy's spelling, or the mode that a package registered."""
        return str(self.policy)

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why this plugin cannot run under `strategy`, and what to pass instead; None: it can."""
        device_type = strategy.device.type
        level, reason = by_dtypes(self.policy, device_type) if device_type in FORMATS else ("native", "")
        return reason if level == "no" else None

    def connect(self, strategy: Strategy) -> None:
        """Takes what the plugin needs from the strategy, its process group say, after `refuses` of both."""

    def storage(self, param: nn.Parameter) -> torch.dtype | None:
        """Returns the dtype that `param` is to be stored in; None: as it is (integers, float8, packed weights)."""
        return self.policy.params if param.dtype in FLOAT_DTYPES or param.is_complex() else None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts parameters and buffers in place, leaves a `report`, and returns `module`."""
        before = module_bytes(module)
        items = cast_parameters(module, lambda _, param: self.storage(param))
        items += cast_buffers(module, lambda *_: self.policy.buffers)[0]
        packed = packed_parameters(module, lambda _, param: self.storage(param))
        self._aligns = self._aligns or bool(packed)
        return self._converted(module, before, items, packed)

    def _converted(
        self,
        module: nn.Module,
        bytes_before: int,
        converted: Sequence[Item],
        skipped: Sequence[Item] = (),
        notes: tuple[str, ...] = (),
    ) -> nn.Module:
        """Returns `module`, of which the report then says what was done to it."""
        self.report = Report(self.mode, tuple(converted), tuple(skipped), notes, bytes_before, module_bytes(module))
        self.remember(module)
        return module

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Context in which modules are built with parameters in `policy.params`, or the widest of its exceptions.

        Values are drawn in float32, whatever the process's default dtype is, and each parameter is cast when it is
        registered. Buffers keep the dtype in which the module computes them, and `convert_module` casts them
        afterwards: a position table computed in bfloat16 has wrong positions.
        """
        dtype = self.policy.params
        for _, exception in self.policy.exceptions:
            dtype = torch.promote_types(dtype, exception.params)
        if dtype is torch.float32:
            return nullcontext() if torch.get_default_dtype() is torch.float32 else created_as(torch.float32)
        return parameters_in(dtype)

    def before_load(self, module: nn.Module) -> None:
        """Prepares a module with parameters on the meta device, in place, for the file that will be loaded into it.

        A plugin that quantises weights replaces the layers here, so that full weights are never in memory all at once.
        """

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Context in which tensors are created in the dtype that inputs are cast to."""
        return self.forward_context() if not self.policy.mixed else nullcontext()

    def placed(self, module: nn.Module, strategy: Strategy) -> None:
        """Called when the strategy has moved or sharded a converted module, whose parameters may be others by then."""

    # ---------------------------------------------------------------- forward

    def convert_input(self, data: T) -> T:
        """Returns `data`, any nesting of containers, with its floating tensors in `policy.compute`."""
        return cast(data, self.policy.compute)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context in which forward runs: created tensors are float32, whatever torch's default dtype is."""
        return nullcontext() if torch.get_default_dtype() is torch.float32 else created_as(torch.float32)

    def accumulation_context(self, enabled: bool) -> AbstractContextManager[Any]:
        """Context of `fabric.no_backward_sync`, around every microbatch but the last where `enabled`.

        No optimizer steps before a backward that runs outside of it.
        """
        return nullcontext()

    def convert_output(self, data: T) -> T:
        """Returns `data` with tensors of the params and compute dtypes in `policy.output`; others are unchanged."""
        policy = self.policy
        mine = (policy.params, policy.compute)
        if isinstance(data, Tensor):  # a model that returns one tensor should not pay for the rest
            is_right = data.dtype is policy.output or data.dtype not in mine
            return data if is_right else data.to(policy.output)  # type: ignore[return-value]
        return map_tensors(data, lambda tensor: tensor.to(policy.output) if tensor.dtype in mine else tensor)

    # ---------------------------------------------------------------- backward

    @cached_property
    def scaler(self) -> Scaler:
        """The loss scaler; one that does nothing where the loss is not scaled."""
        return Scaler()

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Tensor:
        """Returns the loss to call backward on, scaled where the mode scales."""
        return self.scaler.scale(tensor)

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Runs `tensor.backward(*args, **kwargs)`."""
        tensor.backward(*args, **kwargs)

    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Tensor:
        """Returns the unscaled loss for what `pre_backward` returned.

        Gradients stay scaled until the first of `unscale_gradients`, `clip_gradients` and `optimizer_step` unscales
        them, so that accumulation is right. To read `p.grad` before the step, call `unscale_gradients(optimizer)`.
        """
        self.scaler.after_backward()
        return self.scaler.unscaled(tensor)

    # ---------------------------------------------------------------- step

    def register_optimizers(self, *optimizers: Optimizer) -> None:
        """Tells a scaled mode all optimizers of the run (Fabric does). A loop with several should, before it starts."""
        self.scaler.register(optimizers)

    def adopt(self, optimizer: Optimizer) -> None:
        """Called when the optimizer holds the parameters that it will step."""

    def state_dtype(self, param: Tensor) -> torch.dtype:
        """Returns the dtype of the moments that an optimizer keeps for `param`."""
        return param.dtype

    @property
    def masters(self) -> Masters:
        """What parameters are stored in beside themselves, for checkpoints."""
        return NO_MASTERS

    def main_params(self, optimizer: Optimizer) -> Iterable[nn.Parameter]:
        """Yields the parameters whose gradients the step applies."""
        return params_of(optimizer)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divides the gradients of `optimizer` by the loss scale, in place, at most once per step."""
        self.scaler.unscale(optimizer)

    def clip_gradients(
        self,
        module: nn.Module | None,
        optimizer: Optimizer | None = None,
        *,
        max_norm: float | None = None,
        clip_val: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Unscales and clips gradients in place: those of `optimizer`, or of all of `module` where that is None.

        Returns the unscaled norm before clipping for `max_norm` (a tensor of no dimensions), None for `clip_val`. Where
        the loss is scaled, inf and NaN lead to a skipped step instead of an error, unless `error_if_nonfinite`.

        Raises:
            ValueError: not exactly one of `max_norm` and `clip_val`; neither a module nor an optimizer.
            RuntimeError: `error_if_nonfinite` and the norm is inf or NaN.
        """
        clip = make_clip(max_norm, clip_val, norm_type, error_if_nonfinite)
        if optimizer is not None:
            params = list(self.main_params(optimizer))
        elif module is not None:
            params = list(module.parameters())
        else:
            raise ValueError("clip_gradients needs the model, the optimizer, or both")
        return self.scaler.clip(optimizer, params, clip, self.name_of)

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module | None, closure: Callable[[], Any] | None, **kwargs: Any
    ) -> Any:
        """Steps `optimizer`, or skips the step when a scaled gradient overflowed; `kwargs` go to its own `step`.

        Returns the closure's unscaled result (also on a skipped step), else what the optimizer returns.
        """
        if model is not None:
            self.remember(model)
        with self.stepping(optimizer):
            return self.scaler.step(optimizer, closure, self.name_of, **kwargs)

    @property
    def swallowed_updates(self) -> float | None:
        """The share of updates that changed nothing, of a sample; None: nothing is sampled in this mode, or not yet."""
        return None

    def stepping(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        """Context around one call of the optimizer's own step, for storage that it does not know of."""
        return _NO_CONTEXT

    @property
    def steps(self) -> int:
        """Optimizer steps taken, over all optimizers; skipped ones are not among them."""
        return self._counted().steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because a gradient was inf or NaN."""
        return self._counted().skipped

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last optimizer step was skipped: `if not fabric.last_step_skipped: scheduler.step()`."""
        return self._counted().last_skipped

    @property
    def scale(self) -> float:
        """The loss scale, 1.0 where the loss is not scaled."""
        return self.scaler.factor

    def _counted(self) -> Any:
        counter = self.scaler.counter
        counter.read()
        self.scaler.check_skips(self.name_of)
        return counter

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns version, mode, step counts and the loss scaler's state, as plain values."""
        counts = self.scaler.counter.state_dict()
        return {
            "version": STATE_VERSION,
            "mode": self.mode,
            "scaler": self.scaler.state_dict(),
            **counts,
        } | self.masters.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        From another mode the step counts are restored; the loss scale only where both modes scale, else it is left out
        or keeps its start value. A note in `report` and in the log says so.

        Raises:
            ValueError: not a dict from `state_dict`, or from a newer version; nothing was changed.
        """
        state = check_state(state_dict)
        if state["scaler"] and self.policy.scale:
            self.scaler.load_state_dict(state["scaler"])
        self.scaler.counter.load_state_dict(state)
        self.masters.load_state_dict(state)
        if state["mode"] != self.mode:
            what = what_of_scale(bool(state["scaler"]), self.policy.scale)
            self.note(f"loaded the state of {state['mode']!r} into {self.mode!r}: {what}")

    @cached_property
    def _restores(self) -> ExitStack:
        """Undoes what was put on modules and optimizers besides dtypes."""
        return ExitStack()

    def teardown(self) -> None:
        """Unscales gradients, and restores the methods of modules and optimizers; dtypes stay."""
        if "scaler" in vars(self):
            self.scaler.teardown()
        self._restores.close()

    # ---------------------------------------------------------------- helpers

    def note(self, note: str) -> None:
        """Adds a note to the report, and logs it as a warning."""
        self.report = replace(self.report, notes=(*self.report.notes, note))
        _log.warning(note)

    @cached_property
    def models(self) -> weakref.WeakSet[nn.Module]:
        """The models that this plugin converted and that are alive."""
        return weakref.WeakSet()

    def remember(self, module: nn.Module) -> None:
        """Lets messages name the module's parameters; `convert_module` calls it last."""
        self.models.add(module)

    def name_of(self, param: Tensor) -> str:
        """Returns a parameter's dotted name in the models that were converted, else its shape in words."""
        for module in self.models:
            for name, candidate in module.named_parameters():
                if candidate is param:
                    return name
        return f"a parameter of shape {tuple(param.shape)}"
