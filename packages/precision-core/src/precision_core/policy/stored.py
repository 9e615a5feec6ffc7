"""Which dtypes go together for what training stores: master weights, the optimizer's state, gradients, rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from precision_core.policy.dtypes import HALF_DTYPES, dtype_name
from precision_core.policy.messages import nearest

if TYPE_CHECKING:
    from precision_core.policy.policy import Policy

ROUNDINGS = ("nearest", "stochastic")


def _widens_gradients(policy: Policy) -> bool:
    return policy.params in HALF_DTYPES and policy.grads is torch.float32


def _rounds_nothing(policy: Policy) -> bool:
    writes_params = policy.params in HALF_DTYPES and policy.master is None
    return policy.rounding == "stochastic" and not writes_params and policy.state is not torch.bfloat16


_CONTRADICTIONS: tuple[tuple[Callable[[Policy], bool], Callable[[Policy], str]], ...] = (
    (
        lambda policy: policy.master is not None and policy.params not in HALF_DTYPES,
        lambda policy: (
            f"master={dtype_name(policy.master or policy.params)} beside params={dtype_name(policy.params)}: only half "
            "params have a master, the optimizer steps on others themselves; say master=none, or params=bfloat16"
        ),
    ),
    (
        lambda policy: policy.master not in (None, torch.float32),
        lambda policy: f"master={dtype_name(policy.master or policy.params)}: allowed are float32 and none",
    ),
    (
        lambda policy: (
            policy.state is not (policy.master or policy.params)
            and (policy.state not in (torch.float32, torch.bfloat16) or policy.params is torch.float64)
        ),
        lambda policy: (
            f"state={dtype_name(policy.state)} under params={dtype_name(policy.params)}: allowed are "
            + (
                "float64; leave it out"
                if policy.params is torch.float64
                else f"float32, bfloat16, and {dtype_name(policy.master or policy.params)}, which it is if left out"
            )
        ),
    ),
    (
        lambda policy: policy.grads is not policy.params and not _widens_gradients(policy),
        lambda policy: (
            f"grads={dtype_name(policy.grads)} under params={dtype_name(policy.params)}: gradients accumulate in "
            "their parameters' dtype, those of half params in float32 as well; leave it out, or say grads=float32"
        ),
    ),
    (
        _rounds_nothing,
        lambda policy: (
            "rounding=stochastic, and nothing is stored in a half dtype that it could round: it is for half params "
            "without a master, and for state=bfloat16; say rounding=nearest"
        ),
    ),
)


def check_stored(policy: Policy) -> None:
    """Raises `ValueError` where master, state, grads or rounding contradict each other or params."""
    if policy.rounding not in ROUNDINGS:
        allowed = " and ".join(ROUNDINGS)
        hint = nearest(str(policy.rounding), ROUNDINGS)
        raise ValueError(f"rounding={policy.rounding!r}: allowed are {allowed}{hint}")
    for holds, reason in _CONTRADICTIONS:
        if holds(policy):
            raise ValueError(f"contradictory policy: {reason(policy)}")


def stores_as_torch(policy: Policy) -> bool:
    """Whether parameters, gradients and state are in params' dtype, rounded to nearest, as torch steps them."""
    kept = (policy.state, policy.grads)
    return policy.master is None and kept == (policy.params, policy.params) and policy.rounding == "nearest"
