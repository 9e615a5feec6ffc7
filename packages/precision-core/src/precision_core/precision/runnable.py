"""Which policies core's plugins run: others are refused, naming the plugin that runs them, if there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from precision_core.policy.dtypes import HALF_DTYPES, dtype_name
from precision_core.policy.policy import Policy

_AUTOCAST = (torch.bfloat16, torch.float16)

_REFUSED: tuple[tuple[Callable[[Policy], bool], str], ...] = (
    (
        lambda policy: policy.state is not policy.params and policy.params not in HALF_DTYPES,
        "core chooses the dtype of state for half params only; say params=bfloat16,master=float32,state=bfloat16",
    ),
    (
        lambda policy: policy.grads is not policy.params and not hasattr(torch.Tensor, "grad_dtype"),
        f"gradients wider than their parameters need Tensor.grad_dtype, and torch {torch.__version__} has none (2.10 "
        "and later do); leave grads out",
    ),
    (
        lambda policy: policy.rounding != "nearest" and policy.params is torch.float16,
        "stochastic rounding is for bfloat16; say params=bfloat16, or rounding=nearest",
    ),
    (
        lambda policy: policy.mixed and policy.params is torch.float64,
        "nothing runs float64 params under a narrower compute; use 64-true, or float32 params",
    ),
    (
        lambda policy: policy.mixed and policy.compute not in _AUTOCAST,
        "a compute that differs from params is autocast's work, which knows bfloat16 and float16; nothing runs another",
    ),
    (
        lambda policy: policy.scale and policy.compute is not torch.float16,
        "nothing scales the loss without float16 compute; say scale=false",
    ),
    (
        lambda policy: policy.scale and policy.params is not torch.float32 and policy.master is None,
        "a scaled loss needs float32 values to unscale gradients for: say params=float32 (16-mixed), or "
        "params=float16,master=float32 (16-master)",
    ),
    (
        lambda policy: policy.mixed and policy.params is not torch.float32,
        "mixed precision trains float32 params; say params=float32, or compute like params",
    ),
)


def check_runnable(policy: Policy) -> None:
    """Raises `ValueError` when no plugin of core runs `policy` or one of its exceptions."""
    for pattern, part in policy.exceptions:
        around = policy if part.params is policy.params else Policy(part.params)
        if part.params in HALF_DTYPES and _stored(part) != _stored(around):
            stored = replace(part, **_fields(around), scale=part.scale and around.master is not None)
            # float16 parameters without a master train under no scaled loss
            lost = policy.scale and stored.params is torch.float16 and stored.master is None
            way = f"{pattern}: 32-true" if lost else f"{pattern}: {stored}, or {pattern}: 32-true"
            raise ValueError(
                f"precision={str(policy)!r} cannot run here: {pattern} would store its parameters and their state "
                f"otherwise than the policy around it, and a step stores all {dtype_name(part.params)} parameters "
                f"alike: say {way}"
            )
    for part in (policy.flat, *(exception for _, exception in policy.exceptions)):
        for refused, reason in _REFUSED:
            if refused(part):
                raise ValueError(f"precision={str(policy)!r} cannot run here: {reason} [cannot-run-here]")


def _fields(policy: Policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in ("master", "state", "grads", "rounding")}


def _stored(policy: Policy) -> tuple[object, ...]:
    return tuple(_fields(policy).values())
