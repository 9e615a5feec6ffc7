"""LossWatch: warns once of a loss that is inf or NaN for ten steps in a row, in modes that skip no such step.

It makes no host sync: on the CPU each loss is read; on other devices ten losses are compared there, and the result is
read in a later backward, when the copy to the CPU is done.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

IN_A_ROW = 10
_EVENTS = ("cuda", "xpu")
"""Device types whose events tell, without waiting, that a copy to the CPU has arrived; others are not watched."""


class LossWatch:
    """Watches the losses of a run in `mode`; `backward` and `stepped` say what its loop does."""

    sees_steps = False
    """Whether `stepped` will be called; else each backward counts as a step, since nothing tells where one ends."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._step = 0  # how many steps there were
        self._run = 0  # steps in a row, the last one included
        self._last = -1  # the last step with a loss that was not finite
        self._said = False
        self._waiting: list[tuple[int, Tensor]] = []
        self._arriving: tuple[list[int], Tensor, Any] | None = None

    def stepped(self) -> None:
        """Counts an optimizer step."""
        self._step += 1

    def backward(self, loss: Tensor) -> None:
        """Counts a loss, before its backward."""
        if self._said or loss.numel() != 1 or type(loss) is not Tensor:  # reading a subclass may be a collective
            return
        if not self.sees_steps:
            self._step += 1
        if loss.is_cpu:
            self._count(self._step, math.isfinite(loss.item().real))
        elif loss.device.type in _EVENTS:
            self._later(loss)

    def _count(self, step: int, is_finite: bool) -> None:
        if is_finite or step == self._last or self._said:
            return
        self._run = self._run + 1 if step == self._last + 1 else 1
        self._last = step
        if self._run >= IN_A_ROW:
            self._said = True
            self._waiting.clear()
            warnings.warn(
                f"the loss was inf or NaN in {IN_A_ROW} steps in a row. {self._mode} skips no such step, so the "
                "parameters are likely to be NaN by now: load the last checkpoint, then look at the data, the learning "
                "rate, and clipping (fabric.clip_gradients with error_if_nonfinite=True raises at the first one)"
                " [nonfinite-loss]",
                stacklevel=4,
            )

    def _later(self, loss: Tensor) -> None:
        if loss.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        if self._arriving is not None and self._arriving[2].query():
            self._read()
        if not self._waiting or self._waiting[0][1].device == loss.device:
            self._waiting.append((self._step, loss.detach().reshape(())))
        if len(self._waiting) >= IN_A_ROW and self._arriving is None:
            self._arriving = (*self._compare(), event := torch.Event(loss.device))
            event.record()
        del self._waiting[: -16 * IN_A_ROW]  # a device that is far behind

    def _compare(self) -> tuple[list[int], Tensor]:
        """Returns the steps of what waits, and where it will be seen on the CPU whether their losses were finite."""
        steps = [step for step, _ in self._waiting]
        finite = torch.stack([loss.to(torch.float32) for _, loss in self._waiting]).isfinite()
        self._waiting.clear()
        arrived = torch.empty(len(steps), dtype=torch.bool, pin_memory=not finite.is_cpu)
        return steps, arrived.copy_(finite, non_blocking=True)

    def _read(self) -> None:
        assert self._arriving is not None
        steps, finite, _ = self._arriving
        self._arriving = None
        for step, is_finite in zip(steps, finite.tolist(), strict=True):
            self._count(step, is_finite)
