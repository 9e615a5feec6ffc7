"""Whole numbers that a half dtype rounds, and angles that are computed of rounded numbers: seen by value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from precision_lab.auditing.holds import HALVES, rounded_to
from precision_lab.auditing.kinds import CAST
from precision_lab.auditing.record import FORWARD, Event, Op
from precision_lab.auditing.where import Line

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

_ARITHMETIC = frozenset(["add", "sub", "mul", "div", "rsub", "pow", "remainder"])
_EXACT = {torch.bfloat16: 2**8, torch.float16: 2**11}
"""The largest integer up to which every integer is a number of the dtype."""
_TURNS = 30.0
"""An angle from which on a table that is made outside of a model is one of positions, not of a wave."""
_SEVERAL = 1 << 22
"""No tensor with more elements is looked at by value."""


class Values:
    """Looks at numbers where they are rounded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def see(self, row: Op, inputs: list[Tensor], output: Tensor | None) -> None:
        """Looks at the operands of an operation in forward or in the loop."""
        name = row.name
        if name in ("cos", "sin") and not inputs[0].requires_grad:
            self._angles(row, inputs[0])
        if output is None or output.dtype not in HALVES:
            return
        if row.kind is CAST or name in _ARITHMETIC:
            self._rounded(row.kind is CAST, inputs, output.dtype, row.module, row.line)
        elif name == "copy_":
            self._rounded(True, inputs[1:], output.dtype, row.module, row.line)

    def made(self, output: Tensor, line: Line | None) -> None:
        """Notes positions that were made in half, where it does not hold them."""
        if output.dtype not in HALVES or not 0 < output.numel() <= _SEVERAL:
            return
        largest, module = float(output.abs().max()), self._recorder.module_path()
        if largest > _EXACT[output.dtype]:
            self._recorder.note_rounded(line, module=module, of=torch.int64, to=output.dtype, largest=largest)

    def _angles(self, row: Op, value: Tensor) -> None:
        """Notes angles in half, or cast from half; outside of a model those of positions alone, that are large."""
        angles = self._recorder.record.angles
        known = any((each.line, each.module) == (row.line, row.module) for each in angles)
        if known or type(value) is not Tensor or not 1 < value.numel() <= _SEVERAL:
            return
        value = value.detach()
        least = 0.0 if row.phase == FORWARD and value.dtype in HALVES else _TURNS
        if value.dtype not in (*HALVES, torch.float32) or (largest := float(value.abs().max())) < least:
            return
        if (of := value.dtype if value.dtype in HALVES else rounded_to(value)) is not None:
            data = {"module": row.module, "of": of, "largest": largest}
            angles.append(Event(row.name, row.line, "", self._recorder.steps, data))

    def _rounded(self, is_cast: bool, inputs: list[Tensor], dtype: torch.dtype, module: str, line: Line | None) -> None:
        """Notes integers, and whole numbers among the inputs, that the half dtype rounds to others."""
        for each in inputs[:2]:
            if type(each) is not Tensor or not 0 < each.numel() <= _SEVERAL or not each.dim():
                continue
            whole = not each.is_floating_point() and not each.is_complex() and each.dtype is not torch.bool
            if not whole and not (is_cast and each.dtype in (torch.float32, torch.float64)):
                continue
            if not whole and (each.requires_grad or self._recorder.is_stored(each)):
                continue
            value = each.detach()
            largest = float(value.abs().max())
            if not _EXACT[dtype] < largest < float("inf"):
                continue
            if not whole and not bool((value == value.round()).all()):
                continue
            other = value.to(dtype).to(torch.float64) != value.to(torch.float64)
            if float(other.double().mean()) > 0.1 and _are_several(value[other]):
                self._recorder.note_rounded(line, module=module, of=each.dtype, to=dtype, largest=largest)


def _are_several(numbers: Tensor) -> bool:
    """Whether they look like ids or times, not like what masks add, which is one large negative number."""
    different = torch.unique(numbers).numel()
    return different > 2 or (different == numbers.numel() and bool((numbers > 0).all()))
