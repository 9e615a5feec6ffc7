"""What a scaled loss and float16 cannot hold of a model, found at setup: complex parameters, and weights too large."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precision_core.policy.dtypes import FLOAT_DTYPES, dtype_name
from precision_core.policy.messages import listed
from precision_core.policy.policy import Policy
from precision_core.precision.model.cast_module import ParamDtype


def check_complex(module: nn.Module, policy: Policy) -> None:
    """Raises `ValueError` for complex parameters that would train under a scaled loss."""
    names = [
        f"{name} ({dtype_name(param.dtype)})"
        for name, param in module.named_parameters()
        if param.is_complex() and param.requires_grad
    ]
    if names and policy.scale:
        raise ValueError(
            f"{policy.flat} scales the loss, and torch unscales no complex gradients, those of "
            f'{listed(names)}: use precision="bf16-mixed", which does not scale, hold them as real '
            "parameters (torch.view_as_real), or freeze them with requires_grad_(False) [complex-parameters]"
        )


def check_range(module: nn.Module, dtype_of: ParamDtype, policy: Policy) -> None:
    """Raises `ValueError` for finite weights that `policy.params` rounds to infinity.

    A float32 master would hold them, and forward would compute with inf.
    """
    largest = torch.finfo(policy.params).max
    if largest >= torch.finfo(torch.bfloat16).max:
        return
    names = []
    for name, param in module.named_parameters():
        if param.is_meta or is_lazy(param) or param.dtype not in FLOAT_DTYPES or type(param.detach()) is not Tensor:
            continue
        if dtype_of(name, param) is policy.params and torch.finfo(param.dtype).max > largest:
            values = param.detach()
            beyond = values.to(policy.params).isinf() & values.isfinite()
            if bool(beyond.any()):
                names.append(f"{name} (up to {values[beyond].abs().max().item():g})")
    if names:
        raise ValueError(
            f"{policy.flat} computes with {dtype_name(policy.params)} weights, whose largest number is {largest:,.0f}: "
            f"beyond it are weights of {listed(names, 5)}. Let those modules stay float32 "
            f'(precision="{policy.flat}; NAME: 32-true"), or use precision="bf16-master"'
        )
