"""Which of core's plugins runs a policy."""

from __future__ import annotations

from typing import Any

import torch

from precision_core.policy.policy import Policy
from precision_core.precision.base import Precision
from precision_core.precision.double import DoublePrecision
from precision_core.precision.half import HalfPrecision
from precision_core.precision.mixed import MixedPrecision

_TRUE: dict[torch.dtype, type[Precision]] = {
    dtype: kind for kind in (DoublePrecision, Precision, HalfPrecision) for dtype in kind._runs
}
"""What params and compute are, alike -> who runs that."""


def class_for(policy: Policy) -> type[Precision]:
    """Returns core's class for a policy of that kind."""
    return MixedPrecision if policy.mixed else _TRUE[policy.params]


def make_plugin(policy: Policy, device_type: str) -> Precision:
    """Returns core's plugin for `policy`; raises `ValueError` for one that none of them runs."""
    if policy.mixed:
        return MixedPrecision(policy, device=device_type)
    kind: Any = class_for(policy)
    return kind(policy) if kind is HalfPrecision else kind(policy=policy)
