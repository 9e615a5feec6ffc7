"""Double precision: float64 throughout."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from precision_core.policy.policy import MODES
from precision_core.precision.base import Precision
from precision_core.precision.model.default_dtype import created_as


class DoublePrecision(Precision):
    """Parameters, buffers, inputs and tensors created in forward are float64, complex ones complex128."""

    policy = MODES["64-true"]
    _runs = (torch.float64,)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context in which created tensors are float64."""
        return created_as(torch.float64, aligns=self._aligns)
