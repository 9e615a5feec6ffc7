"""What is no matrix product computes in float32, with weights that FSDP has gathered in a half dtype.

FSDP casts a group's parameters as a whole. A norm would then compute in the half dtype, and an embedding start a
residual stream in it; autocast alone keeps both in float32. So in mixed modes every module that holds parameters of its
own, and is none of torch's matrix products, sees them in float32. An embedding's table would be large: its output
is cast in place of it, which gives the same values. A product in a module of another class still runs in the half
dtype, since autocast casts its weights back: right, at the cost of two casts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from precision_core import Policy
from precision_core.casting import cast
from precision_core.exceptions import Restore
from precision_core.override import override

PRODUCTS = (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""torch's modules whose parameters autocast would cast to the half dtype anyway."""

TABLES = (nn.Embedding, nn.EmbeddingBag)

Make = Callable[[Callable[..., Any]], Callable[..., Any]]


def compute_in_float32(root: nn.Module, policy: Policy) -> list[Restore]:
    """Overrides the forward of modules under `policy` itself, not of its exceptions; returns what undoes it."""
    restores = []
    for name, module in root.named_modules():
        if policy.for_module(name) == policy.flat and not isinstance(module, PRODUCTS):
            if isinstance(module, TABLES):
                restores.append(override(module, "forward", _cast_output))
            elif any(param is not None and param.is_floating_point() for param in module._parameters.values()):
                restores.append(override(module, "forward", _cast_parameters))
    return restores


def _cast_output(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return cast(function(self, *args, **kwargs), torch.float32)

    return forward


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
    is_half = param is not None and param.dtype in (torch.bfloat16, torch.float16)
    return param.float() if is_half else param
