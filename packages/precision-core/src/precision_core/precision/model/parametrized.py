"""Parametrised layers (torch.nn.utils.parametrize) that cannot compute in a half dtype, found at setup.

Some have no half kernel, and backward of others is NaN there (torch's matrix_exp, which `orthogonal` uses): a copy of
each is tried once, forward and backward.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from precision_core.policy.dtypes import HALF_DTYPES, dtype_name
from precision_core.policy.policy import Policy

_TRIES = 5


def check_parametrized(name: str, module: nn.Module, policy: Policy, asked: Policy) -> None:
    """Raises `ValueError` for a parametrisation of `module`, which runs under `policy`, that has no finite gradients.

    `asked` is the policy of the whole model, for the way out.
    """
    if policy.params not in HALF_DTYPES or not is_parametrized(module):
        return
    for key, parametrization in module.parametrizations.items():  # type: ignore[union-attr, operator]
        tensors = [*parametrization.parameters(), *parametrization.buffers()]
        if any(tensor.is_meta or not bool(tensor.isfinite().all()) for tensor in tensors):
            continue
        reason = _failure(copy.deepcopy(parametrization).requires_grad_().to(policy.params))
        if reason is not None:
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}): its parametrisation of {key!r} cannot run in "
                f"{dtype_name(policy.params)}: {reason}. Name the layer in an exception, "
                f'"{asked}; {name or "*"}: 32-true", or use a mixed mode'
            )


def _failure(parametrization: nn.Module) -> str | None:
    params = [param for param in parametrization.parameters() if param.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            weight = parametrization()
            for index in range(_TRIES):  # whether matrix_exp's backward is NaN depends on what comes in
                random = torch.randn(weight.shape, generator=generator)
                upstream = (random if index else torch.ones_like(random)).to(weight)
                gradients = torch.autograd.grad(weight, params, upstream, retain_graph=True, allow_unused=True)
                if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
                    return "its gradients are not finite"
    except RuntimeError as error:  # NotImplementedError is one
        return str(error).partition("\n")[0]
    return None
