"""DDP: a copy of the model in every process, gradients averaged over them (torch's DistributedDataParallel)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from precision_core.override import uncompiled
from precision_core.policy.dtypes import dtype_name
from precision_core.policy.messages import listed
from precision_core.precision.base import Precision
from precision_core.scaling.gradients import params_of
from precision_core.strategies.base import Strategy
from precision_core.strategies.collectives import TorchGroup
from precision_core.strategies.processes import Ranks, join
from precision_core.strategies.reducer import Reducer
from precision_core.strategies.wide_gradients import WideGradients, check_dense


class DDPStrategy(Strategy):
    """One process per device, each with a full copy of the model; gradients are averaged in `policy.reduce`.

    The model keeps its class, attributes and keys: the engine is looked up for the very instance that was set up, so
    copies and pickles of it are plain models. Gradients of parameters that begin to train later are averaged from the
    next forward on; added ones start from rank 0's values. Outside of training (`torch.no_grad()`) no process waits
    for the others.

    Args:
        backend: of torch.distributed ("gloo", "nccl", ...); None is gloo on CPUs, and nccl or xccl beside it on GPUs.
        timeout: how long a process waits for the others in a collective; None is torch's default.
        **engine: options of torch.nn.parallel.DistributedDataParallel: find_unused_parameters, static_graph,
            broadcast_buffers, bucket_cap_mb, gradient_as_bucket_view, ...
    """

    name = "ddp"
    multiprocess = True
    keeps_wide_gradients = True

    def __init__(self, *, backend: str | None = None, timeout: timedelta | None = None, **engine: Any) -> None:
        self.backend = backend
        self.timeout = timeout
        self._options = engine

    def join(self, ranks: Ranks) -> None:
        """Joins the other processes of the run."""
        self._reducers: WeakKeyDictionary[nn.Module, Reducer] = WeakKeyDictionary()
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._wide: WeakSet[WideGradients] = WeakSet()
        self._made_group = join(ranks, self.device, self.backend, self.timeout)
        self.group = TorchGroup(ranks, self.device)

    def refuses(self, precision: Precision) -> str | None:
        """Returns why not: gradients that are wider than DDP's buckets, and were to lie in them."""
        policy = precision.policy
        if policy.grads is not policy.params and self._options.get("gradient_as_bucket_view"):
            return (
                f"DDPStrategy(gradient_as_bucket_view=True) keeps gradients in DDP's buckets, which are "
                f"{dtype_name(policy.params)} as the parameters are, not grads={dtype_name(policy.grads)}: leave one "
                "of the two out"
            )
        return super().refuses(precision)

    # ---------------------------------------------------------------- set-up

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Moves the module to the device and makes its engine; all ranks get rank 0's parameters and buffers.

        Raises:
            ValueError: layers whose gradients are sparse, under a policy whose gradients are wider than parameters.
        """
        check_dense(module, self.precision.policy)
        module = super().setup_module(module)
        find_unused = bool(self._options.get("find_unused_parameters"))
        make = functools.partial(self._make_engine, module)
        self._reducers[module] = Reducer(module, make, find_unused=find_unused, presence=self.presence)
        return module

    def _make_engine(self, module: nn.Module, init_sync: bool) -> DistributedDataParallel:
        options = self._options if init_sync else self._options | {"init_sync": False}
        engine = DistributedDataParallel(_Caller(module), **options)
        policy = self.precision.policy
        if policy.grads is policy.params:
            _set_reduction(engine, policy.params, policy.reduce)
        else:
            self._wide.add(WideGradients(engine, module.parameters(), policy))
        return engine

    def make_outer_forward(self, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
        """Returns what lets a method of `module` run in its engine."""
        reducers, precision = self._reducers, self.precision
        has_views = bool(self._options.get("gradient_as_bucket_view"))  # DDP replaces those where it rebuilds buckets

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                reducer = reducers.get(uncompiled(self)) if torch.is_grad_enabled() else None
                engine = None if reducer is None else reducer.engine()
                if engine is None:
                    return function(self, *args, **kwargs)
                with precision.scaler.replacing() if has_views else nullcontext():
                    return engine(function, self, *args, **kwargs)

            return forward

        return make

    # ---------------------------------------------------------------- step

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Runs backward from the loss; DDP reduces gradients in it."""
        try:
            super().backward(tensor, module, *args, **kwargs)
        finally:
            self._settle()

    def _settle(self) -> None:
        for wide in self._wide:
            wide.settle()

    def clip_gradients(self, module: nn.Module | None, optimizer: Optimizer | None, **clip: Any) -> Tensor | None:
        """Unscales and clips gradients; arguments and result as in `Precision.clip_gradients`."""
        self._settle()
        return super().clip_gradients(module, optimizer, **clip)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Steps the optimizer as the precision says; before its first step, warns of what DDP does not average."""
        self._settle()
        if optimizer not in self._stepped:
            self._stepped.add(optimizer)
            self._warn_of_others(optimizer)
        return super().optimizer_step(optimizer, closure, **kwargs)

    def _warn_of_others(self, optimizer: Optimizer) -> None:
        others = [param for param in params_of(optimizer) if param.grad is not None]
        for reducer in self._reducers.values() if others else ():
            others = [param for param in others if not reducer.has(param)]
        if others and self.group.world_size > 1:
            shapes = listed((str(tuple(param.shape)) for param in others), 5)
            warnings.warn(
                f"this {type(optimizer).__name__} steps {len(others)} parameters of no model that was set up, of "
                f"shapes {shapes}, whose gradients are not averaged over ranks: each rank will have values of its own. "
                "Set their module up too, with fabric.setup(module)",
                stacklevel=4,
            )

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Context in which backward reduces no gradients; the forward has to be inside it, too."""
        reducer = self._reducers.get(module)
        return reducer.no_sync() if enabled and reducer is not None else nullcontext()

    def teardown(self) -> None:
        """Lets the engines go, and ends the process group if it was made here."""
        self._reducers.clear()
        if self._made_group and dist.is_initialized():
            dist.destroy_process_group()
        self._made_group = False


class _Caller(nn.Module):
    """What DDP wraps: it holds the user's module and calls the method that is asked for, so that hooks run once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def _set_reduction(engine: DistributedDataParallel, params: torch.dtype, reduce: torch.dtype) -> None:
    """Has gradients of dtype `params` averaged in `reduce`; those of other dtypes (exceptions) in their own."""
    if reduce is params:
        return
    world_size = dist.get_world_size()

    def average(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer()
        sent = gradients.to(reduce if gradients.dtype is params else gradients.dtype)
        future = dist.all_reduce(sent.div_(world_size), async_op=True).get_future()  # a copy, or DDP's own bucket
        return future.then(lambda done: gradients.copy_(done.value()[0]))

    average.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # DDP compares these
    engine.register_comm_hook(None, average)
