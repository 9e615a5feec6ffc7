"""What is wrong enough to be told: each mistake once, as long as it lasts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from precision_lab.auditing.where import Line
from precision_lab.watching.spikes import Spikes

LOSS, GRADIENTS, SPIKE, SKIPS = "loss", "gradients", "spike", "skips"
MAX_SKIPS = 10
"""Steps that a scaler skips in a row before that is an alarm: a few are how it finds its scale."""


@dataclass
class Alarm:
    """Something went wrong in a step.

    kind       value
    loss       the loss, which is inf or NaN
    gradients  the norm of the gradients, or one of a few, which is, though no scaler looks after it
    spike      the loss
    skips      so many steps were skipped in a row
    """

    kind: str
    step: int
    value: float
    text: str
    line: Line | None = None  # that called backward
    before_step: bool = True  # whether the weights are those of the forward still
    explanation: Any = None  # of `precision_lab.explaining`
    unexplained: str = ""  # why there is none

    def __str__(self) -> str:
        at = f" ({self.line})" if self.line else ""
        why = self.explanation if self.explanation is not None else self.unexplained
        return f"{self.text}{at}" + (f"\n{why}" if why else "")

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values."""
        found = {
            "alarm": self.kind,
            "step": self.step,
            "value": self.value,
            "text": self.text,
            "file": self.line.file if self.line else None,
            "line": self.line.number if self.line else None,
            "before_step": self.before_step,
        }
        if self.explanation is not None:
            found["explanation"] = self.explanation.as_dict()
        if self.unexplained:
            found["unexplained"] = self.unexplained
        return found


@dataclass
class Alarms:
    """Looks at each value once, in order."""

    _spikes: dict[Line | None, Spikes] = field(default_factory=dict)
    _broken: bool = False  # not finite, and that was told
    _skips: int = 0

    def loss(self, step: int, loss: float, line: Line | None) -> Alarm | None:
        """Looks at a loss that backward was called on, in that line: losses of several lines are not compared."""
        if not math.isfinite(loss):
            return self._not_finite(LOSS, step, loss, f"the loss of step {step} is {loss}", line)
        spikes = self._spikes.setdefault(line, Spikes())
        if not spikes.is_spike(loss):
            return None
        text = f"the loss of step {step} is {loss:.4g}, where {spikes.median:.4g} was usual"
        return Alarm(SPIKE, step, loss, text, line)

    def norm(self, step: int, norm: float, scaled: bool) -> Alarm | None:
        """Looks at a norm of gradients; where the loss is scaled, inf and NaN are what the scaler is there for."""
        if math.isfinite(norm) or scaled:
            return None
        return self._not_finite(GRADIENTS, step, norm, f"the norm of the gradients of step {step} is {norm}", None)

    def gradient(self, step: int, value: float, scaled: bool) -> Alarm | None:
        """Looks at some gradients of a step of which no norm is known."""
        if math.isfinite(value) or scaled:
            return None
        return self._not_finite(GRADIENTS, step, value, f"gradients of step {step} are not finite", None)

    def ended(self, step: int, finite: bool, skipped: bool) -> Alarm | None:
        """Called for each step, when all of its values are known."""
        self._skips = self._skips + 1 if skipped else 0
        broken, self._broken = self._broken, self._broken and not finite
        if self._skips != MAX_SKIPS or broken:
            return None
        text = f"{MAX_SKIPS} steps in a row were skipped, up to step {step}: no loss scale fits these gradients"
        return Alarm(SKIPS, step, float(MAX_SKIPS), text)

    def _not_finite(self, kind: str, step: int, value: float, text: str, line: Line | None) -> Alarm | None:
        told, self._broken = self._broken, True
        return None if told else Alarm(kind, step, value, text, line)
