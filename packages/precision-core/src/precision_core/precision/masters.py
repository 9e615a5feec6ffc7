"""Masters: the float32 values that an optimizer steps where parameters are half, for checkpoints; by default none.

Beside a bfloat16 weight are the 16 bits that make it a float32 value (`REST`); beside a float16 one, which is no half
of that, is the full value (`MASTER`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

REST = "master_rest"
"""What the other 16 bits of each bfloat16 weight are called in the state of the optimizer that holds the parameter."""
MASTER = "master_weight"
"""What the float32 value of each float16 weight is called there."""
KEYS = {REST: torch.bfloat16, MASTER: torch.float16}
"""Key -> the dtype of the weight beside it."""


class Masters:
    """Null object: no parameter has more to its value than itself."""

    key: str | None = None
    """What is beside the weights, one of `KEYS`; None: nothing is."""
    exact: tuple[torch.dtype, ...] = ()
    """Other dtypes whose values a weight holds exactly, with what is beside it."""

    def holds(self, param: Tensor) -> bool:
        """Whether `param` holds float32 values exactly, with what is stored beside it."""
        return False

    def value(self, param: Tensor) -> Tensor:
        """Returns the value that an optimizer steps: float32, a new tensor, or `param` itself, detached."""
        return param.detach()

    def keep(self, param: Tensor, beside: Tensor) -> None:
        """Takes what is beside the weight that `param` has now."""
        raise NotImplementedError

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weight, and what is beside it, of values in a dtype of `exact`, or of a DTensor's shard."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns what the precision's state has besides its counts: the generator of stochastic rounding."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, from the precision's state."""


NO_MASTERS = Masters()


def combined(weight: Tensor, beside: Tensor) -> Tensor:
    """Returns the float32 values of a half weight and what was stored beside it, sharded alike; a new tensor."""
    from precision_core.precision.update.bits import combine
    from precision_core.precision.update.layout import local
    from precision_core.precision.update.rests import reconcile

    with torch.no_grad():
        if beside.dtype is torch.int16:
            value = torch.empty_like(weight, dtype=torch.float32)
            combine(local(weight), local(beside), local(value))
        else:
            value = beside.clone()
            reconcile(local(value), local(weight))
    return value
