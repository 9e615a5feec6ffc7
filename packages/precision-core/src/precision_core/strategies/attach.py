"""Attach: has models and optimizers run under a precision and a strategy, by overriding methods, until teardown."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.override import is_overridden, override, uncompiled, undone_on_error
from precision_core.precision.base import Precision
from precision_core.precision.loss_watch import LossWatch
from precision_core.precision.model import unmarked
from precision_core.precision.model.recast import OptimizerDtypes, following_casts, forget_cast, remember_dtypes
from precision_core.precision.model.remap import ParamMap, named_params, remap_parameters, replaced_params
from precision_core.precision.model.report import module_bytes
from precision_core.precision.model.upcast import upcast
from precision_core.precision.tf32 import make_forward, tf32_context
from precision_core.scaling.gradients import params_of
from precision_core.strategies import membership
from precision_core.strategies.base import Strategy
from precision_core.strategies.schedulers import Schedulers


class Attached:
    """What was set up with one precision under one strategy; it keeps no model and no optimizer alive."""

    def __init__(self, precision: Precision, strategy: Strategy, *, upcast: bool, tf32: bool = False) -> None:
        self._precision = precision
        self._strategy = strategy
        self._upcast = upcast
        self._tf32 = tf32
        self.tf32_context = tf32_context(strategy.device.type, tf32)
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self.losses = LossWatch(precision.mode)
        self._models: WeakSet[nn.Module] = WeakSet()
        self._schedulers = Schedulers(precision)
        self._dtypes = OptimizerDtypes(lambda: precision.policy, precision.name_of)
        self._restores = ExitStack()
        self._replaced: ParamMap = WeakIdKeyDictionary()  # what setup replaced, for optimizers that are set up later

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Context that restores the methods of objects when it raises, overrides by precision and strategy too."""
        before, self._restores = self._restores, ExitStack()
        try:
            with self._restores as restores, undone_on_error():
                yield
                before.callback(restores.pop_all().close)
        finally:
            self._restores = before

    def detach(self) -> None:
        """Restores the methods of all of them; dtypes stay."""
        self._restores.close()

    # ---------------------------------------------------------------- set-up

    def register(self, optimizers: Sequence[Optimizer], model: nn.Module | None = None) -> None:
        """Tells strategy and precision of the optimizers, before a model is converted: either may refuse one.

        Warns of optimizers without a `model`, set up apart, that step none of those that were set up.

        Raises:
            ValueError: one that was set up before, is refused, or has nothing to do with `model`.
        """
        self._check_are_new(optimizers)
        target = None if model is None else uncompiled(model)
        if target is None:
            membership.warn_apart(optimizers, list(self._models), *self._known_params())
        else:
            membership.check_together(target, optimizers, *self._known_params())
        self._strategy.check_optimizers(target, optimizers)
        self._precision.register_optimizers(*optimizers)

    def _check_are_new(self, optimizers: Sequence[Optimizer]) -> None:
        for index, optimizer in enumerate(optimizers):
            if not isinstance(optimizer, Optimizer):
                raise ValueError(f"fabric.setup expected a torch optimizer, got a {type(optimizer).__name__}")
            if is_overridden(optimizer, "step") or any(optimizer is other for other in optimizers[:index]):
                raise ValueError(f"this {type(optimizer).__name__} is set up already [set-up-twice]")

    def _known_params(self) -> tuple[WeakIdKeyDictionary, set[int]]:
        """Returns the parameters of models that were set up, as they were and are, and ids of what optimizers hold."""
        known = WeakIdKeyDictionary()
        known.update(self._replaced)
        for model in self._models:
            known.update({param: param for param in model.parameters()})
        return known, {id(param) for optimizer in self.optimizers for param in params_of(optimizer)}

    def module(self, model: nn.Module) -> nn.Module:
        """Converts the model, moves it to where it runs, and puts the precision around its forward; returns it.

        Raises:
            ValueError: it was set up before, the precision refuses it, or would replace the root of a compiled one.
        """
        target = uncompiled(model)
        if is_overridden(target, "forward"):
            raise ValueError(
                f"this {type(target).__name__} is set up already; a copy of it needs no setup either [set-up-twice]"
            )
        before = named_params(target)
        converted = self._strategy.setup_module(self._convert(target))
        if converted is not target is not model:  # torch.compile holds on to the one that it was given
            raise ValueError(
                f"{self._precision.mode} replaced the compiled {type(target).__name__}: set it up first, then "
                "compile what fabric.setup returns"
            )
        self._replaced.update(replaced_params(before, converted))
        self._precision.placed(converted, self._strategy)
        self._models.add(converted)
        outer = model if converted is target else converted
        self._attach_forward(converted, outer, "forward")
        policy = self._precision.policy
        forget_cast(converted)
        self._override(converted, "_apply", following_casts(policy.params))
        for name in unmarked.methods(converted) if policy.mixed else ():
            if name not in vars(converted):  # not what the user has put there
                self._override(
                    converted, name, unmarked.watching(name, self._strategy.device.type, self._precision.mode)
                )
        return outer

    def _convert(self, module: nn.Module) -> nn.Module:
        precision = self._precision
        if not self._upcast:
            return precision.convert_module(module)
        bytes_before = module_bytes(module)
        items = upcast(module, precision.policy, precision.storage)
        converted = precision.convert_module(module)
        if items:
            both = (*items, *precision.report.converted)
            precision.report = replace(precision.report, converted=both, bytes_before=bytes_before)
        return converted

    def take_optimizers(self, *optimizers: Optimizer) -> None:
        """Gives the optimizers the parameters that replaced theirs, and has precision and strategy run their steps."""
        for optimizer in optimizers:
            remap_parameters(optimizer, self._replaced)
            self._strategy.setup_optimizer(optimizer)
            self._precision.adopt(optimizer)
            self.optimizers.add(optimizer)
            self._override(optimizer, "step", self._make_step)

    def remember_dtypes(self, model: nn.Module | None, optimizers: Sequence[Optimizer]) -> None:
        """Records the dtypes that setup leaves, engine and all: what differs later was cast by the user."""
        if model is not None:
            forget_cast(model)
            remember_dtypes(model)
        for optimizer in optimizers:
            self._dtypes.remember(optimizer)

    def take_schedulers(self, *schedulers: Any) -> None:
        """Has the schedulers' steps do nothing after skipped steps; raises `ValueError` as Fabric's method does."""
        for scheduler in schedulers:
            for restore in self._schedulers.take(scheduler, self.optimizers):
                self._restores.callback(restore)

    def _make_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        run, losses, schedulers, dtypes = self._strategy.optimizer_step, self.losses, self._schedulers, self._dtypes
        losses.sees_steps = True

        def step(self: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            dtypes.check(self)
            schedulers.before_step(self)
            result = run(self, closure, **kwargs)
            schedulers.after_step(self)
            losses.stepped()
            return result

        def plain(optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
            return function(optimizer, **kwargs) if closure is None else function(optimizer, closure, **kwargs)

        def let_go() -> None:
            nonlocal run
            run = plain

        self._restores.callback(let_go)  # a scheduler that has wrapped this step goes on calling it after teardown
        return step

    def mark_forward_method(self, model: nn.Module, name: str) -> None:
        """Lets the model's method `name` run in the precision too; raises `ValueError` as Fabric's method does."""
        target = uncompiled(model)
        if not is_overridden(target, "forward"):
            raise ValueError("fabric.mark_forward_method: set the model up first with fabric.setup(model)")
        method = getattr(target, name, None) if isinstance(name, str) else None
        if not callable(method) or isinstance(method, nn.Module):
            raise ValueError(f"fabric.mark_forward_method: {type(target).__name__} has no method {name!r}")
        if inspect.isgeneratorfunction(inspect.unwrap(method)):
            raise ValueError(
                f"fabric.mark_forward_method: {name!r} is a generator, whose body runs after the call has returned, "
                "outside of the precision: have it call a method that is marked"
            )
        if is_overridden(target, name) and not unmarked.is_watched(target, name):
            raise ValueError(f"fabric.mark_forward_method: {name!r} is marked already")
        self._attach_forward(target, model, name)

    def _attach_forward(self, module: nn.Module, outer: nn.Module, name: str) -> None:
        self._override(module, name, self._strategy.make_forward)
        make = self._strategy.make_outer_forward(module)
        if make is not None:  # outside of torch.compile: an engine is not to be traced
            self._override(outer, name, make)
        if self.tf32_context is not nullcontext:
            self._override(outer, name, make_forward(module, self.tf32_context, self._tf32))

    def _override(self, obj: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._restores.callback(override(obj, name, make))
