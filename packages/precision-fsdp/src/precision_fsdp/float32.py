"""All but matrix products compute in float32, with weights that FSDP has gathered in a half dtype.

FSDP casts all parameters of a group. A norm would then compute in the half dtype, and an embedding start a
residual stream in it; autocast alone keeps both in float32. So in mixed modes every module that holds parameters of its
own, and is none of torch's matrix products, sees them in float32. An embedding's table would be large: its output
is cast instead, which gives the same values, and its gradient, a sum over all tokens, is accumulated in float32 and
rounded once. A product in a module of another class still runs in the half dtype, since autocast casts its weights
back: right, at the cost of two casts.

Running statistics of batch norms stay float32 as well, whatever dtype buffers have: torch wants them as weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from precision_core import Policy
from precision_core.override import override
from precision_core.precision import Restore

PRODUCTS = (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""torch's modules whose parameters autocast would cast to the half dtype anyway."""

_HALF = (torch.bfloat16, torch.float16)


def compute_in_float32(root: nn.Module, policy: Policy) -> list[Restore]:
    """Overrides the forward of modules under `policy` itself, not of its exceptions; returns what undoes it."""
    restores = []
    for name, module in root.named_modules():
        if policy.for_module(name) == policy.flat and not isinstance(module, PRODUCTS):
            if _is_plain_table(module):
                restores.append(override(module, "forward", _look_up))
            elif any(param is not None and param.is_floating_point() for param in module._parameters.values()):
                restores.append(override(module, "forward", _cast_parameters))
    return restores


@contextmanager
def float32_statistics(root: nn.Module, policy: Policy) -> Iterator[list[str]]:
    """Context in which buffers are cast, and batch norms under `policy` itself keep float32 statistics; their names."""
    kept = [
        (f"{name}.{key}" if name else key, module, key, buffer)
        for name, module in root.named_modules()
        if isinstance(module, _NormBase) and policy.buffers in _HALF and policy.for_module(name) == policy.flat
        for key, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    yield [name for name, *_ in kept]
    for _, module, key, buffer in kept:
        module._buffers[key] = buffer.float()


def _is_plain_table(module: nn.Module) -> bool:
    """Whether it is looked up as `_LookUp` does, and no subclass or option does more."""
    plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return plain and "forward" not in vars(module) and module.max_norm is None


def _look_up(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Embedding, input: Tensor) -> Any:
        if self.weight.dtype not in _HALF:
            return function(self, input)
        return _LookUp.apply(self.weight, input, self.padding_idx, self.scale_grad_by_freq)  # type: ignore[no-untyped-call]

    return forward


class _LookUp(torch.autograd.Function):
    """Rows of a half table, in float32; the gradients of a row's tokens are accumulated in float32."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding_idx: int | None, scale_grad_by_freq: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.options = len(table), -1 if padding_idx is None else padding_idx, scale_grad_by_freq
        ctx.dtype = table.dtype
        return F.embedding(ids, table).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = torch.ops.aten.embedding_dense_backward(grads[0], *ctx.saved_tensors, *ctx.options)
        return total.to(ctx.dtype), None, None, None


def _cast_parameters(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        gathered = self._parameters
        self.__dict__["_parameters"] = {name: _wide(param) for name, param in gathered.items()}
        try:
            return function(self, *args, **kwargs)
        finally:
            self.__dict__["_parameters"] = gathered

    return forward


def _wide(param: Any) -> Any:
    is_half = param is not None and param.dtype in _HALF
    return param.float() if is_half else param
