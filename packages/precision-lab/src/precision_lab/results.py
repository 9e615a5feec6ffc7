"""The results of a comparison: a row for each mode, and figures that need several rows."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from precision_core import Policy
from precision_lab.shown import Shown

Status = Literal["done", "failed", "not run"]

REFERENCE = "64-true"
"""Drift is measured from this mode: its rounding errors are a billionth of float32's."""
BASELINE = "32-true"
"""Step times are ratios to this mode's, and held-out losses are measured by its spread over seeds."""
WARM_UP = 2
"""Steps at the start that no time counts of: they allocate, and choose kernels."""


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
    noise: list[tuple[str, float | None, float | None]] = field(default_factory=list)
    """Each leaf module in the order of the forward: decibels of signal to noise of its output, and of the gradient."""
    no_noise: str = ""
    """Why there are none."""
    unchanged: list[tuple[str, int, int]] = field(default_factory=list)
    """Each half parameter: elements whose updates changed nothing, of so many."""
    trains: float | None = None
    """The share of the model's parameters that train, adapters included."""
    note: str = ""
    """What to know of its figures."""
    seed: int = 0
    repeat: bool = False
    """Whether it is a run of another seed, for the spread."""

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"{self.mode}, seed {self.seed}" if self.repeat else self.mode

    @property
    def train_loss(self) -> float | None:
        """The mean training loss over the last tenth of the steps; a single batch says little."""
        return statistics.fmean(self.losses[-last_tenth(len(self.losses)) :]) if self.status == "done" else None

    @property
    def unchanged_share(self) -> float:
        """The share of the updates that changed nothing, 0 where none was looked at."""
        seen = sum(total for *_, total in self.unchanged)
        return sum(same for _, same, _ in self.unchanged) / seen if seen else 0.0

    @property
    def median_step_seconds(self) -> float | None:
        """The median, which the slow first steps and a busy machine hardly move."""
        return statistics.median(self.step_seconds) if self.status == "done" else None


