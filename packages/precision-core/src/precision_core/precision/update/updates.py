"""Updates: has optimizers step what a policy stores otherwise than torch does, whichever optimizer it is."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from precision_core.policy.casting import cast_tensor
from precision_core.policy.policy import Policy
from precision_core.precision.masters import Masters
from precision_core.precision.update.gradients import check_widened, narrow, widen
from precision_core.precision.update.kinds import Kind, check_optimizer, kind_of
from precision_core.precision.update.layout import sharded_like
from precision_core.precision.update.loading import Handle, Loading
from precision_core.precision.update.pieces import Groups
from precision_core.precision.update.storage import Storage, make_storage, wide_copy
from precision_core.precision.update.whole import narrowed, widened
from precision_core.scaling.gradients import params_of
from precision_core.scaling.scaler import NO_SCALER, Scaler, Unscale

if TYPE_CHECKING:
    from precision_core.strategies.collectives import Group


class Updates(Masters):
    """Steps half parameters in float32, and stores them as the policy says where torch's optimizers do not.

    Args:
        policy: what is stored in which dtype.
        mode: its name, for messages.
        models: those of the run, whose names tell parameters apart.
        name_of: names a parameter in messages.
    """

    def __init__(
        self, policy: Policy, mode: str, models: Collection[nn.Module], name_of: Callable[[Tensor], str]
    ) -> None:
        self.storage: Storage = make_storage(policy, models)
        self._policy = policy
        self._mode = mode
        self._models = models
        self._name_of = name_of
        self._adopted: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles: list[Handle] = []
        self._kept: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()

    @property
    def note(self) -> str:
        """What a report says of it."""
        return self.storage.note

    # ---------------------------------------------------------------- set-up

    def converter(self, module: nn.Module) -> Callable[[str, nn.Parameter, torch.dtype], Tensor]:
        """Returns what casts the module's parameters, and keeps what the cast takes from those that train."""
        kept = self._kept[module] = {}

        def convert(name: str, param: nn.Parameter, dtype: torch.dtype) -> Tensor:
            is_trained = dtype is self.storage.params and param.requires_grad and param.is_floating_point()
            if not is_trained or param.is_meta or is_lazy(param) or type(param.data) is not Tensor:
                return cast_tensor(param.data, dtype)
            weight, beside = self.storage.split_off(param.data)
            if beside is not None:
                kept[name] = beside
            return weight

        return convert

    def converted(self, module: nn.Module) -> None:
        """Takes what the converter kept, for the weights that it wrote."""
        params = dict(module.named_parameters())
        for name, beside in self._kept.get(module, {}).items():
            self.storage.written(params[name], beside)

    def placed(self, module: nn.Module, group: Group) -> None:
        """Gives what was kept to the parameters that the module has now, in shards where those are; of rank zero."""
        if self.storage.noise is not None and self.storage.noise.seed is None:
            self.storage.noise.seed = group.broadcast(torch.initial_seed() & (2**63 - 1))
        kept, params = self._kept.pop(module, {}), dict(module.named_parameters())
        for name in group.broadcast(list(kept)) if group.world_size > 1 else list(kept):
            beside = group.broadcast(kept.get(name)) if group.world_size > 1 else kept[name]
            param = params[name]
            assert beside is not None
            self.storage.written(param, sharded_like(param, beside).to(param.device))

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Raises `ValueError` for an optimizer that cannot be stepped like that."""
        for optimizer in optimizers:
            check_optimizer(optimizer, self._mode)

    def adopt(self, optimizer: Optimizer) -> None:
        """Puts what is stored beside weights into the optimizer's state, and keeps its dtypes when it loads."""
        if optimizer in self._adopted:
            return
        self._adopted.add(optimizer)
        if self.storage.noise is not None:
            self.storage.noise.register(optimizer)
        self.storage.fixed.update(getattr(optimizer, "non_castable_tensor_keys", ()))
        widen(params_of(optimizer), self._policy)  # a copy of a model has lost it
        self._handles += Loading(self.storage).attach(optimizer)

    def teardown(self) -> None:
        """Lets the optimizers go: their steps are torch's again, on the weights as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for model in self._models:
            narrow(model.parameters(), self._policy)
        for optimizer in self._adopted:
            narrow(params_of(optimizer), self._policy)
        self._adopted.clear()

    # ---------------------------------------------------------------- for checkpoints

    @property
    def key(self) -> str | None:  # type: ignore[override]
        return self.storage.key

    @property
    def exact(self) -> tuple[torch.dtype, ...]:  # type: ignore[override]
        return self.storage.exact

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            weight, beside = self.storage.split_off(value)
        assert beside is not None
        return weight, beside

    def holds(self, param: Tensor) -> bool:
        return self.storage.key is not None and param.dtype is self.storage.params and param.requires_grad

    def value(self, param: Tensor) -> Tensor:
        if param.dtype is not self.storage.params:
            return super().value(param)
        with torch.no_grad():
            return wide_copy(self.storage, param)

    def keep(self, param: Tensor, beside: Tensor) -> None:
        self.storage.written(param, beside.to(param.device))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.storage.noise is None else {"rounding": self.storage.noise.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.storage.noise is not None and "rounding" in state:
            self.storage.noise.load_state_dict(state["rounding"])

    # ---------------------------------------------------------------- a step

    @contextmanager
    def stepping(self, optimizer: Optimizer, scaler: Scaler = NO_SCALER) -> Iterator[None]:
        """Context in which one call of the optimizer's own `step` steps float32 values.

        `scaler` is asked, once the step begins, for what its gradients are still to be multiplied by.

        Raises:
            ValueError: the optimizer evaluates its closure more than once.
            RuntimeError: gradients were added up in another dtype than the policy says.
        """
        check = functools.partial(check_widened, policy=self._policy, name_of=self._name_of)
        if optimizer not in self._adopted:
            check(optimizer)
        self.adopt(optimizer)
        self._kept.clear()
        step = _Step(optimizer, self.storage, self._mode, check, scaler)
        handle = optimizer.register_step_pre_hook(step.begin)  # the last: the user's see the parameters
        try:
            yield
        finally:
            handle.remove()
            step.end()


class _Step:
    """One step: what takes the place of the parameters once the user's hooks and closure have run, until it ends."""

    def __init__(
        self, optimizer: Optimizer, storage: Storage, mode: str, check: Callable[[Optimizer], None], scaler: Scaler
    ) -> None:
        self._optimizer = optimizer
        self._storage = storage
        self._mode = mode
        self._check = check
        self._scaler = scaler
        self._end: Callable[[], None] = lambda: None
        self._has_begun = False

    def begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._has_begun:  # a `step` that calls its base class's
            return None
        self._has_begun = True
        kind = kind_of(optimizer)
        args, kwargs = _closure_first(args, kwargs, self._evaluated)
        self._check(optimizer)
        if self._storage.noise is not None:
            self._storage.noise.begin(optimizer)
        unscale = self._scaler.unscaling(optimizer)
        if kind is Kind.WHOLE:
            self._end = _swapped(optimizer, self._storage, self._mode, unscale)
        else:
            groups = Groups(optimizer, self._storage, by_pieces=kind is Kind.PIECES, unscale=unscale)
            optimizer.param_groups = groups
            self._end = groups.restore
        return args, kwargs

    def end(self) -> None:
        end, self._end = self._end, lambda: None
        end()
        if self._storage.noise is not None:
            self._storage.noise.end()

    def _evaluated(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Runs the closure, with the parameters as the model has them, and returns one that gives its result once."""
        with torch.enable_grad():
            results = [closure()]

        def once() -> Any:
            if not results:
                raise ValueError(
                    f"{self._mode} cannot step {type(self._optimizer).__name__}, which evaluates its closure again in "
                    "the middle of a step, where the model still has the old parameters: use another optimizer, or "
                    'precision="bf16-mixed"'
                )
            return results.pop()

        return once


def _closure_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], evaluated: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of `step(self, closure)` with the closure replaced by `evaluated` of it."""
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": evaluated(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], evaluated(args[1]), *args[2:]), kwargs
    return args, kwargs


def _swapped(optimizer: Optimizer, storage: Storage, mode: str, unscale: Unscale) -> Callable[[], None]:
    """Puts float32 placeholders in the place of all stored parameters; returns what writes them back.

    For optimizers that nothing is known of: after their step, and the hooks behind it.
    """
    lists: list[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]
    originals = [list(params) for params in lists]
    pairs: list[tuple[nn.Parameter, nn.Parameter, int]] = []
    numbers = {} if storage.noise is None else storage.noise.numbers(optimizer)
    for params in lists:
        for index, param in enumerate(params):
            if param.dtype is storage.params and param.grad is not None:
                params[index] = placeholder = widened(
                    optimizer, storage, param, unscale
                )  # in place: some keep the list
                pairs.append((param, placeholder, param._version))

    def restore() -> None:
        for params, original in zip(lists, originals, strict=True):
            params[:] = original

    def end(*given: Any) -> None:  # twice, where a `step` calls its base class's; torch goes through its hooks now
        restore()
        if any(param._version != version for param, _, version in pairs):
            raise RuntimeError(
                f"{mode}: {type(optimizer).__name__} wrote to parameters that it holds beside its param_groups, past "
                'their float32 values: use another optimizer, or precision="bf16-mixed"'
            )
        with torch.no_grad():
            for param, placeholder, _ in pairs:
                narrowed(optimizer, storage, param, placeholder, numbers)
        pairs.clear()

    def abandon() -> None:
        handle.remove()
        restore()
        for pair in pairs:  # the step raised
            optimizer.state.pop(pair[1], None)

    handle = optimizer.register_step_post_hook(end)
    hooks: Any = optimizer._optimizer_step_post_hooks  # ordered; first, so that the user's see the parameters
    hooks.move_to_end(handle.id, last=False)
    return abandon
