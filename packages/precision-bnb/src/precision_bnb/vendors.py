"""What others read from bitsandbytes' layers: `isinstance`, and attributes that follow from the packed weight.

Nothing is kept that could differ from the weight: a load, a move or a merge changes that alone.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


class As4bit(bnb.nn.Linear4bit):
    """Comes after the class with our forward; `__init__` of bitsandbytes' class is not run."""

    weight: Any
    compute_type_is_set = True
    support_avx512bf16_for_cpu = False
    """Whether bitsandbytes' forward would repack the weight."""

    @property
    def quant_state(self) -> Any:
        """The weight's; None where it is sharded."""
        return getattr(self.weight, "quant_state", None)

    @quant_state.setter
    def quant_state(self, value: Any) -> None:
        """bitsandbytes sets it when it quantises a parameter: that parameter has it."""

    @property
    def quant_storage(self) -> torch.dtype:
        """The dtype that the packed bytes are stored in."""
        dtype: torch.dtype = self.weight.dtype
        return dtype


class As8bit(bnb.nn.Linear8bitLt):
    """Comes after the class with our forward; `__init__` of bitsandbytes' class is not run."""

    weight: Any
    threshold: float
    index = None
    to = nn.Module.to

    @property
    def state(self) -> State:
        """What bitsandbytes keeps beside the weight."""
        return State(self)

    def init_8bit_state(self) -> None:
        """Does nothing: bitsandbytes would move codes and scales from the weight to the state."""


class State(bnb.MatmulLtState):
    """bitsandbytes' state of an 8-bit layer: codes and scales are the weight's, which setting them does not change."""

    has_fp16_weights = False

    def __init__(self, layer: As8bit) -> None:
        super().__init__()
        self._layer = layer

    @property
    def threshold(self) -> float:
        """The layer's."""
        return self._layer.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._layer.threshold = float(value)

    @property
    def CB(self) -> Tensor | None:
        """The codes (rows, columns); None where the weight is sharded."""
        return getattr(self._layer.weight, "CB", None)

    @CB.setter
    def CB(self, value: Any) -> None:
        pass

    @property
    def SCB(self) -> Tensor | None:
        """The scales (rows,); None where the weight is sharded."""
        return getattr(self._layer.weight, "SCB", None)

    @SCB.setter
    def SCB(self, value: Any) -> None:
        pass
