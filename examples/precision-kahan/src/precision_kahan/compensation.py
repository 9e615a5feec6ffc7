"""Compensation: what rounding to bfloat16 took from each parameter, kept in bfloat16 beside it.

    wide = param + lost         float32, about 16 bits of significand
    ... the update ...
    param = bfloat16(wide)      what the model sees
    lost = bfloat16(wide - param)

This is Kahan's summation (Kahan 1965, "Further remarks on reducing truncation errors") as Zamirai et al. apply it to
weights ("Revisiting BFloat16 Training", arXiv 2010.06192).
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_HALF_SPACING = 2.0**-8
"""Rounding to nearest takes at most half a spacing, which is at most this share of the parameter."""


class Compensation:
    """Parameter -> what it lost (bfloat16, same shape); one without an entry lost nothing. Keeps no parameter alive."""

    def __init__(self) -> None:
        self._entries: MutableMapping[Tensor, tuple[Tensor, int | None]] = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return sum(self.of(param) is not None for param in self._entries)

    def of(self, param: nn.Parameter | Tensor) -> Tensor | None:
        """Returns what `param` lost; None: nothing, or someone else wrote to it since, and it is what they wrote."""
        lost, version = self._entries.get(param, (None, None))
        return lost if version is None or version == param._version else None

    def put(self, param: nn.Parameter, lost: Tensor, *, restored: bool = False) -> None:
        """Takes `lost` for the present value of `param`, or for the one it will have at the next step (`restored`)."""
        self._entries[param] = (lost, None if restored else param._version)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def widen(self, param: nn.Parameter) -> Tensor:
        """Returns the value of `param` with what it lost, a new float32 tensor."""
        value = param.detach()
        wide, lost = value.float(), self.of(param)
        if lost is not None:
            lost = lost.to(param.device)
            # Writes through .data are not counted by torch. Whatever was written, this moves it by half a spacing.
            wide += torch.where(lost.abs() <= value.abs() * _HALF_SPACING, lost, 0)
        return wide

    @torch.no_grad()
    def split(self, param: nn.Parameter, wide: Tensor) -> None:
        """Rounds float32 `wide` into `param`, in place, and keeps what that takes; `wide` is used up."""
        param.copy_(wide)
        self.put(param, wide.sub_(param).bfloat16())


def lost_by_cast(param: Tensor) -> Tensor:
    """Returns what a cast to bfloat16 will take from the wider `param`, in bfloat16."""
    value = param.detach()
    return (value - value.bfloat16()).bfloat16()
