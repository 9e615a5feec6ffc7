"""Masters: the float32 values that an optimizer steps where parameters are half, for checkpoints; by default none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "master_rest"
"""What the rest of each value is called in the state of the optimizer that holds the parameter."""
EXACT = (torch.float32, torch.float16)
"""What a bfloat16 weight and its rest hold exactly."""


class Masters:
    """Null object: no parameter has more to its value than itself."""

    def holds(self, param: Tensor) -> bool:
        """Whether `param` holds float32 values exactly, with what is stored beside it."""
        return False

    def value(self, param: Tensor) -> Tensor:
        """Returns the value that an optimizer steps: float32, a new tensor, or `param` itself, detached."""
        return param.detach()

    def keep(self, param: Tensor, rest: Tensor) -> None:
        """Takes `rest` for the weight that `param` has now."""
        raise NotImplementedError

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weight (bfloat16) and the rest (int16) of float32 or float16 values, or of a DTensor's shard."""
        from precision_core.precision.update.rests import split_off

        return split_off(value.float())

    def combined(self, weight: Tensor, rest: Tensor) -> Tensor:
        """Returns the float32 values of a bfloat16 weight and its rest (int16), sharded alike."""
        from precision_core.precision.update.bits import combine
        from precision_core.precision.update.layout import local

        value = torch.empty_like(weight, dtype=torch.float32)
        with torch.no_grad():
            combine(local(weight), local(rest), local(value))
        return value

    def state_dict(self) -> dict[str, Any]:
        """Returns what the precision's state has besides its counts: the generator of stochastic rounding."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, from the precision's state."""


NO_MASTERS = Masters()
