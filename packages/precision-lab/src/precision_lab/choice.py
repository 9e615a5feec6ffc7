"""A choice: the precision to train in, why, what it costs and saves, and what was not tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any, Literal

from precision_core.support import Chosen, write_chosen
from precision_lab.evidence import Evidence
from precision_lab.results import BASELINE
from precision_lab.shown import Shown, human_bytes

Judged = Literal["safe", "worse", "undecided", "swallows", "failed", "not run", "reference"]
"""Swallows: too many updates round to nothing, which a longer run may stall on whatever the loss of this one is."""


@dataclass
class Candidate:
    """A precision that was considered, and how far it came."""

    precision: str
    bytes: int | None = None
    """What a training step takes at its peak, as `estimate` says; see `Choice.bytes_are`."""
    time_ratio: float | None = None
    """Step time in units of 32-true's."""
    judged: Judged = "not run"
    reason: str = ""
    evidence: Evidence | None = None
    unchanged: float = 0.0
    """The share of its updates that rounded to nothing."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Exception -> why."""


@dataclass(repr=False)
class Choice(Shown):
    """What `precision choose` found; `precision` is what `Fabric(precision=...)` takes, "" where there is no answer."""

    precision: str
    candidates: list[Candidate]
    """Cheapest first, in the order in which they were judged."""
    steps: int
    race_steps: int
    prefer: str = "memory"
    fit: int | None = None
    bytes_are: str = "estimated peak"
    untested: list[str] = field(default_factory=list)
    model: str = ""
    """Core's fingerprint of the model."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    """What chooses again."""
    path: str | None = None
    """The file that it was written to."""
    tracebacks: dict[str, str] = field(default_factory=dict)
    """Mode -> the user's traceback, of a mode that failed in the user's code."""

    def find(self, precision: str) -> Candidate | None:
        """Returns what was found about a precision."""
        return next((each for each in self.candidates if each.precision == precision), None)

    @property
    def reasons(self) -> dict[str, str]:
        """Exception of the chosen precision (its pattern) -> why it is needed."""
        found = self.find(self.precision)
        return {} if found is None else found.reasons

    def write(self, path: str | PathLike[str]) -> None:
        """Writes the file that `Fabric(precision="auto")` reads."""
        chosen = Chosen(self.precision, self.model, self.machine, self.reasons, self.command)
        measured = {
            "steps": self.steps,
            "candidates": [asdict(each) for each in self.candidates],
            "untested": self.untested,
        }
        write_chosen(chosen, path, measured=measured)
        self.path = str(path)

    # ---------------------------------------------------------------- text

    def table(self) -> tuple[list[str], list[list[str]], list[str]]:
        """Returns the candidates in rows, and below what to take and why."""
        columns = ["precision", "judged", "bytes", "x 32-true", "time", "seeds", "spreads", "up to"]
        return columns, [self._cells(each) for each in self.candidates], self.lines()

    def lines(self) -> list[str]:
        """Returns the answer in sentences."""
        whys = [f"{each.precision}: {each.judged}: {each.reason}" for each in self.candidates if each.reason]
        tail = [*whys, *(f"not tested: {each}" for each in self.untested)]
        found = self.find(self.precision)
        if found is None:
            return ["No answer", *tail]
        lines = [f'precision="{self.precision}"']
        lines += [f"{pattern}: 32-true: {reason}" for pattern, reason in found.reasons.items()]
        return [*lines, self._costs(found), *tail, *([f"written to {self.path}"] if self.path else [])]

    def _costs(self, found: Candidate) -> str:
        base = self.find(BASELINE)
        parts = []
        if found.precision == BASELINE:
            parts.append("nothing cheaper was found to be safe" if len(self.candidates) > 1 else "nothing else runs")
        elif found.evidence is not None:
            evidence = found.evidence
            parts.append(
                f"costs {evidence.difference:+.3g} held-out loss (up to {evidence.difference + evidence.margin:+.3g}), "
                f"where 32-true itself has a standard deviation of {evidence.spread:.2g} over seeds "
                f"({evidence.seeds} seeds, {self.steps} steps)"
            )
        if base is not None and found is not base and base.bytes and found.bytes:
            parts.append(
                f"saves {1 - found.bytes / base.bytes:.0%} of the {self.bytes_are} bytes "
                f"({human_bytes(found.bytes)} of {human_bytes(base.bytes)})"
            )
        if found.time_ratio is not None and found is not base:
            parts.append(f"{found.time_ratio:.2f} x the time of a step")
        return "; ".join(parts)

    def _cells(self, each: Candidate) -> list[str]:
        base = self.find(BASELINE)
        ratio = each.bytes / base.bytes if each.bytes and base is not None and base.bytes else None
        evidence = each.evidence
        known = evidence is not None and evidence.spread > 0
        return [
            each.precision,
            each.judged,
            human_bytes(each.bytes),
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if each.time_ratio is None else f"{each.time_ratio:.2f}",
            "-" if evidence is None else str(evidence.seeds),
            f"{evidence.difference / evidence.spread:+.2f}" if evidence is not None and known else "-",
            f"{(evidence.difference + evidence.margin) / evidence.spread:+.2f}"
            if evidence is not None and known
            else "-",
        ]
