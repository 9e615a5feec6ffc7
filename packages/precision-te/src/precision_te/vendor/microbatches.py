"""Microbatches: what is made of a weight between two optimizer steps, padded or in FP8, is made once.

The vendor's layers take `is_first_microbatch`, by which they keep a weight in FP8 until the next first one. Here it
is said by `fabric.no_backward_sync`, which a loop enters for all microbatches but the last, and by what the weight says
of itself. Not without gradients: people put other weights into a model to evaluate it, through `param.data` too, of
which torch counts no version.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Here(threading.local):
    accumulating = False


_here = _Here()
_steps = [0]
"""Of any optimizer in this process: torch's fused ones change weights and count no version."""


def _stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_stepped)


@contextmanager
def accumulating() -> Iterator[None]:
    """Context of microbatches after which another one comes before the optimizer steps."""
    before, _here.accumulating = _here.accumulating, True
    try:
        yield
    finally:
        _here.accumulating = before


class _State(NamedTuple):
    """That of a weight: while it is equal, the values are."""

    memory: int
    version: int
    steps: int


class Kept:
    """What a layer keeps of its weight and bias until they change. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._padded: dict[str, tuple[_State, Tensor]] = {}
        self._quantized: _State | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def is_first_microbatch(self, weight: Tensor) -> bool | None:
        """Returns what the vendor's layer is to be told; None: that nothing is kept in FP8, and nothing is made so."""
        if not _keeps():
            return None
        now = _state(weight)
        if self._quantized == now:
            return False
        self._quantized = now if _here.accumulating else None
        return True if _here.accumulating else None

    def forget_quantized(self) -> None:
        """Has the next microbatch quantise, where the first one did not: it raised, or ran outside of FP8."""
        self._quantized = None

    def padded(self, name: str, tensor: Tensor, more: tuple[int, ...]) -> Tensor:
        """Returns `torch.nn.functional.pad(tensor, more)` with its gradient; one copy for all forwards in between."""
        if not any(more):
            return tensor
        if not _keeps():
            return pad(tensor, more)
        now = _state(tensor)
        kept = self._padded.get(name)
        if kept is None or kept[0] != now:
            kept = self._padded[name] = now, pad(tensor.detach(), more)
        result: Tensor = _Padded.apply(tensor, _Box(kept[1]))  # type: ignore[no-untyped-call]
        return result


class _Box(NamedTuple):
    """A tensor that autograd does not look at."""

    tensor: Tensor


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, padded: _Box) -> Tensor:
        ctx.sizes = tensor.shape
        return padded.tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][tuple(slice(size) for size in ctx.sizes)], None


def _keeps() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _state(weight: Tensor) -> _State:
    return _State(weight.data_ptr(), weight._version, _steps[0])
