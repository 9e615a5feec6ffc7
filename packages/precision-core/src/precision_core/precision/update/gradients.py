"""Gradients: those of half parameters accumulate in float32 where the policy says so (`grads=float32`).

torch casts what backward computes to the parameter's `grad_dtype` (2.10 and later) and adds it up in that. A copy of a
parameter (`copy.deepcopy`, a pickle, `load_state_dict(assign=True)`) has lost it, without a word: what is set up later
gets it back, and a step with half gradients raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_core.policy.dtypes import dtype_name
from precision_core.policy.messages import listed
from precision_core.policy.policy import Policy


def widen(params: Iterable[Tensor], policy: Policy) -> None:
    """Has the gradients of half `params` accumulate in `policy.grads`, where nobody has said otherwise.

    Gradients that they have are cast.
    """
    if policy.grads is policy.params:
        return
    for param in params:
        if param.dtype is policy.params and param.is_leaf and param.grad_dtype is param.dtype:
            _set(param, policy.grads)


def narrow(params: Iterable[Tensor], policy: Policy) -> None:
    """Gives `params` torch's own `grad_dtype` back, and casts the gradients that they have."""
    if policy.grads is policy.params:
        return
    for param in params:
        if param.dtype is policy.params and param.is_leaf and param.grad_dtype is not param.dtype:
            _set(param, param.dtype)


def _set(param: Any, dtype: torch.dtype) -> None:
    gradient, param.grad = param.grad, None
    param.grad_dtype = dtype
    param.grad = None if gradient is None else gradient.to(dtype)


def check_widened(optimizer: Optimizer, policy: Policy, name_of: Callable[[Tensor], str]) -> None:
    """Raises `RuntimeError` where a step would apply gradients that were added up in half precision."""
    if policy.grads is policy.params:
        return
    narrow = [
        param
        for group in optimizer.param_groups
        for param in group["params"]
        if param.dtype is policy.params and param.grad is not None and param.grad.dtype is not policy.grads
    ]
    if narrow:
        names = listed((name_of(param) for param in narrow), 5)
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() would apply gradients that were added up in "
            f"{dtype_name(policy.params)}, and the policy says grads={dtype_name(policy.grads)}: {names}. These "
            "parameters have no grad_dtype of their own: a copy of a model (copy.deepcopy, a pickle) loses it, and a "
            "parameter that was made after fabric.setup has none. Give their optimizer to fabric.setup_optimizers "
            f"before their first backward, or set param.grad_dtype = torch.{dtype_name(policy.grads)}"
        )
