"""From what the user passed as `precision` to the plugin that runs it."""

from __future__ import annotations

import torch

from precision_core.double import DoublePrecision
from precision_core.half import HalfPrecision
from precision_core.mixed import MixedPrecision
from precision_core.policy import Policy
from precision_core.precision import Precision


def resolve_precision(precision: str | int | Policy | Precision, device_type: str) -> Precision:
    """Returns the plugin for a mode, an alias, a policy or its spelling; a plugin object is returned as it is.

    Raises:
        ValueError: no mode, or a policy that no plugin of core runs; says who does, if anyone.
    """
    if isinstance(precision, Precision):
        return precision
    policy = Policy.parse(precision)
    if policy.mixed:
        return MixedPrecision(policy, device=device_type)
    if policy.params is torch.float64:
        return DoublePrecision(policy=policy)
    if policy.params is torch.float32:
        return Precision(policy=policy)
    return HalfPrecision(policy)
