"""What belongs to one step: forwards and backwards, then the optimizers' steps, in whatever order a loop has them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from precision_lab.auditing.where import Line
from precision_lab.watching.alarms import Alarm, Alarms
from precision_lab.watching.batch import Batch
from precision_lab.watching.values import Value


@dataclass
class Loss:
    """What backward was called on, and where it came from, until that was looked at."""

    value: Value
    line: Line | None
    batch: Batch | None


@dataclass
class Step:
    """One step. It ends where the next training forward or backward begins, or an optimizer steps again."""

    number: int
    sampled: bool = False
    started: float = field(default_factory=time.perf_counter)
    batch: Batch | None = None  # of the last forward
    waiting: list[Loss] = field(default_factory=list)  # losses that nobody has looked at yet
    losses: list[float] = field(default_factory=list)
    norms: list[Value] = field(default_factory=list)  # of parts of the gradients
    judged: int = 0  # norms that were looked at
    probes: list[Value] = field(default_factory=list)  # of a few gradients, where there is no norm
    probed: int = 0
    probes_finite: bool = True
    is_scaled: bool = False
    scale: Value | None = None
    skips: list[Value] = field(default_factory=list)
    optimizers: list[int] = field(default_factory=list)  # ids of those that have stepped, or were skipped
    changed: bool = False  # whether an optimizer has changed weights
    seconds: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether all values have come."""
        values = [*(loss.value for loss in self.waiting), *self.norms, *self.probes, *self.skips]
        return all(value.ready for value in values) and (self.scale is None or self.scale.ready)

    def look(self, alarms: Alarms, wait: bool = False) -> list[tuple[Alarm, Batch | None]]:
        """Looks at the losses and norms that have come; returns what is wrong."""
        found: list[tuple[Alarm | None, Batch | None]] = []
        while self.waiting and (wait or self.waiting[0].value.ready):
            loss = self.waiting.pop(0)
            self.losses.append(loss.value.read())
            found.append((alarms.loss(self.number, self.losses[-1], loss.line), loss.batch))
        while self.judged < len(self.norms) and (wait or self.norms[self.judged].ready):
            norm = self.norms[self.judged].read()
            self.judged += 1
            found.append((alarms.norm(self.number, norm, self.is_scaled), self.batch))
        while self.probed < len(self.probes) and (wait or self.probes[self.probed].ready):
            value = self.probes[self.probed].read()
            self.probed += 1
            self.probes_finite &= math.isfinite(value)
            found.append((alarms.gradient(self.number, value, self.is_scaled), self.batch))
        return [(alarm, batch) for alarm, batch in found if alarm is not None]

    def end(self, alarms: Alarms) -> list[tuple[Alarm, Batch | None]]:
        """Looks at all that is left, when the step has ended."""
        found = self.look(alarms, wait=True)
        finite = all(map(math.isfinite, self.losses)) and (self.norm is None or math.isfinite(self.norm))
        finite = finite and self.probes_finite
        last = alarms.ended(self.number, finite, self.skipped)
        return [*found, *([(last, self.batch)] if last is not None else [])]

    @property
    def factor(self) -> float:
        """The loss scale, 1 without."""
        return 1.0 if self.scale is None else self.scale.read()

    @property
    def skipped(self) -> bool:
        """Whether a scaler left out an optimizer's step."""
        return any(value.read() != 0 for value in self.skips)

    @property
    def norm(self) -> float | None:
        """Of all gradients that norms are known of."""
        return math.sqrt(sum(value.read() ** 2 for value in self.norms)) if self.norms else None

    def as_dict(self) -> dict[str, Any]:
        """Returns the line. The loss is the sum of what backward was called on."""
        found: dict[str, Any] = {"step": self.number, "loss": sum(self.losses) if self.losses else None}
        if self.norms:
            found["norm"] = self.norm
        if self.is_scaled:
            found["skipped"] = self.skipped
            found["scale"] = self.factor if self.scale is not None else None
        found["seconds"] = round(self.seconds, 6)
        return found
