"""The comparison: one child process a mode, one after another, and a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from precision_core import Policy
from precision_lab.process import ChildFailed, run_child
from precision_lab.progress import Progress
from precision_lab.results import Comparison, Row
from precision_lab.slow import slow_reason
from precision_lab.train import Job

_FIGURES = {f.name for f in fields(Row)}


def make_rows(policies: Sequence[Policy], device_type: str, run_slow: bool) -> list[Row]:
    """Returns a row for each policy; those that the device is slow at say so, unless `run_slow`."""
    reasons = [None if run_slow else slow_reason(policy, device_type) for policy in policies]
    return [
        Row(policy, reason=f"{reason}; --all runs it" if reason else "")
        for policy, reason in zip(policies, reasons, strict=True)
    ]


def run(comparison: Comparison, accelerator: str, progress: Progress) -> None:
    """Runs every row that has no reason not to be run, and fills it in. One that fails leaves the others alone."""
    for row in comparison.rows:
        if row.reason:
            continue
        progress.start(row)
        try:
            with closing(run_child(Job(row.mode, comparison.steps, comparison.seed, accelerator))) as events:
                for event in events:
                    _take(event, row, comparison)
                    progress.update(row)
            row.status = "done"
        except ChildFailed as failure:
            row.status, row.reason = "failed", str(failure)
        progress.end(row)


def _take(event: dict[str, Any], row: Row, comparison: Comparison) -> None:
    if "loss" in event:
        row.losses.append(event["loss"])
        row.step_seconds.append(event["seconds"])
    elif "device" in event:
        comparison.environment = comparison.environment or event
    for name in event.keys() & _FIGURES:
        setattr(row, name, event[name])