@dataclass(repr=False)
class Comparison(Shown):
    """All rows, and the arguments of the comparison."""

    steps: int
    seed: int
    rows: list[Row]
    strategy: str = "auto"
    task: str = ""
    """The user's, task.py:make; "": the built-in GPT."""
    size: str = "1m"
    """Of the GPT."""
    repeats: list[Row] = field(default_factory=list)
    """Runs of other seeds."""
    look: str = "layers"
    """`Job.look` of each run."""
    block: int | None = None
    """Steps that each mode takes in its turn, after `WARM_UP`; None: one mode after another."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Device, versions and the like, from the first child that started."""
    named: bool = True
    """Whether the modes were named: one that the task or the machine does not allow has failed then."""
    tracebacks: dict[str, str] = field(default_factory=dict)
    """Mode -> the user's traceback, of a mode that failed in the user's code. Holds paths: it is in no record."""

    # ---------------------------------------------------------------- losses

    def drift(self, row: Row) -> float | None:
        """Returns max over steps of |L - L64| / |L64|; None without a finished 64-true row."""
        reference = self.find(REFERENCE)
        if reference is None or row.status != "done":
            return None
        pairs = zip(row.losses, reference.losses, strict=True)
        return max(abs(loss - true) / max(abs(true), sys.float_info.min) for loss, true in pairs)

    def difference(self, row: Row) -> float | None:
        """Returns by how much the held-out loss is above 32-true's of the same seed, the mean over seeds."""
        base, mine = self._held_out(BASELINE), self._held_out(row.mode)
        pairs = [mine[seed] - base[seed] for seed in mine.keys() & base.keys()]
        return statistics.fmean(pairs) if pairs and row.status == "done" else None

    def spread(self) -> float | None:
        """Returns the standard deviation of 32-true's held-out losses over seeds; None for fewer than two."""
        losses = list(self._held_out(BASELINE).values())
        return statistics.stdev(losses) if len(losses) > 1 else None

    def in_spreads(self, row: Row) -> float | None:
        """Returns `difference` in units of `spread`."""
        difference, spread = self.difference(row), self.spread()
        return None if difference is None or not spread else difference / spread

    def seeds_of(self, mode: str) -> int:
        """Returns how many seeds a mode has finished with."""
        return len(self._held_out(mode))

    def _held_out(self, mode: str) -> dict[int, float]:
        done = [row for row in (*self.rows, *self.repeats) if row.mode == mode and row.status == "done"]
        return {row.seed: row.held_out_loss for row in done if row.held_out_loss is not None}

    # ---------------------------------------------------------------- times

    def time_ratio(self, row: Row) -> float | None:
        """Returns the step time in units of 32-true's: the median over paired blocks, else the ratio of medians.

        None without a finished 32-true row.
        """
        ratios = self.block_ratios(row)
        if ratios:
            return statistics.median(ratios)
        baseline = self.find(BASELINE)
        if baseline is None or row.median_step_seconds is None or not baseline.median_step_seconds:
            return None
        return row.median_step_seconds / baseline.median_step_seconds

    def time_quartiles(self, row: Row) -> tuple[float, float] | None:
        """Returns the first and third quartile of the paired ratios; None for fewer than four blocks."""
        ratios = self.block_ratios(row)
        if len(ratios) < 4:
            return None
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return first, third

    def block_ratios(self, row: Row) -> list[float]:
        """Returns for each block that both trained in turn the ratio of its median step time to 32-true's."""
        baseline = self.find(BASELINE)
        if self.block is None or baseline is None or row.status != "done":
            return []
        pairs = zip(self._blocks(row), self._blocks(baseline), strict=True)
        return [mine / base for mine, base in pairs if base]

    def _blocks(self, row: Row) -> list[float]:
        assert self.block is not None
        seconds = row.step_seconds[WARM_UP:]
        return [statistics.median(seconds[start : start + self.block]) for start in range(0, len(seconds), self.block)]

    # ---------------------------------------------------------------- all

    def find(self, mode: str) -> Row | None:
        """Returns the finished row of `mode`."""
        return next((row for row in self.rows if row.mode == mode and row.status == "done"), None)

    @property
    def failed(self) -> bool:
        """Whether any mode failed."""
        return any(row.status == "failed" for row in (*self.rows, *self.repeats))

    def as_dict(self, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns everything as plain values for JSON; `settings` are the constants of the built-in training."""
        return {
            "version": 2,
            "steps": self.steps,
            "seed": self.seed,
            "strategy": self.strategy,
            "task": Path(self.task).name or None,
            "size": None if self.task else self.size,
            "settings": settings,
            "environment": self.environment,
            "block": self.block,
            "spread": self.spread(),
            "modes": [self._row_as_dict(row) for row in self.rows],
            "repeats": [{f.name: getattr(row, f.name) for f in fields(row)} for row in self.repeats],
        }

    def _row_as_dict(self, row: Row) -> dict[str, Any]:
        derived = {
            "train_loss": row.train_loss,
            "drift": self.drift(row),
            "difference": self.difference(row),
            "in_spreads": self.in_spreads(row),
            "seeds": self.seeds_of(row.mode),
            "step_ms": None if row.median_step_seconds is None else 1000 * row.median_step_seconds,
            "time_ratio": self.time_ratio(row),
            "time_quartiles": self.time_quartiles(row),
        }
        measured = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "repeat"}
        return {"mode": row.mode, "policy": row.policy} | derived | measured


def last_tenth(steps: int) -> int:
    """Returns how many steps the train loss is averaged over."""
    return max(1, steps // 10)


def percent(share: float) -> str:
    """Returns a share as a percentage, with a digit behind the point where it is small."""
    return f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}"


def policy_as_dict(policy: Policy) -> dict[str, Any]:
    """Returns the fields of `policy` as plain values for JSON, dtypes as strings."""
    values = {f.name: getattr(policy, f.name) for f in fields(policy)}
    exceptions = {pattern: policy_as_dict(exception) for pattern, exception in values.pop("exceptions")}
    return {name: _plain(value) for name, value in values.items()} | {"exceptions": exceptions}


def _plain(value: torch.dtype | bool | None) -> str | bool | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
