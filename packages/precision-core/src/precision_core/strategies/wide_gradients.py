"""Wide gradients: those of half parameters accumulate and are averaged in float32 under torch's DDP (`grads=float32`).

DDP copies each gradient into a bucket of its parameter's dtype, and raises on one that is wider. So while it reduces,
it sees what this backward computed, which is no wider than the parameter; what was added up before is put aside. The
two meet in float32 when their bucket is sent, and DDP makes the gradients anew of what comes back, in float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.policy.dtypes import dtype_name
from precision_core.policy.messages import listed
from precision_core.policy.policy import Policy


def check_dense(module: nn.Module, policy: Policy) -> None:
    """Raises `ValueError` for layers whose gradients are sparse: DDP writes what it reduced into the half gradient."""
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse and layer.weight.dtype is policy.params
    ]
    if names and policy.grads is not policy.params:
        raise ValueError(
            f"grads={dtype_name(policy.grads)} under DDP is for dense gradients, and {listed(names)} of this "
            f"{type(module).__name__} makes sparse ones: say sparse=False, leave grads out, or name the layer in the "
            f'policy ("; {names[0]}: 32-true")'
        )


class WideGradients:
    """The gradients of one engine of DDP, of `params` that are in the policy's half dtype; it lives as long as that."""

    def __init__(self, engine: DistributedDataParallel, params: Iterable[nn.Parameter], policy: Policy) -> None:
        self._policy = policy
        trained = [param for param in params if param.requires_grad]
        self._params = [param for param in trained if param.dtype is policy.params]
        self._before: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> what was added up, while DDP reduces
        self._reduces = False
        """Whether the next backward is one whose gradients DDP reduces."""
        self._is_begun = False
        self._repeats = bool(engine.static_graph)
        self._may_be_unused = self._repeats or bool(engine.find_unused_parameters)
        engine.register_forward_pre_hook(self._forward)
        engine.register_comm_hook(None, self._make_average())
        this = weakref.ref(self)  # parameters are not to keep each other alive

        def accumulated(param: Tensor) -> None:
            if (mine := this()) is not None:
                mine._accumulated(param)

        for param in self._params:
            param.grad_dtype = None  # any
        for param in trained:  # the first hook of all puts aside what DDP is not to see
            handle = param.register_post_accumulate_grad_hook(accumulated)  # runs before DDP's
            engine._accum_grad_hooks.append(handle)  # Reducer removes these with the engine

    def settle(self) -> None:
        """Gives parameters what DDP has left out: one that no rank used keeps what it had, as under torch."""
        for param, before in list(self._before.items()):
            if param.grad is None:
                param.grad = before
            elif param.grad.dtype is self._policy.params:  # nothing was reduced: backward raised
                param.grad = before.add_(param.grad)
        self._before.clear()

    def _forward(self, engine: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and engine.require_backward_grad_sync:
            self.settle()
            self._reduces, self._is_begun = True, False

    def _accumulated(self, param: Tensor) -> None:
        """Called when a gradient was added up, before DDP looks at it."""
        gradient = param.grad
        assert gradient is not None
        is_half = gradient.dtype is self._policy.params
        if not self._reduces:
            if is_half:  # the first
                param.grad = gradient.to(self._policy.grads)
            return
        if not self._is_begun:
            self._is_begun = True
            for other in self._params:
                if other is not param and other.grad is not None:
                    self._before[other] = other.grad.to(self._policy.grads)
                    # One that an earlier backward used has to be there, for DDP to count it as used.
                    other.grad = torch.zeros_like(other) if self._may_be_unused else None
        if param.dtype is not self._policy.params:
            return
        if not is_half:  # with what was added up before
            self._before[param], param.grad = gradient, torch.zeros_like(param)
        elif self._repeats:  # more may be added in this backward
            before = self._before.get(param)
            wide = gradient.to(self._policy.grads)
            self._before[param] = wide if before is None else before.add_(wide)
            gradient.zero_()

    def _make_average(self) -> Callable[[object, dist.GradBucket], torch.futures.Future[Tensor]]:
        policy, world_size = self._policy, dist.get_world_size()

        def average(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            gradients = bucket.buffer()
            is_half = gradients.dtype is policy.params
            kept = policy.grads if is_half else gradients.dtype
            sent = gradients.to(kept, copy=True)
            for param, view in zip(bucket.parameters(), bucket.gradients(), strict=True) if is_half else ():
                if (before := self._before.get(param)) is not None:
                    start = view.storage_offset() - gradients.storage_offset()
                    sent.as_strided(view.shape, view.stride(), start).add_(before)
                    if not self._may_be_unused:
                        del self._before[param]
                param.grad = None  # DDP makes one, of the dtype of what this returns
            if bucket.is_last():
                self._reduces = self._is_begun = False
            sent = sent.div_(world_size).to(policy.reduce if is_half else kept)
            future = dist.all_reduce(sent, async_op=True).get_future()
            return future.then(lambda done: done.value()[0].to(kept))

        average.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # DDP compares
        return average
