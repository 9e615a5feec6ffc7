"""Which of core's plugins runs a policy."""

from __future__ import annotations

import torch

from precision_core.policy.policy import Policy
from precision_core.precision.base import Precision
from precision_core.precision.double import DoublePrecision
from precision_core.precision.half import HalfPrecision
from precision_core.precision.mixed import MixedPrecision


def make_plugin(policy: Policy, device_type: str) -> Precision:
    """Returns core's plugin for `policy`; raises `ValueError` for one that none of them runs."""
    if policy.mixed:
        return MixedPrecision(policy, device=device_type)
    if policy.params is torch.float64:
        return DoublePrecision(policy=policy)
    if policy.params is torch.float32:
        return Precision(policy=policy)
    return HalfPrecision(policy)
