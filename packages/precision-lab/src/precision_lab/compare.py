"""The comparison: one child process a mode, one after another, and its row filled in."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import fields
from typing import Any

from precision_lab.process import ChildFailed, run_child
from precision_lab.progress import Progress
from precision_lab.results import Comparison, Row
from precision_lab.train import Job

_FIGURES = {f.name for f in fields(Row)}

Runner = Callable[[Job], Generator[dict[str, Any], None, None]]
"""Trains in a process of its own, yields its events as they come, and raises `ChildFailed`; `run_child` is one."""


def run(
    comparison: Comparison, accelerator: str, progress: Progress, devices: int = 1, runner: Runner = run_child
) -> None:
    """Trains the mode of each row without a `reason`, and fills the row in; after a failure the others go on."""
    for row in comparison.rows:
        if row.reason:
            continue
        progress.start(row)
        try:
            job = Job(row.mode, comparison.steps, comparison.seed, accelerator, devices, comparison.strategy)
            with closing(runner(job)) as events:
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
