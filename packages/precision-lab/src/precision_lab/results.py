"""The results of a comparison: a row for each mode, and figures that need several rows."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from precision_core import Policy

Status = Literal["done", "failed", "not run"]

REFERENCE = "64-true"
"""Drift is measured from this mode: its rounding errors are a billionth of float32's."""
BASELINE = "32-true"
"""Step times are ratios to this mode's."""


@dataclass
class Row:
    """The figures of one mode; None until they are known. Bytes are those of the first process."""

    mode: str
    """In the spelling of `parse_modes`: equal policies are equal strings."""
    status: Status = "not run"
    reason: str = ""
    """Why it was not run, or failed."""
    losses: list[float] = field(default_factory=list)
    """The training loss of each step."""
    step_seconds: list[float] = field(default_factory=list)
    held_out_loss: float | None = None
    parameter_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    peak_memory_bytes: int | None = None
    skipped_steps: int | None = None
    policy: dict[str, Any] | None = None
    """The policy's fields as plain values; of a package's mode as its plugin reports it, once it ran."""

    @property
    def train_loss(self) -> float | None:
        """The mean training loss over the last tenth of the steps, nats per byte; a single batch says little."""
        return statistics.fmean(self.losses[-last_tenth(len(self.losses)) :]) if self.status == "done" else None

    @property
    def median_step_seconds(self) -> float | None:
        """The median, which the slow first steps and a busy machine hardly move."""
        return statistics.median(self.step_seconds) if self.status == "done" else None


@dataclass
class Comparison:
    """All rows, and the arguments of the comparison."""

    steps: int
    seed: int
    rows: list[Row]
    strategy: str = "auto"
    environment: dict[str, Any] = field(default_factory=dict)
    """Device, versions and the like, from the first child that started."""

    def drift(self, row: Row) -> float | None:
        """Returns max over steps of |L - L64| / L64; None without a finished 64-true row."""
        reference = self.find(REFERENCE)
        if reference is None or row.status != "done":
            return None
        return max(abs(loss - true) / true for loss, true in zip(row.losses, reference.losses, strict=True))

    def time_ratio(self, row: Row) -> float | None:
        """Returns the median step time in units of 32-true's; None without a finished 32-true row."""
        baseline = self.find(BASELINE)
        if baseline is None or row.median_step_seconds is None or not baseline.median_step_seconds:
            return None
        return row.median_step_seconds / baseline.median_step_seconds

    def find(self, mode: str) -> Row | None:
        """Returns the finished row of `mode`."""
        return next((row for row in self.rows if row.mode == mode and row.status == "done"), None)

    @property
    def failed(self) -> bool:
        """Whether any mode failed."""
        return any(row.status == "failed" for row in self.rows)

    def as_dict(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Returns everything as plain values for JSON; `settings` are the constants of training."""
        return {
            "version": 1,
            "steps": self.steps,
            "seed": self.seed,
            "strategy": self.strategy,
            "settings": settings,
            "environment": self.environment,
            "modes": [self._row_as_dict(row) for row in self.rows],
        }

    def _row_as_dict(self, row: Row) -> dict[str, Any]:
        derived = {
            "train_loss": row.train_loss,
            "drift": self.drift(row),
            "step_ms": None if row.median_step_seconds is None else 1000 * row.median_step_seconds,
            "time_ratio": self.time_ratio(row),
        }
        measured = {f.name: getattr(row, f.name) for f in fields(row)}
        return {"mode": row.mode, "policy": row.policy} | derived | measured


def last_tenth(steps: int) -> int:
    """Returns how many steps the train loss is averaged over."""
    return max(1, steps // 10)


def policy_as_dict(policy: Policy) -> dict[str, Any]:
    """Returns the fields of `policy` as plain values for JSON, dtypes as strings."""
    values = {f.name: getattr(policy, f.name) for f in fields(policy)}
    exceptions = {pattern: policy_as_dict(exception) for pattern, exception in values.pop("exceptions")}
    return {name: _plain(value) for name, value in values.items()} | {"exceptions": exceptions}


def _plain(value: torch.dtype | bool | None) -> str | bool | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
