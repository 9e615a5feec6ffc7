"""The comparison: one child process a mode, one after another, and a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from precision_core import Policy, Support, supports
from precision_core.resolve import is_core_mode
from precision_lab.process import ChildFailed, run_child
from precision_lab.progress import Progress
from precision_lab.results import Comparison, Row, Status, spell
from precision_lab.train import Job

_FIGURES = {f.name for f in fields(Row)}


def make_rows(modes: Sequence[str], device_type: str, *, named: bool, run_slow: bool) -> list[Row]:
    """Returns a row for each mode, as `parse_modes` returns them. Those with a reason are not to be run.

    Modes that the device is slow at are left out unless they were `named` or are to be run all the same. One that it
    cannot run at all has failed when it was asked for by name.
    """
    rows = []
    for mode in modes:
        policy = spell(Policy.parse(mode)) if is_core_mode(mode) else None
        answer = _supports(mode, device_type)
        status: Status = "failed" if named and not answer else "not run"
        reasons = {"slow": "" if named or run_slow else f"{answer.reason}; --all runs it", "no": answer.reason}
        rows.append(Row(mode, status, reasons.get(answer.level, ""), policy=policy))
    return rows


def _supports(mode: str, device_type: str) -> Support:
    try:
        return supports(mode, device_type)
    except ImportError as error:  # some package's rows cannot be read: if it matters, the run itself will say so
        return Support("native", str(error))


def run(comparison: Comparison, accelerator: str, progress: Progress, devices: int = 1) -> None:
    """Runs every row that has no reason not to be run, and fills it in. One that fails leaves the others alone."""
    for row in comparison.rows:
        if row.reason:
            continue
        progress.start(row)
        try:
            with closing(run_child(Job(row.mode, comparison.steps, comparison.seed, accelerator, devices))) as events:
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
